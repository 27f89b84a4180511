"""Everything that an archive or an artifact says of itself, and what is wrong with it or missing here.

Nothing in it is executed: no import of its code, no unpickling; see `archives.listing`.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from traceserve_runtime import __version__, processor
from traceserve_runtime.manifest import MANIFEST_FILE, SCHEMA, Manifest, sealed
from traceserve_runtime.runtimes import aot_inductor, openvino
from traceserve_runtime.tasks import TASKS

from traceserve.archives import signing
from traceserve.archives.contents import ARCHIVER_MANIFEST, is_our_own
from traceserve.archives.listing import (
    CHANGED,
    MISSING,
    UNHASHED,
    UNKNOWN,
    Listing,
    differences,
    list_files,
    wrong_for_torchserve,
)
from traceserve.archives.model_config import SERVING_FILE, Serving
from traceserve.building.checkpoints.labels import same_labels
from traceserve.building.checkpoints.unread_weights import UNREAD_WEIGHTS
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve.checking.free_form import check_free_form
from traceserve.checking.packages_here import PackageHere, packages_of
from traceserve.deploying import resources
from traceserve.deploying.described import Described
from traceserve.errors import ArchiveError
from traceserve.serving.engines import TORCHSERVE

ERROR, WARNING, NOTE = "error", "warning", "note"
FORMAT = 1  # of the JSON document; keys are only added under one number
_DIGEST = "digest"
_CODE = (".py", ".pyc", ".so", ".pyd")


@dataclass(frozen=True)
class InspectionFinding:
    """Something that its reader should know; `code` is stable, for programs. A note alone is no reason to refuse."""

    severity: str
    code: str
    message: str


@dataclass(frozen=True)
class Inspection:
    """The contents of one archive or artifact, and the findings, the worst first."""

    listing: Listing
    manifest: Manifest
    packages: Tuple[PackageHere, ...]
    needed: Optional[resources.Resources]  # by one worker under TorchServe; None without a serving configuration
    features: Tuple[str, ...]  # of the processor, any one of which is native to the dtype; or all, of compiled code
    findings: Tuple[InspectionFinding, ...]
    signature: Optional[str] = None  # the name of the file beside it
    signer: Optional[str] = None  # the file of the key by which it was checked

    @property
    def passed(self) -> bool:
        """Whether there is nothing worse than a note."""
        return all(finding.severity == NOTE for finding in self.findings)

    def document(self) -> Dict[str, Any]:
        """Return all of it as JSON."""
        manifest = asdict(self.manifest)
        named = (
            "name",
            "version",
            "task",
            "save_mode",
            "hardware",
            "dtype",
            "max_length",
            "shapes",
            "labels",
            "parameters",
        )
        receipt = dict(self.manifest.receipt)
        return {
            "format": FORMAT,
            "path": str(self.listing.path),
            "bytes": self.listing.size,
            **{name: manifest[name] for name in named},
            "in_float32": receipt.get("in_float32", []),
            "source": {
                **{k: v for k, v in manifest["source"].items() if k != "files"},
                "license": receipt.get("license"),
            },
            "signature": {"file": self.signature, "checked_by": self.signer},
            "built_by": {name: manifest["versions"].get(name) for name in ("traceserve", "python")},
            "packages": [asdict(package) for package in self.packages],
            "receipt": receipt or None,
            "worker": {
                "memory_mib": self.needed.memory if self.needed else None,
                "cores": self.needed.cpu if self.needed else None,
                "reasons": list(self.needed.reasons) if self.needed else [],
                "processor_features": list(self.features),
            },
            "files": [asdict(file) for file in self.listing.files],
            "findings": [asdict(finding) for finding in self.findings],
            "passed": self.passed,
        }


def inspect_archive(path: Path, trusted: Optional[Path] = None) -> Inspection:
    """Inspect an archive or an artifact's folder; raises ArchiveError or InvalidManifest for one that cannot be read, and
    SignatureError for one that is not signed by `trusted`, a public key or certificates."""
    with signing.verified([path], trusted) as [file]:
        found = _inspected(file)
    beside = signing.signature_file(path) if path.is_file() else None  # a folder such as "." has no name
    return replace(
        found,
        listing=replace(found.listing, path=path),
        signature=beside.name if beside is not None and beside.is_file() else None,
        signer=str(trusted) if trusted else None,
    )


# A finding's code, and its words about a file that differs from the manifest.
_OF_A_FILE: Dict[str, Callable[[str], Tuple[str, str]]] = {
    MISSING: lambda name: ("missing-file", f"{name} is named in {MANIFEST_FILE} and missing"),
    CHANGED: lambda name: (
        "changed-file",
        f"{name} is not the file that was verified: its SHA-256 differs from {MANIFEST_FILE}",
    ),
    UNHASHED: lambda name: (
        "unhashed-code",
        f"{name} is code without a hash in {MANIFEST_FILE}, as in an archive that was packed by hand",
    ),
    UNKNOWN: lambda name: (
        "unknown-file",
        f"{name} is not named in {MANIFEST_FILE}; remove it, or build the archive again",
    ),
}


def _inspected(path: Path) -> Inspection:
    listing = list_files(path, (SERVING_FILE, ARCHIVER_MANIFEST))
    document = dict(listing.manifest)
    manifest = Manifest.from_json(_resealed(document))
    check_free_form(manifest)
    packages = tuple(packages_of(manifest))
    found = [
        *_of_the_digest(document),
        *_of_the_files(listing, manifest),
        *_of_torchserves_manifest(listing, manifest),
        *_of_the_receipt(manifest),
        *_of_the_source(manifest),
        *_of_the_labels(manifest),
        *_of_the_packages(packages),
        *_of_this_machine(manifest),
        *_of_its_age(document, manifest),
    ]
    needed, wrong = _needed(listing, manifest)
    order = (ERROR, WARNING, NOTE)
    found = sorted([*found, *wrong], key=lambda finding: order.index(finding.severity))
    return Inspection(listing, manifest, packages, needed, _features(manifest), tuple(found))


def _resealed(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the document with a digest that fits, so that one with another can be described too."""
    return sealed(document) if type(document.get("schema")) is int else document


def _of_the_digest(document: Mapping[str, Any]) -> Iterator[InspectionFinding]:
    if document.get(_DIGEST) != _resealed(document).get(_DIGEST):
        yield InspectionFinding(
            ERROR,
            "digest",
            f"{MANIFEST_FILE} was changed after the build: its digest does not fit, so no worker loads it; build the archive "
            "again",
        )


def _of_the_files(listing: Listing, manifest: Manifest) -> Iterator[InspectionFinding]:
    for name, how in differences(listing, manifest):
        yield InspectionFinding(WARNING if how == UNHASHED else ERROR, *_OF_A_FILE[how](name))


def _of_torchserves_manifest(listing: Listing, manifest: Manifest) -> Iterator[InspectionFinding]:
    wrong = wrong_for_torchserve(listing, manifest)
    if wrong:
        yield InspectionFinding(ERROR, "torchserve-manifest", f"it {wrong}")


def _of_the_receipt(manifest: Manifest) -> Iterator[InspectionFinding]:
    receipt = manifest.receipt
    if not receipt:
        yield InspectionFinding(
            ERROR,
            "no-receipt",
            "it has no receipt: its answers were never compared with the original's; build it again",
        )
    elif receipt.get("answers") == 0:
        yield InspectionFinding(
            WARNING,
            "no-answers",
            "none of its answers was compared with the original's: no text fitted; build it again",
        )
    elif not receipt.get("passed"):
        along = receipt.get("along_texts")
        changed = (
            f"{along['tokens_changed']} of {along['tokens']} tokens of the original's texts"
            if along
            else f"{receipt.get('answers_changed', '?')} of {receipt.get('answers', '?')} answers"
        )
        yield InspectionFinding(
            WARNING, "drift", f"--allow-drift exported it although the gate did not pass: {changed} changed"
        )


def _of_the_source(manifest: Manifest) -> Iterator[InspectionFinding]:
    source = manifest.source
    if source.trust_remote_code:
        yield InspectionFinding(
            WARNING,
            "remote-code",
            f"{source.name} brought Python code of its own, which ran in the build (trust_remote_code)",
        )
    foreign = [name for name in manifest.files if name.endswith(_CODE) and not is_our_own(name)]
    if foreign:
        yield InspectionFinding(
            WARNING, "remote-code-inside", f"code of the checkpoint runs in its workers: {', '.join(foreign[:5])}"
        )
    unread = manifest.receipt.get(UNREAD_WEIGHTS)
    if unread:
        yield InspectionFinding(WARNING, "unread-weights", str(unread))
    if not manifest.receipt.get("license"):
        yield InspectionFinding(
            NOTE, "no-license", "the build saw no licence: no model card that names one, and no LICENSE file"
        )
    if source.kind == "hub" and source.revision is None:
        yield InspectionFinding(NOTE, "no-commit", f"the commit of {source.name} is not recorded")


def _of_the_labels(manifest: Manifest) -> Iterator[InspectionFinding]:
    same = same_labels(manifest.labels)
    if same:
        yield InspectionFinding(WARNING, "same-labels", f"{same}; build it again with names by index_to_name")


def _of_the_packages(packages: Tuple[PackageHere, ...]) -> Iterator[InspectionFinding]:
    for each in packages:
        if each.outside(each.built):
            yield InspectionFinding(
                WARNING,
                "built-outside",
                f"it was built with {each.name} {each.built}, outside the tested range {each.tested}",
            )
        if not each.worker:
            continue
        if each.here is None:
            yield InspectionFinding(
                ERROR, "missing-package", f"its worker needs {each.name}, which is not installed here"
            )
        elif each.outside(each.here):
            yield InspectionFinding(
                WARNING, "here-outside", f"{each.name} {each.here} here is outside the tested range {each.tested}"
            )
        elif each.built is not None and _release(each.built) != _release(each.here):
            yield InspectionFinding(
                NOTE,
                "other-version",
                f"{each.name} is {each.here} here, and the answers were compared with {each.built}: run `traceserve verify` on "
                "what serves it",
            )


def _release(version: str) -> str:
    return version.partition("+")[0]


def _of_this_machine(manifest: Manifest) -> Iterator[InspectionFinding]:
    dtype = manifest.dtype
    emulated = not processor.native(dtype) and not openvino.only_weights(manifest)
    if manifest.hardware not in resources.KUBERNETES_RESOURCES and emulated:
        wanted = f"{dtype} is native to processors with one of {', '.join(sorted(processor.NATIVE[dtype]))}; this one has none"
        save_mode = SAVE_MODES.get(manifest.save_mode)
        if dtype in processor.ONLY_NATIVE and not (save_mode is not None and save_mode.int8_right_everywhere):
            yield InspectionFinding(ERROR, "processor", f"{wanted}, and would answer wrong")
        else:
            yield InspectionFinding(WARNING, "processor", f"{wanted}, so answers are right, but slow")
    machine, needed = manifest.runtime.get(aot_inductor.MACHINE), _compiled_for(manifest)
    missing = sorted(set(needed) - processor.instructions())
    if machine is not None and (machine != platform.machine() or missing):
        what = f"lacks {', '.join(missing)}" if machine == platform.machine() else f"is {platform.machine()}"
        yield InspectionFinding(ERROR, "processor", f"it was compiled for a {machine} processor, and this one {what}")


def _compiled_for(manifest: Manifest) -> List[str]:
    return [str(name) for name in manifest.runtime.get(aot_inductor.INSTRUCTIONS, ())]


def _features(manifest: Manifest) -> Tuple[str, ...]:
    return tuple(_compiled_for(manifest) or sorted(processor.NATIVE.get(manifest.dtype, ())))


def _of_its_age(document: Mapping[str, Any], manifest: Manifest) -> Iterator[InspectionFinding]:
    if document["schema"] != SCHEMA:
        yield InspectionFinding(
            NOTE,
            "old-schema",
            f"its manifest has schema {document['schema']}, and builds write {SCHEMA} today; pack it again",
        )
    maker = manifest.versions.get("traceserve")
    if maker != __version__:
        yield InspectionFinding(NOTE, "other-traceserve", f"traceserve {maker} built it, and this is {__version__}")


def _needed(listing: Listing, manifest: Manifest) -> Tuple[Optional[resources.Resources], List[InspectionFinding]]:
    """Return what a worker needs of a machine, by the rules of `traceserve deploy`."""
    if SERVING_FILE not in listing.documents:
        wrong = f"it has no {SERVING_FILE}, so TorchServe would run it with its own defaults"
        return None, [InspectionFinding(WARNING, "no-configuration", wrong)]
    try:
        serving = Serving.from_yaml(listing.documents[SERVING_FILE].decode("utf-8", "replace"))
    except ArchiveError as error:
        return None, [InspectionFinding(ERROR, "configuration", error.message)]
    unpacked = sum(file.size for file in listing.files)
    task = TASKS.get(manifest.task)
    if task is None:
        return None, [InspectionFinding(ERROR, "task", f"its task {manifest.task} is not known here")]
    one = replace(serving, workers=serving.workers or 1)
    described = Described(listing.path, manifest.name, "", listing.size, unpacked, manifest, one, {})
    return resources.needed([described], TORCHSERVE), []
