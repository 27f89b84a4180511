"""The machine's cores: each belongs to the process that holds its file's lock, until that process ends."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from typing import IO, List, Optional

# The message of Neuron's runtime, both without cores and if they are taken.
NOT_INITIALIZED = (
    "The PyTorch Neuron Runtime could not be initialized. Neuron Driver issues are logged\n"
    "to your system logs. See the Neuron Runtime's troubleshooting guide for help on this\n"
    "topic: https://awsdocs-neuron.readthedocs-hosted.com/en/latest/"
)


class _Claim:
    """The locks that this process holds."""

    def __init__(self) -> None:
        self.process: Optional[int] = None
        self.files: List[IO[str]] = []


_claim = _Claim()


def count() -> int:
    return int(os.environ.get("NEURON_DOUBLE_CORES", "4"))


def initialize() -> None:
    """Claim the cores in the environment, once; raises the runtime's RuntimeError."""
    if _claim.process is not None:
        return
    if not count():
        _fail("TDRV:tdrv_get_dev_info                       No neuron device available")
    visible = _visible()
    wanted = len(visible) if _names_cores() else int(os.environ.get("NEURON_RT_NUM_CORES", "0")) or len(visible)
    claimed: List[IO[str]] = []
    for core in visible:
        file = None if len(claimed) == wanted else _lock(core)
        if file is not None:
            claimed.append(file)
    if len(claimed) < wanted:
        for file in claimed:
            file.close()
        _fail(
            "NRT:nrt_allocate_neuron_cores               "
            f"NeuronCore(s) not available - Requested:{wanted} Available:{len(claimed)}"
        )
    _claim.process, _claim.files = os.getpid(), claimed


def check() -> None:
    """Raise RuntimeError unless this very process initialized the runtime: it does not survive a fork."""
    if _claim.process != os.getpid():
        raise RuntimeError("the Neuron runtime was not initialized by this process")


def release() -> None:
    """Release the cores, as at the process's end."""
    for file in _claim.files:
        file.close()
    _claim.process, _claim.files = None, []


def owners() -> List[int]:
    """Return the processes that own a core."""
    found = []
    for core in range(count()):
        file = _lock(core)
        if file is None:
            text = _path(core).read_text().strip()
            found.append(int(text) if text else 0)
        else:
            file.close()
    return found


def _names_cores() -> bool:
    return bool(os.environ.get("NEURON_RT_VISIBLE_CORES"))


def _visible() -> List[int]:
    if not _names_cores():
        return list(range(count()))
    cores = []
    for part in os.environ["NEURON_RT_VISIBLE_CORES"].split(","):
        first, _, last = part.partition("-")
        cores += range(int(first), int(last or first) + 1)
    return cores


def _path(core: int) -> Path:
    folder = Path(os.environ.get("NEURON_DOUBLE_FOLDER", "/tmp/neuron-double"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"core-{core}"


def _lock(core: int) -> Optional[IO[str]]:
    """Return the open file whose lock is the core, with this process's id; None if another process has it."""
    if core >= count():
        return None
    file = _path(core).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _fail(line: str) -> None:
    print(f"ERROR  {line}", file=sys.stderr, flush=True)
    raise RuntimeError(NOT_INITIALIZED)
