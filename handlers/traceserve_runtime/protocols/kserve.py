"""KServe V1: `{"instances": [...], "parameters": {...}}`, answered with `{"predictions": [...]}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from traceserve_runtime.json_types import Json
from traceserve_runtime.protocols.contract import Served
from traceserve_runtime.protocols.native import Plain


@dataclass(frozen=True)
class Instances(Plain):
    """KServe V1."""

    is_list: bool = True

    def document(self, answers: Sequence[Json], served: Served) -> Json:
        return {"predictions": list(answers)}
