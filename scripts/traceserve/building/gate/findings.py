"""The gate's findings and limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Set

import numpy as np

from traceserve.errors import ExportError


class Limit(NamedTuple):
    """A dtype's limits: the largest difference of an output, relative to its largest value if that is
    above 1; and the share of answers that may change.

    The user's own samples decide if there are enough: 334 for a share of 0.003. Otherwise all samples do, and
    more may change: the built-in texts are foreign to the model, so it guesses, and many answers are near
    ties. (Measured: six to ten times as many change as for a model's own kind of texts, `docs/measurements.md`.)
    """

    difference: float
    changed: float
    changed_elsewhere: float


LIMITS = {
    "float32": Limit(1e-4, 0.0, 0.0),
    "bfloat16": Limit(0.1, 0.003, 0.015),
    "float16": Limit(0.02, 0.003, 0.015),
    "int8": Limit(0.3, 0.003, 0.015),
}


@dataclass(frozen=True)
class Cell:
    """One cell of the grid, and the largest difference found there, relative as in Limit."""

    batch: int
    length: int
    padded: bool
    output: str
    difference: float


@dataclass
class Findings:
    """The findings on one variant, and on the `others`, if this is the default one."""

    limit: Limit
    file: str = ""
    how: str = ""  # it was run
    device: str = "cpu"
    cells: List[Cell] = field(default_factory=list)
    answers: int = 0
    own_answers: int = 0  # to the user's own samples
    changed: List[int] = field(default_factory=list)  # indices of samples, the user's own last
    own_changed: int = 0
    tokenized_otherwise: List[int] = field(default_factory=list)  # indices of samples
    stopped: bool = False  # too many of the user's answers had changed; the rest was not compared
    failure: Optional[str] = None  # why the artifact could not run
    compared: Dict[str, object] = field(default_factory=dict)  # for the receipt, if not only the artifact was compared
    others: List[Findings] = field(default_factory=list)

    @property
    def variant(self) -> str:
        """The file and how it was run."""
        return ", ".join(filter(None, (self.file, self.how)))

    @property
    def every(self) -> List[Findings]:
        """These findings, and those of each other variant."""
        return [self, *self.others]

    @property
    def failed(self) -> List[Cell]:
        """The cells over the limit; NaN is over it too."""
        return [cell for cell in self.cells if not cell.difference <= self.limit.difference]

    @property
    def passed(self) -> bool:
        """Whether the artifact answers like the original in every variant."""
        return all(found.alike for found in self.every)

    @property
    def alike(self) -> bool:
        """Whether this variant does."""
        return not (self.failure or self.failed or self.tokenized_otherwise or self.too_many_changed)

    @property
    def failing_files(self) -> Set[str]:
        """The files of the variants that failed."""
        return {found.file for found in self.every if not found.alike}

    @property
    def padding_changes(self) -> bool:
        """Whether only padded rows are wrong."""
        return not self.failure and bool(self.failed) and all(cell.padded for cell in self.failed)

    @property
    def outputs_differ(self) -> bool:
        """Whether outputs are wrong in some variant, not just answers that were nearly a tie."""
        exact = not self.limit.changed
        return any(found.failure or found.failed or exact and found.changed for found in self.every)

    @property
    def own_decide(self) -> bool:
        """Whether the user's own samples suffice to judge whether too many answers change."""
        return self.limit.changed * self.own_answers >= 1

    @property
    def too_many_changed(self) -> bool:
        """Whether more answers changed than the limit allows."""
        if self.stopped:
            return True
        if self.own_decide:
            return self.own_changed > self.limit.changed * self.own_answers
        return len(self.changed) > self.limit.changed_elsewhere * self.answers

    @property
    def share_changed(self) -> float:
        """Of the compared answers, 0 to 1."""
        return len(self.changed) / max(1, self.answers)

    @property
    def largest_difference(self) -> float:
        """Over the cells of all variants, relative as in Limit."""
        cells = [cell.difference for found in self.every for cell in found.cells]
        return float(np.max(cells, initial=0.0))  # NaN wins, as it should

    @property
    def row(self) -> Dict[str, Any]:
        """This variant alone, in the receipt's format."""
        return {
            "variant": self.variant,
            "device": self.device,
            "cells": len(self.cells),
            "largest_difference": float(np.max([cell.difference for cell in self.cells], initial=0.0)),
            "answers": self.answers,
            "answers_changed": len(self.changed),
        }

    def receipt(self) -> Dict[str, Any]:
        """The manifest's record."""
        return {
            "passed": self.passed,
            "limits": self.limit._asdict(),
            "cells": len(self.cells),
            "batches": sorted({cell.batch for cell in self.cells}),
            "lengths": sorted({cell.length for cell in self.cells}),
            "largest_difference": self.largest_difference,
            "answers": self.answers,
            "answers_changed": len(self.changed),
            "own_answers": self.own_answers,
            "own_answers_changed": self.own_changed,
            "variants": [found.row for found in self.every],
            **self.compared,
        }


class DriftError(ExportError):
    """The gate found that the artifact does not answer like the original; `findings` says where."""

    def __init__(self, message: str, findings: Findings) -> None:
        super().__init__(message)
        self.findings = findings
