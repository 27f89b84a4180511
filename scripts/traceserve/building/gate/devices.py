"""The devices of this machine for the gate's comparisons."""

from __future__ import annotations

from typing import Tuple

import torch

from traceserve.building.config.hardware import HARDWARE


def at_hand(hardware: str) -> Tuple[str, ...]:
    """Return the available devices on which a worker may run an archive for this hardware; one of each kind."""
    other = HARDWARE[hardware].beside_cpu
    return ("cpu", f"{other}:0") if other and torch.cuda.is_available() else ("cpu",)
