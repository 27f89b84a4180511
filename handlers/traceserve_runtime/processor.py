"""What this machine's processor does natively, and which dtypes gain by it."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from pathlib import Path, PurePosixPath
from typing import Dict, FrozenSet, Iterator, Optional

from traceserve_runtime.errors import MissingPackage

logger = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

# A processor with one of these multiplies matrices of the dtype faster than those of float32; as Linux names them, on
# x86 and on Arm ("bf16", "i8mm"). Without them torch emulates bfloat16, which is right, but slower than float32.
NATIVE: Dict[str, FrozenSet[str]] = {
    "bfloat16": frozenset({"amx_bf16", "avx512_bf16", "bf16"}),
    "int8": frozenset({"amx_int8", "avx512_vnni", "avx_vnni", "i8mm"}),
}
# The beginnings of what a compiler may use where it compiles for this very processor; as above.
_INSTRUCTIONS = ("sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "gfni") + (
    *("fp", "asimd", "atomics", "sve", "sme", "bf16", "i8mm"),
)
# What torch gets wrong without them: it multiplies matrices of int8 by instructions that overflow.
ONLY_NATIVE = ("int8",)


def features() -> FrozenSet[str]:
    """The processor's features as Linux tells them; nothing elsewhere, so that float32 is taken there."""
    return frozenset((_told("flags", "Features") or "").split())


def instructions() -> FrozenSet[str]:
    """Those of the processor's features that code compiled for it may need."""
    return frozenset(name for name in features() if name.startswith(_INSTRUCTIONS) and name != "fpu")


def is_x86() -> bool:
    """Whether this is an x86 of 64 bits."""
    return platform.machine().lower() in ("x86_64", "amd64")


def native(dtype: str) -> bool:
    """Whether the processor computes in `dtype` by itself; float32 always."""
    return dtype not in NATIVE or bool(NATIVE[dtype] & features())


def check(dtype: str) -> None:
    """Raise MissingPackage for a dtype that would be wrong on this processor; tell what would only be slow."""
    if dtype in ONLY_NATIVE and not native(dtype):
        raise MissingPackage(f'{_needs(dtype)}; build the archive with "dtype": "float32" for it')
    tell_slow(dtype)


def tell_slow(dtype: str) -> None:
    """Log what this processor computes rightly, but not by itself."""
    if not native(dtype):
        advice = 'answers are right, but slow: build the archive with "dtype": "float32" for it'
        logger.warning("%s; %s", _needs(dtype), advice)


def _needs(dtype: str) -> str:
    return f"{dtype} needs a processor with one of {', '.join(sorted(NATIVE[dtype]))}; this one has none"


def name() -> str:
    """The processor's name, as far as the system tells it."""
    told = _told("model name")
    return platform.processor() or platform.machine() if told is None else told


def cores() -> int:
    """How many cores this process may use: those that it is bound to, and no more than its container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, quota() or bound)


def quota() -> Optional[int]:
    """The cores that this process's control groups leave it, whole ones and at least one; None without a limit."""
    limits = [limit for limit in map(_limit, _control_groups()) if limit is not None]
    return max(1, int(min(limits))) if limits else None


def _control_groups() -> Iterator[Path]:
    """Where this process's groups and those around them may have their settings; a container sees its own as the root."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):  # of version 2, of version 1
            own = PurePosixPath(path.lstrip("/"))
            for root in (GROUPS, GROUPS / "cpu", GROUPS / "cpu,cpuacct"):
                yield from (root / part for part in (own, *own.parents))


def _limit(group: Path) -> Optional[float]:
    """The cores that a group's processes may use together, by version 2 or 1 of Linux's control groups."""
    with contextlib.suppress(OSError, ValueError):
        most, period = (group / "cpu.max").read_text().split()
        return int(most) / int(period)
    with contextlib.suppress(OSError, ValueError):
        microseconds, of = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return microseconds / of if microseconds > 0 else None
    return None


def _told(*keys: str) -> Optional[str]:
    """What Linux tells first under one of these keys."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None
