"""Builds that are killed, and builds of one name at once: the earlier archive stays the same bytes, and nothing is half-written.

    python -m campaigns.builds [--moments 50] [--pairs 3] [--seed 0]

A build is interrupted (SIGINT) or killed (SIGKILL) at random moments of its time. Then the archive and the artifact under
their names are the earlier ones, whole, or the new ones, whole; what a killed build left is private, and gone after the next one.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Iterable, List, Sequence, Set

from traceserve.archives.contents import unpack
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import Manifest, sha256

from campaigns.aims import TRACESERVE, Aim, main_of, none_of, tiny_config

SIGNALS = (signal.SIGINT, signal.SIGKILL)
_LONGEST = 600  # seconds of a build
_STARTING = "Fatal Python error: init"  # Python was interrupted while it imported `site`
LEGAL = {
    "SIGINT: 130": "interrupted",
    "SIGINT: 0": "it was done",
    "SIGINT: -2": "before Python listened",
    "SIGINT: 1, as Python started": "likewise",
    "SIGKILL: -9": "killed",
    "SIGKILL: 0": "it was done",
}


class Place:
    """A folder in which x is built, with the environment and temporary folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.artifact, self.archive, self.temporary = (
            folder / "artifacts" / "x",
            folder / "store" / "x.mar",
            folder / "tmp",
        )
        self.temporary.mkdir()
        config = [
            "--config",
            str(tiny_config(folder)),
            "--output",
            str(self.artifact),
            "--store",
            str(folder / "store"),
        ]
        self._command = [*TRACESERVE, "build", "--force", *config]

    def start(self) -> subprocess.Popen[str]:
        variables = {**os.environ, "TMPDIR": str(self.temporary)}
        return subprocess.Popen(
            self._command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def build(self) -> float:
        """Build to the end; returns the seconds."""
        began = time.monotonic()
        process = self.start()
        output, _ = process.communicate(timeout=_LONGEST)
        if process.returncode:
            raise RuntimeError(output)
        return time.monotonic() - began

    def names(self) -> Set[str]:
        """What lies in it, apart from the artifact's and the archive's contents."""
        places = (self.artifact.parent, self.archive.parent, self.temporary)
        return {f"{place.name}/{path.name}" for place in places for path in place.iterdir()}

    def problems(self, scratch: Path) -> List[str]:
        """What is wrong with the archive and the artifact under their names."""
        found = []
        try:
            Manifest.read(self.artifact)
            unpack(self.archive, scratch)
            Manifest.read(scratch)
        except (TraceserveError, OSError) as error:
            found.append(str(error))
        return found


def interrupt(place: Place, number: signal.Signals, seconds: float) -> str:
    """Start a build, send it a signal after so long, and return the signal with the exit status."""
    process = place.start()
    time.sleep(seconds)
    process.send_signal(number)
    output, _ = process.communicate(timeout=_LONGEST)
    return ended(number, process.returncode, output)


def ended(number: signal.Signals, status: int, output: str) -> str:
    """How a build ended after a signal; a status of 1 is that of a failure, unless Python says that it was starting."""
    starting = ", as Python started" if status == 1 and _STARTING in output else ""
    return f"{number.name}: {status}{starting}"


def campaign(options: argparse.Namespace, folder: Path) -> Sequence[Aim]:
    """Build, interrupt, look; then build in pairs."""
    noise, place = random.Random(options.seed), Place(folder)
    place.build()
    usual, good, seconds = place.names(), sha256(place.archive), place.build()
    same_bytes = sha256(place.archive) == good
    changed, broken, left, seen = 0, [], 0, Counter[str]()
    for moment in range(options.moments):
        number = SIGNALS[moment % len(SIGNALS)]
        before = place.names()
        seen[interrupt(place, number, noise.uniform(0, seconds))] += 1
        changed += sha256(place.archive) != good
        broken += place.problems(folder / f"unpacked-{moment}")
        foreign = {name for name in place.names() - usual if not is_private(name)}
        left += number == signal.SIGINT and bool(place.names() - before)
        broken += sorted(foreign)
    after = place.build()
    remains = sorted(place.names() - usual)
    for line in [*broken, *remains]:
        print(line)
    return [
        Aim("the same build twice", "the same bytes", "the same" if same_bytes else "others", same_bytes),
        none_of("interrupted builds after which the archive has other bytes", changed, options.moments),
        none_of("with something half-written under a name", len(broken), options.moments),
        none_of("SIGINT that left anything", int(left), options.moments),
        Aim(
            "exit statuses",
            "; ".join(f"{status}: {why}" for status, why in LEGAL.items()),
            ", ".join(f"{k} {n} times" for k, n in seen.items()) or "-",
            legal(seen),
        ),
        Aim("left after the next build", "nothing", ", ".join(remains) or "nothing", not remains),
        Aim("a build takes", "-", f"{seconds:.1f} s, {after:.1f} s at the end", True),
        *pairs(place, options.pairs, good, folder),
    ]


def legal(seen: Iterable[str]) -> bool:
    """Whether each build ended as it should."""
    return set(seen) <= set(LEGAL)


def pair_of_which_one_is_killed(place: Place, seconds: float, folder: Path) -> Sequence[Aim]:
    """Two builds at once, one of them killed at work: the other one's archive is whole, and nothing else is left."""
    killed, other = place.start(), place.start()
    time.sleep(seconds)
    killed.send_signal(signal.SIGKILL)
    output = other.communicate(timeout=_LONGEST)[0]
    killed.communicate(timeout=_LONGEST)
    problems = [*place.problems(folder / "pair"), *([output] if other.returncode else [])]
    public = sorted(name for name in place.names() if not is_private(name))
    return [
        Aim("killed", "-9", str(killed.returncode), killed.returncode == -9),
        none_of("failed, or something broken", len(problems), 1),
        Aim("left under a name", "the two results and their reports", ", ".join(public), len(public) == 4),
    ]


def is_private(name: str) -> bool:
    """Whether this is a private folder or file of a build, which the next one removes."""
    return Path(name).name.startswith((".x", "traceserve-scratch-"))


def pairs(place: Place, count: int, good: str, folder: Path) -> Sequence[Aim]:
    """Two builds of one name at once: each ends well or says why not, and the archive is a whole one."""
    statuses: Counter[int] = Counter()
    broken: List[str] = []
    changed = 0
    before = place.names()
    for number in range(count):
        both = [place.start(), place.start()]
        outputs = [process.communicate(timeout=_LONGEST)[0] for process in both]
        statuses.update(process.returncode for process in both)
        broken += [output for process, output in zip(both, outputs) if process.returncode or "Traceback" in output]
        broken += place.problems(folder / f"pair-{number}")
        changed += sha256(place.archive) != good
    for line in broken:
        print(line)
    remains = sorted(place.names() - before)
    return [
        none_of("two builds of one name at once: failed, or something broken", len(broken), 2 * count),
        none_of("pairs after which the archive has other bytes", changed, count),
        Aim("left by them", "nothing", ", ".join(remains) or "nothing", not remains),
    ]


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--moments", type=int, default=50, help="at which a build is interrupted [%(default)s]")
    parser.add_argument("--pairs", type=int, default=3, help="of builds at once [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="other moments for another number [%(default)s]")


if __name__ == "__main__":
    sys.exit(main_of(campaign, __doc__, options_of))
