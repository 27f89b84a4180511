"""What a build asks of the gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from traceserve.building.samples import OwnSamples
from traceserve.errors import ConfigError
from traceserve.option_names import option, switch


@dataclass(frozen=True)
class GateOptions:
    """The user's own samples; whether an artifact may drift; whether the samples go into the golden set, and so
    into the archive. Raises ConfigError where there are none to keep."""

    samples: Optional[OwnSamples] = None
    allow_drift: bool = False
    keep_samples: bool = False

    def __post_init__(self) -> None:
        if self.keep_samples and self.samples is None:
            raise ConfigError(
                f"{switch('keep-samples')} keeps your own samples, and none are given; give {option('samples', 'FILE')}, or "
                "leave both out"
            )
