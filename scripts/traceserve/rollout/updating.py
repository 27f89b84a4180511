"""A new version beside the running one: registered, verified, compared, promoted, and the old one drained and removed.

Until the switch, and wherever something fails or is interrupted, clients keep getting the old version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Optional

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import Manifest

from traceserve.archives import signing
from traceserve.archives.contents import configure_unpacked, unpack
from traceserve.archives.names import check_name
from traceserve.building.samples import OwnSamples
from traceserve.checking.proof import Proof, proof_of
from traceserve.checking.verifying import AskedServer, Verification, verify_server
from traceserve.errors import ArchiveError, ServerError
from traceserve.rollout.conditions import check_archive
from traceserve.rollout.engines import ROLLOUT_ENGINES
from traceserve.rollout.engines.contract import ServedVersion
from traceserve.rollout.replaying import Replay, replay, requests_of
from traceserve.rollout.shadowing import Shadowed, ShadowOptions, shadow
from traceserve.serving import client, instances, server
from traceserve.serving.instances import Instance
from traceserve.serving.plan import Archive, planned
from traceserve.serving.update_lock import alone

_HOWEVER_LONG = 24 * 3600.0  # seconds
_SECONDS_TO_SWITCH_BACK = 600.0  # at least: nothing else lets clients have the old version again

Report = Callable[[str], None]


class UpdateRefused(ServerError):
    """The new version does not answer as it should; `replay` has the answers that moved, if they are why."""

    def __init__(self, message: str, found: Optional[Replay] = None) -> None:
        super().__init__(message)
        self.replay = found


@dataclass(frozen=True)
class UpdateOptions:
    """`workers`: None for the archive's own, else for as many as the running version has."""

    workers: Optional[int] = None
    allowed_changes: int = 0
    samples: Optional[OwnSamples] = None
    shadow: Optional[ShadowOptions] = None
    timeout: float = 300.0  # seconds, for the start of the workers, and for the drain
    trusted: Optional[Path] = None  # a public key or certificates; None: what the server was started with, if anything


@dataclass(frozen=True)
class Updated:
    """`kept` are earlier versions that still run, since so many requests named them in their path."""

    instance: Instance
    name: str
    old: str
    new: str
    seconds: float
    verification: Verification
    replay: Replay
    shadowed: Optional[Shadowed]
    kept: Dict[str, int]


def update_server(
    file: Path, port: Optional[int], options: UpdateOptions, report: Report = lambda text: None
) -> Updated:
    """Replace the served archive of this name by `file`; raises TraceserveError, after which the old one still answers."""
    instance = instances.serving_instance(check_name(file.stem), port)
    engine = ROLLOUT_ENGINES[instance.engine]
    engine.check_running_server(instance)
    with contextlib.ExitStack() as stack:
        instance = stack.enter_context(alone(instance))
        trusted = options.trusted or (Path(instance.trusted) if instance.trusted else None)
        [file] = stack.enter_context(signing.verified([file], trusted))
        proof = stack.enter_context(proof_of(file))
        [archive] = planned([file], None, None, False).values()
        running = engine.running_version(instance, archive.name)
        instance = _corrected(instance, archive.name, running)
        workers = options.workers or archive.serving.workers or running.workers
        archive = planned([file], None, workers, False)[archive.name]
        check_archive(archive, instance, running)
        engine.check_update(instance, archive, running, options.timeout)
        return _Update(archive, instance, running, proof, options, report).run()


def _corrected(instance: Instance, name: str, running: ServedVersion) -> Instance:
    """Remember the version that runs, if an update was killed after the switch."""
    if instance.unpacked(name).name == running.folder:
        return instance
    found = _after(instance, name, running.folder, running.workers)
    instances.remember(found)
    return found


def _after(instance: Instance, name: str, folder: str, workers: int) -> Instance:
    """Return the server with another version's folder and workers."""
    return dataclasses.replace(
        instance, folders={**instance.folders, name: folder}, workers={**instance.workers, name: workers}
    )


class _Update:
    """One update, and what has to be taken back if it fails."""

    def __init__(
        self,
        archive: Archive,
        instance: Instance,
        running: ServedVersion,
        proof: Proof,
        options: UpdateOptions,
        report: Report,
    ) -> None:
        self._archive, self._instance, self._running, self._proof = archive, instance, running, proof
        self._options, self._report, self._engine = options, report, ROLLOUT_ENGINES[instance.engine]
        self._name, self._version = archive.name, archive.manifest.version
        self._key = f"{self._name}@{self._version}"  # no name holds an @
        self._folder = Path(instance.folder, "store", self._key)
        self._canary = server.canary(archive.manifest)
        self._unpacked = self._registered = self._promoted = False

    def run(self) -> Updated:
        """Update; raises TraceserveError, or passes on an interrupt, once all is as it was."""
        started = time.monotonic()
        try:
            self._register()
            verification = self._verify()
            compared = self._compare()
            shadowed = self._shadow(self._options.shadow, compared) if self._options.shadow else None
            self._promote()
            named = self._drain(self._running.version)
        except TraceserveError as error:
            error.message = f"{error.message}; {self._take_back()}"
            error.args = (error.message,)
            raise
        except BaseException:  # an interrupt
            self._report(self._take_back())
            raise
        kept = self._settle(named)
        return Updated(
            self._instance,
            self._name,
            self._running.version,
            self._version,
            time.monotonic() - started,
            verification,
            compared,
            shadowed,
            kept,
        )

    def _register(self) -> None:
        """Start the new version's workers beside the old ones, and wait for them; raises TraceserveError."""
        started = time.monotonic()
        self._engine.begin_update(self._instance, self._name)
        if self._version in self._engine.versions_of(self._instance, self._name):  # of an earlier update
            named = self._drain(self._version)
            if named:
                raise ServerError(
                    f"{self._name} {self._version} still runs, for {named} requests that named it in their path; build the new "
                    "archive under another version"
                )
            self._remove(self._version, 0)
        self._unpacked = True
        shutil.rmtree(self._folder, ignore_errors=True)
        unpack(self._archive.file, self._folder)
        Manifest.read(self._folder)  # compares all files
        configure_unpacked(self._folder, self._archive.serving)
        self._registered = True
        workers = self._engine.start_beside(self._instance, self._archive, self._key, self._options.timeout)
        count = "1 worker" if workers == 1 else f"{workers} workers"
        self._report(
            f"registered {self._version} beside {self._running.version}: {count} ready after {time.monotonic() - started:.1f} s"
        )

    def _verify(self) -> Verification:
        """Ask the new version its sample and its golden set at its own address; raises ServerError."""
        self._ask_canary(f"{self._name}/{self._version}")
        found = verify_server(self._new(), self._archive.file, self._options.timeout, "--timeout")
        if not found.passed:
            raise UpdateRefused(f"{self._name} {self._version} is not what was built: {'; '.join(found.problems)}")
        self._report(
            f"verified {self._version}: {len(found.samples)} samples answered as by the original, p50 {found.p50:.1f} ms"
        )
        for note in found.notes:
            self._report(f"note on {self._version}: {note}")
        return found

    def _ask_canary(self, path: str) -> None:
        try:
            client.predict(self._instance.address, path, self._canary, 60.0)
        except ServerError as error:
            raise ServerError(f"{path} does not answer its own sample: {error.message}") from None

    def _new(self) -> AskedServer:
        return self._asked_server(self._version, f"{self._name}/{self._version}")

    def _old(self) -> AskedServer:
        version = self._running.version
        return self._asked_server(version, self._engine.path_of_running(self._name, version))

    def _asked_server(self, version: str, path: str) -> AskedServer:
        found = AskedServer.of(self._instance, path)
        return dataclasses.replace(found, label=f"{self._name} {version}")

    def _compare(self) -> Replay:
        """Ask both versions the same; raises ServerError if more answers moved than may."""
        proofs = [self._proof]
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(ArchiveError):  # the old one has no golden set
                proofs.append(stack.enter_context(proof_of(Path(self._instance.folder, "store", self._running.folder))))
            requests = requests_of(proofs, self._options.samples)
        found = replay(self._old(), self._new(), self._proof.task, requests)
        allowed = self._options.allowed_changes
        if len(found.moved) > allowed:
            raise UpdateRefused(
                f"{self._name} {self._version} answers {len(found.moved)} of {found.asked} requests otherwise than "
                f"{self._running.version}, and {allowed} may be (--allow-changes)",
                found,
            )
        moved = f"{len(found.moved)} answers changed ({allowed} allowed)" if allowed else "no answer changed"
        self._report(
            f"compared with {self._running.version}: {found.asked} requests, {moved}, scores by up to {found.drift:.1e}"
        )
        return found

    def _shadow(self, options: ShadowOptions, compared: Replay) -> Shadowed:
        """Ask the new version a share of the live requests too; raises ServerError if more answers moved than may."""
        old, new = self._running.version, self._version
        self._report(f"shadowing: {options.share:.0%} of the requests to {old} for {options.seconds:.0f} s")
        served = self._name, old
        found = shadow(self._instance, self._old(), self._new(), self._proof.task, served, options)
        moved, allowed = len(compared.moved) + len(found.moved), self._options.allowed_changes
        if moved > allowed:
            raise UpdateRefused(
                f"{self._name} {new} answers {len(found.moved)} of {found.compared} live requests otherwise than {old}; with "
                f"those before {moved} answers changed, and {allowed} may (--allow-changes)",
                Replay(found.compared, found.moved, found.drift),
            )
        if not found.compared:
            none = f"{old} answered no request, or its server or archive is older than --shadow"
            if found.shown:
                none = f"none of {found.shown} requests has an answer to compare"
            self._report(f"shadowed nothing: {none}")
        else:
            self._report(
                f"shadowed: {found.compared} different requests of {found.shown}, {len(found.moved)} answers changed, scores by "
                f"up to {found.drift:.1e}"
            )
        return found

    def _promote(self) -> None:
        """Let the new version answer all requests that name none."""
        self._promoted = True
        self._engine.switch_to(self._instance, self._name, self._version, self._options.timeout)
        self._ask_canary(self._name)
        self._report(f"promoted: {self._instance.predictions_url(self._name)} is answered by {self._version}")

    def _drain(self, version: str) -> int:
        return self._engine.drain_version(self._instance, self._name, version, self._canary, self._options.timeout)

    def _settle(self, named: int) -> Dict[str, int]:
        """Remember the new version, and remove the earlier ones that no request names; returns the others.

        One that cannot be removed is left to the next update: the new version answers. So are all of them if this one
        cannot be remembered: other commands read the files of the version that they find.
        """
        name, old = self._name, self._running.version
        self._instance = _after(self._instance, name, self._key, self._archive.workers)
        try:
            instances.remember(self._instance)
        except (OSError, TraceserveError) as error:  # such as a full disk
            self._report(f"kept {old}, which `traceserve status` still shows: {error}; the next update looks again")
            return {}
        kept: Dict[str, int] = {}
        # The others were kept by an earlier update, or by one that was killed.
        versions = dict.fromkeys([old, *self._engine.versions_of(self._instance, name)])
        for version in [each for each in versions if each != self._version]:
            try:
                count = named if version == old else self._drain(version)
                self._remove(version, count)
                kept[version] = count
            except TraceserveError as error:
                self._report(f"kept {version}: {error.message}; the next update looks again")
        return {version: count for version, count in kept.items() if count}

    def _remove(self, version: str, named: int) -> None:
        """Remove a version that has been drained, unless requests named it meanwhile."""
        if named:
            self._report(f"kept {version}: {named} requests named it in their path; the next update looks again")
            return
        folder = self._engine.versions_of(self._instance, self._name)[version].folder
        self._engine.remove_version(self._instance, self._name, version)
        shutil.rmtree(Path(self._instance.folder, "store", folder), ignore_errors=True)
        self._report(f"removed {version}, which had answered all its requests")

    def _take_back(self) -> str:
        """Give the requests back to the old version, and remove the new one; returns what answers then, as the end of a
        sentence.

        What may still answer keeps its files: a worker that is started again reads them.
        """
        name, old, new = self._name, self._running.version, self._version
        if self._promoted and not self._switch_back():
            return (
                f"nor could {old} be restored: {name} is left to {new}, which may answer or not (`traceserve status`). If it "
                f"answers, `traceserve update` with the archive of {old}; else `traceserve stop --port {self._instance.port}` "
                "and `traceserve serve` that archive"
            )
        if not self._remove_new():
            return (
                f"nor could {new} be removed: it may answer, and the next update looks again (`traceserve status` says "
                "whether the server runs)"
            )
        return f"{name} {old} answers as before"

    def _switch_back(self) -> bool:
        """Give the requests back to the old version; returns whether that was done."""
        back, timeout = False, max(self._options.timeout, _SECONDS_TO_SWITCH_BACK)
        with contextlib.suppress(TraceserveError):
            self._engine.switch_to(self._instance, self._name, self._running.version, timeout)
            back = True
            self._engine.drain_version(self._instance, self._name, self._version, self._canary, _HOWEVER_LONG)
        return back

    def _remove_new(self) -> bool:
        """Remove the new version; returns whether that was done."""
        removed = not self._registered
        with contextlib.suppress(TraceserveError):
            if self._registered and self._version in self._engine.versions_of(self._instance, self._name):
                self._engine.remove_version(self._instance, self._name, self._version)
            removed = True
        if removed and self._unpacked:
            shutil.rmtree(self._folder, ignore_errors=True)
        return removed
