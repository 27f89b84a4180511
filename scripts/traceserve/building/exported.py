"""The result of an export: the chosen artifact, the candidates, and the report."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Dict, Optional, Tuple

from traceserve_runtime import processor
from traceserve_runtime.manifest import Manifest

from traceserve.building.gate.findings import Findings, finite


@dataclass(frozen=True)
class Candidate:
    """A candidate dtype; without findings it could not be written, and `refused` says why."""

    dtype: str
    findings: Optional[Findings]
    refused: str = ""
    size: int = 0  # of the artifact, in bytes

    def receipt(self) -> Dict[str, object]:
        """Return the manifest's record: nothing that differs from run to run."""
        found = self.findings
        return {
            "dtype": self.dtype,
            "passed": found is not None and found.passed,
            "answers": found.answers if found else 0,
            "answers_changed": len(found.changed) if found else 0,
            "own_answers": found.own_answers if found else 0,
            "own_answers_changed": found.own_changed if found else 0,
            **({"own_refused": found.own_refused} if found and found.own_refused else {}),
            "largest_difference": finite(found.largest_difference) if found else None,
            "refused": self.refused,
            **({"along_texts": found.row["along_texts"]} if found and found.along is not None else {}),
        }


@dataclass(frozen=True)
class Compared:
    """The float32 artifact of another save mode, whose speed is compared with the one that was taken."""

    save_mode: str
    speed: float  # requests/s here
    size: int  # in bytes
    own_speed: float  # of the one that was taken, requests/s here

    def report(self) -> Dict[str, object]:
        """Return it in the candidates' format."""
        return {"save_mode": self.save_mode, "requests_per_second": self.speed, "bytes": self.size}


@dataclass(frozen=True)
class Exported:
    """The results, for the final table."""

    manifest: Manifest
    findings: Findings
    parameters: int  # of the model
    note: Optional[str]  # on the checkpoint, and on what this machine lacks
    task_found: str  # the evidence for the task; empty if configured
    candidates: Tuple[Candidate, ...]
    compared: Optional[Compared] = None
    golden_p50: Optional[float] = None  # milliseconds, of the golden set's requests in this process
    save_mode_because: str = ""  # why `auto` took the save mode; empty if configured

    def speed_of(self, candidate: Candidate) -> Optional[float]:
        """Return the requests/s here of the one that was taken, if it was compared with another save mode."""
        taken = candidate.dtype == self.manifest.dtype
        return self.compared.own_speed if self.compared and taken else None

    def report(self) -> Dict[str, object]:
        """Return the measurements; they differ from run to run, so they are stored beside the artifact, not in it."""
        return {
            "name": self.manifest.name,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "processor": processor.name(),
            "cores": processor.cores(),
            "versions": self.manifest.versions,
            "chosen": self.manifest.dtype,
            "golden_p50_ms": self.golden_p50,
            "candidates": [
                {**candidate.receipt(), "requests_per_second": self.speed_of(candidate), "bytes": candidate.size}
                for candidate in self.candidates
            ],
            "compared_with": self.compared.report() if self.compared else None,
            "note": self.note,
            **({"save_mode_because": self.save_mode_because} if self.save_mode_because else {}),
        }
