"""This machine's processor: its native dtypes and its cores."""

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

# A processor with one of these features multiplies matrices of the dtype faster than float32's; Linux's names, for
# x86 and Arm ("bf16", "i8mm"). Without them torch emulates bfloat16: correct, but slower than float32.
NATIVE: Dict[str, FrozenSet[str]] = {
    "bfloat16": frozenset({"amx_bf16", "avx512_bf16", "bf16"}),
    "int8": frozenset({"amx_int8", "avx512_vnni", "avx_vnni", "i8mm"}),
}
# Prefixes of the features that a compiler may use for this processor; names as above.
_INSTRUCTIONS = ("sse", "ssse", "avx", "amx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "gfni") + (
    *("fp", "asimd", "atomics", "sve", "sme", "bf16", "i8mm"),
)
# Without native support torch's results are wrong: its int8 matrix instructions overflow.
ONLY_NATIVE = ("int8",)


def features() -> FrozenSet[str]:
    """Return the processor's features as Linux lists them; empty elsewhere, so that float32 is used."""
    return frozenset((_told("flags", "Features") or "").split())


def instructions() -> FrozenSet[str]:
    """Return the processor features that code compiled for it may need."""
    return frozenset(name for name in features() if name.startswith(_INSTRUCTIONS) and name != "fpu")


def is_x86() -> bool:
    """Return whether this is a 64-bit x86."""
    return platform.machine().lower() in ("x86_64", "amd64")


def native(dtype: str) -> bool:
    """Return whether the processor supports `dtype` natively; float32 always."""
    return dtype not in NATIVE or bool(NATIVE[dtype] & features())


def halves_are_faster() -> bool:
    """Return whether products with weights in float16 are faster than float32's: for few rows and many with AVX2 alone, for
    few, and as fast for many, with AVX-512 (docs/measurements.md)."""
    return is_x86() and "avx2" in features()


def check_dtype(dtype: str) -> None:
    """Raise MissingPackage for a dtype that gives wrong results on this processor; warn if it is only slow."""
    if dtype in ONLY_NATIVE and not native(dtype):
        raise MissingPackage(f'{_needs(dtype)}; build the archive with "dtype": "float32" for it')
    tell_slow(dtype)


def tell_slow(dtype: str) -> None:
    """Warn of a dtype that this processor emulates."""
    if not native(dtype):
        advice = 'answers are right, but slow: build the archive with "dtype": "float32" for it'
        logger.warning("%s; %s", _needs(dtype), advice)


def _needs(dtype: str) -> str:
    return f"{dtype} needs a processor with one of {', '.join(sorted(NATIVE[dtype]))}; this one has none"


def name() -> str:
    """Return the processor's name, if the system has it."""
    told = _told("model name")
    return platform.processor() or platform.machine() if told is None else told


def cores() -> int:
    """Return how many cores this process may use: its affinity, limited by its container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, quota() or bound)


def quota() -> Optional[int]:
    """Return the whole cores that this process's control groups allow, at least one; None without a limit."""
    limits = [limit for limit in map(_limit, _control_groups()) if limit is not None]
    return max(1, int(min(limits))) if limits else None


def _control_groups() -> Iterator[Path]:
    """Yield where the settings of this process's groups and their parents may be; a container sees its own as the
    root."""
    try:
        lines = os.fsdecode(OWN_GROUPS.read_bytes()).splitlines()  # paths of any bytes
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):  # version 2, version 1
            own = PurePosixPath(path.lstrip("/"))
            for root in (GROUPS, GROUPS / "cpu", GROUPS / "cpu,cpuacct"):
                yield from (root / part for part in (own, *own.parents))


def _limit(group: Path) -> Optional[float]:
    """Return how many cores a group's processes may use together, by Linux control groups version 2 or 1."""
    with contextlib.suppress(OSError, ValueError):
        most, period = (group / "cpu.max").read_text().split()
        return int(most) / int(period)
    with contextlib.suppress(OSError, ValueError):
        microseconds, of = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return microseconds / of if microseconds > 0 else None
    return None


def _told(*keys: str) -> Optional[str]:
    """Return Linux's first value under one of these keys."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None
