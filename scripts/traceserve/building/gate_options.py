"""What a build asks of the gate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from traceserve.errors import ConfigError


@dataclass(frozen=True)
class GateOptions:
    """The file of the user's own samples; whether an artifact may drift; whether the samples go into the golden set, and so
    into the archive. Raises ConfigError where there are none to keep."""

    samples: Optional[Path] = None
    allow_drift: bool = False
    keep_samples: bool = False

    def __post_init__(self) -> None:
        if self.keep_samples and self.samples is None:
            raise ConfigError(
                "--keep-samples keeps the samples of --samples FILE, and there is none; give it, or leave both out"
            )
