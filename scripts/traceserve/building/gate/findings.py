"""What the gate found, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Set

import numpy as np

from traceserve.errors import ExportError


class Limit(NamedTuple):
    """What is allowed of a dtype: the largest difference of an output, relative to its largest value where that is
    above 1; and the share of answers that change.

    The user's own samples decide where they are enough to tell: 334 for a share of 0.003. Otherwise all samples do, and
    more may change: the built-in texts are not of the model's kind, so that it guesses at them, and many answers are near
    ties. (Measured: six to ten times as many of them change as of the texts that a model is for, `docs/measurements.md`.)
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
    """One place of the grid and the largest difference found there, relative as Limit says."""

    batch: int
    length: int
    padded: bool
    output: str
    difference: float


@dataclass
class Findings:
    """What the gate found of one variant; and of the `others`, where this is the one that is usual here."""

    limit: Limit
    file: str = ""
    how: str = ""  # it was run
    device: str = "cpu"
    cells: List[Cell] = field(default_factory=list)
    answers: int = 0
    own_answers: int = 0  # of these, to the user's own samples
    changed: List[int] = field(default_factory=list)  # of the samples, the user's own last
    own_changed: int = 0
    tokenized_otherwise: List[int] = field(default_factory=list)  # of the samples
    stopped: bool = False  # more of the user's answers had changed than may, and the rest was not compared
    failure: Optional[str] = None  # why the artifact could not be run at all
    compared: Dict[str, Any] = field(default_factory=dict)  # for the receipt, where it was not the artifact alone
    others: List[Findings] = field(default_factory=list)

    @property
    def variant(self) -> str:
        """The file and how it was run."""
        return ", ".join(filter(None, (self.file, self.how)))

    @property
    def every(self) -> List[Findings]:
        """These, and those of each other variant."""
        return [self, *self.others]

    @property
    def failed(self) -> List[Cell]:
        """The cells over the limit; a difference that is no number is over it too."""
        return [cell for cell in self.cells if not cell.difference <= self.limit.difference]

    @property
    def passed(self) -> bool:
        """Whether the artifact answers as the original does, in every variant."""
        return all(found.alike for found in self.every)

    @property
    def alike(self) -> bool:
        """Whether this variant does."""
        return not (self.failure or self.failed or self.tokenized_otherwise or self.too_many_changed)

    @property
    def failing_files(self) -> Set[str]:
        """The files of the variants that do not."""
        return {found.file for found in self.every if not found.alike}

    @property
    def padding_changes(self) -> bool:
        """Whether nothing but padded rows is wrong."""
        return not self.failure and bool(self.failed) and all(cell.padded for cell in self.failed)

    @property
    def outputs_differ(self) -> bool:
        """Whether numbers are wrong in some variant, and not just answers another where they were nearly a tie."""
        exact = not self.limit.changed
        return any(found.failure or found.failed or exact and found.changed for found in self.every)

    @property
    def own_decide(self) -> bool:
        """Whether the user's own samples are enough to tell whether too many answers change."""
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
        """Of the answers that were compared, 0 to 1."""
        return len(self.changed) / max(1, self.answers)

    @property
    def largest_difference(self) -> float:
        """Over the cells of all variants, relative as Limit says."""
        cells = [cell.difference for found in self.every for cell in found.cells]
        return float(np.max(cells, initial=0.0))  # NaN prevails, as it should

    @property
    def row(self) -> Dict[str, Any]:
        """This variant alone, as the receipt lists it."""
        return {
            "variant": self.variant,
            "device": self.device,
            "cells": len(self.cells),
            "largest_difference": float(np.max([cell.difference for cell in self.cells], initial=0.0)),
            "answers": self.answers,
            "answers_changed": len(self.changed),
        }

    def receipt(self) -> Dict[str, Any]:
        """What the manifest records."""
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
    """The gate found that the artifact does not answer as the original does; `findings` says where."""

    def __init__(self, message: str, findings: Findings) -> None:
        super().__init__(message)
        self.findings = findings
