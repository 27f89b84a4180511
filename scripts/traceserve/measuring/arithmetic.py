"""The arithmetic of a served model, as its build counted it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Optional

from traceserve_runtime.manifest import Manifest

from traceserve.building.config.dtypes import multiplied
from traceserve.building.config.hardware import HARDWARE
from traceserve.building.products import PRODUCTS_KEY


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of an archive's model: floating-point operations, of which a multiplication and an addition are two."""

    dtype: str
    hardware: str
    token: int  # per token
    pair: int  # per pair of tokens of a row

    def of_a_request(self, tokens: float, rows: float) -> float:
        """Return the operations of a mean request: its tokens in so many rows, special tokens included."""
        return tokens * (self.token + self.pair * tokens / max(1.0, rows))


def arithmetic_of(manifest: Manifest) -> Optional[Arithmetic]:
    """Return what the build counted; None for an archive that does not say, or runs on another chip."""
    counted = manifest.receipt.get(PRODUCTS_KEY)
    hardware = HARDWARE.get(manifest.hardware)
    if not isinstance(counted, Mapping) or hardware is None or hardware.torch_device is None:
        return None
    dtype = multiplied(manifest.dtype, manifest.hardware)
    return Arithmetic(dtype, manifest.hardware, int(counted["token"]), int(counted["pair"]))
