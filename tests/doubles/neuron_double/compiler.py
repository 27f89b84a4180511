"""The steps of both compilers before and after the graph itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Optional


def check_torch(package: str) -> None:
    """Fail like a library linked against another torch."""
    import torch

    wanted = os.environ.get("NEURON_DOUBLE_TORCH", "")
    if not torch.__version__.startswith(wanted):
        raise OSError(f"{package}/lib/libtorchneuron.so: undefined symbol: _ZN3c106detail14torchCheckFail")


def outcome() -> str:
    return os.environ.get("NEURON_DOUBLE_COMPILER", "")


def share() -> float:
    """Return the share of operators that the compiler places."""
    return float(outcome().partition("=")[2]) if outcome().startswith("share=") else 1.0


def run(workdir: Optional[str], timeout: Optional[float]) -> None:
    """Wait for a compilation's time, and write a log; raises subprocess.TimeoutExpired."""
    if workdir is not None:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        Path(workdir, "log-neuron-cc.txt").write_text(
            "Compiler status " + ("ERROR" if outcome() == "fails" else "PASS")
        )
    seconds = float(os.environ.get("NEURON_DOUBLE_SECONDS", "0"))
    if seconds:
        subprocess.run([sys.executable, "-c", f"import time; time.sleep({seconds})"], timeout=timeout, check=True)
