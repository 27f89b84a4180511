"""A full disk: a build and a start end in one line and leave nothing; a server that runs goes on answering.

    python -m campaigns.full_disk [--requests 200]

It mounts a small tmpfs where it may (as root); elsewhere a limit on file sizes stands for the disk, and the
last part is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Iterator, List, Optional, Sequence

from traceserve.errors import ServerError
from traceserve.serving import configuration
from traceserve.serving.instances import Instance

from campaigns.aims import TRACESERVE, Aim, answer_to, archive_of, main_of, none_of, serving, tiny_config

_FILLERS = ("filler", "crumbs")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Optional[Path]]:
    """A file system of this size, or None where none may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def told(arguments: Sequence[str], temporary: Optional[Path], limit: int = 0) -> List[str]:
    """Run a command that has no room; what is wrong with how it ends."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    variables = {**os.environ, **({"TMPDIR": str(temporary)} if temporary else {})}
    result = subprocess.run(
        [*TRACESERVE, *arguments], env=variables, capture_output=True, text=True, preexec_fn=limited if limit else None
    )
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    fine = result.returncode == 1 and len(lines) == 1 and "no space left on the disk of" in lines[0]
    return [] if fine else [f"exit {result.returncode}: {result.stderr[-500:]}"]


def builds(folder: Path) -> Sequence[Aim]:
    """Builds without room: for the artifact, the archive, temporary files."""
    config = str(tiny_config(folder))
    wrong: List[str] = []
    tried, left = 0, 0
    for number, (kind, size) in enumerate(
        (kind, size) for kind in ("output", "store", "TMPDIR") for size in ("200k", "4m")
    ):
        with small_disk(folder / f"disk-{number}", size) as disk:
            if disk is None:
                break
            places = {key: folder / f"{key}-{number}" / "x" for key in ("output", "store")}
            places.update({kind: disk / "x"} if kind in places else {})
            arguments = [
                "build",
                "--config",
                config,
                "--output",
                str(places["output"]),
                "--store",
                str(places["store"]),
            ]
            wrong += told(arguments, disk if kind == "TMPDIR" else None)
            left += sum(path.is_file() for path in disk.rglob("*"))
            tried += 1
    wrong += told(
        ["build", "--config", config, "--output", str(folder / "x"), "--store", str(folder / "s")], None, 100_000
    )
    for line in wrong:
        print(line)
    return [
        none_of("builds without room that do not end in one line", len(wrong), tried + 1),
        none_of("files that they leave there", left, tried),
    ]


def fill(folder: Path) -> None:
    """Write until nothing more can be written."""
    with (folder / _FILLERS[0]).open("wb") as sink:
        try:
            while True:
                sink.write(bytes(1 << 16))
                sink.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    with contextlib.suppress(OSError), (folder / _FILLERS[1]).open("wb", buffering=0) as sink:
        while True:
            sink.write(b"x")


def while_serving(archive: Path, requests: int, folder: Path) -> Sequence[Aim]:
    """Start without room, and run out of it while serving."""
    with small_disk(folder / "small-disk", "300k") as disk:
        if disk is None:
            return []
        wrong = told(["serve", str(archive), "--port", str(configuration.free_ports(1)[0])], disk)
    with small_disk(folder / "serving", "64m") as disk:
        assert disk is not None
        before, tempfile.tempdir = tempfile.tempdir, str(disk)
        try:
            with serving(archive) as instance:
                found = on_a_full_disk(instance, disk, requests)
        finally:
            tempfile.tempdir = before
        left = [path.name for path in disk.iterdir() if path.name not in _FILLERS]
    for line in wrong:
        print(line)
    return [
        none_of("starts without room that do not end in one line", len(wrong), 1),
        *found,
        Aim("left after its end", "nothing", ", ".join(left) or "nothing", not left),
    ]


def on_a_full_disk(instance: Instance, disk: Path, requests: int) -> Sequence[Aim]:
    """Fill the disk under a running server, ask, and make room again."""
    first = answer_to(instance, "The boat is small.")
    fill(disk)
    time.sleep(0.5)
    failed, free = sum(_fails(instance, first) for _ in range(requests)), os.statvfs(disk).f_bavail
    for name in _FILLERS:
        (disk / name).unlink()
    return [
        Aim("blocks free of the running server's disk", "0", str(free), free == 0),
        none_of("answers of a server whose disk is full that fail or differ", failed, requests),
    ]


def _fails(instance: Instance, first: object) -> bool:
    try:
        return answer_to(instance, "The boat is small.") != first
    except ServerError:
        return True


def campaign(options: argparse.Namespace, folder: Path) -> Sequence[Aim]:
    """Both parts."""
    archive = archive_of(options, folder)
    (folder / "own").mkdir()
    return [*builds(folder / "own"), *while_serving(archive, options.requests, folder)]


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=200, help="to the server whose disk is full [%(default)s]")


if __name__ == "__main__":
    sys.exit(main_of(campaign, __doc__, options_of))
