"""The gate's findings and limits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set

import numpy as np
from traceserve_runtime.generation.steps import IN_PARTS

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


# Of a text in a lower precision, see `gate.along`. Two tokens are a near tie if the original prefers the better one by
# no more than this in its logits, so that their probabilities differ by a tenth.
NEAR_TIE = 0.1
# Of an archive's own logits two steps of their dtype are a near tie too: bfloat16 has 8 bits, so at 16 a step is 0.125.
STEPS = {"bfloat16": 1 / 64}
# The largest mean change of the logarithm of the probability of the original's tokens: 2 % of its perplexity. Published:
# 0.1 to 0.4 % for 6 to 8 bits, 1.2 to 3.6 % for 4 (docs/gate.md).
MOST_DRIFT = 0.02
# Of what distinguishes texts in an output that each has one of, in a lower precision: see `outputs.unexplained_variance`.
MOST_UNEXPLAINED = 0.5
VECTOR = "vector"  # the name, among those of outputs, of answers that are one vector
# Of vectors, which are compared with each other: at 0.15 the nearest of 200 texts was another one for half of them, at 0.006
# for a tenth; bfloat16 takes 5e-5 of real models, int8 3e-3 (docs/gate.md).
MOST_UNEXPLAINED_OF_VECTORS = 0.02


@dataclass(frozen=True)
class TokenCounts:
    """The choices along the original's own texts: `tokens` of them, of which `changed` are others than the original's and no
    near ties; `drift` is the sum of what the logarithms of their probabilities fell by."""

    texts: int = 0
    tokens: int = 0
    changed: int = 0
    near_ties: int = 0
    drift: float = 0.0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def mean_drift(self) -> float:
        """By how much a token's logarithm fell on average."""
        return self.drift / max(1, self.tokens)

    @property
    def share_changed(self) -> float:
        """Of the tokens, 0 to 1."""
        return self.changed / max(1, self.tokens)

    def receipt(self) -> Dict[str, Any]:
        """The manifest's record."""
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "tokens_changed": self.changed,
            "near_ties": self.near_ties,
            "mean_drift": finite(round(self.mean_drift, 6)),
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
    unexplained: Dict[str, float] = field(default_factory=dict)  # by output: see `outputs.unexplained_variance`
    of_padding: List[Cell] = field(default_factory=list)  # in the original itself; only in a lower precision
    in_parts: List[Cell] = field(default_factory=list)  # with prompts that are read so; they decide nothing else
    answers: int = 0
    own_answers: int = 0  # to the user's own samples
    changed: List[int] = field(default_factory=list)  # indices of samples, the user's own last
    own_changed: int = 0
    own_refused: int = 0  # of the user's own samples, which are not compared
    own_refusal: str = ""  # why the first of them was
    tokenized_otherwise: List[int] = field(default_factory=list)  # indices of samples
    stopped: bool = False  # too many of the user's answers had changed; the rest was not compared
    along: Optional[TokenCounts] = None  # of texts in a lower precision, which decide instead of `changed`
    own_along: Optional[TokenCounts] = None  # of the user's own samples alone
    astray: List[int] = field(default_factory=list)  # indices of samples whose text its own choices do not give
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
        return _over(self.cells, self.limit)

    @property
    def changed_by_padding(self) -> List[Cell]:
        """The cells where padding changes the original's own outputs, by float32's limit: a lower precision's would hide that
        answers depend on their neighbours."""
        return _over(self.of_padding, LIMITS["float32"])

    @property
    def prompts_in_parts(self) -> bool:
        """Whether prompts may be read in parts, in every variant."""
        cells = [cell for found in self.every for cell in found.in_parts]
        return all(found.in_parts for found in self.every) and not _over(cells, self.limit)

    @property
    def passed(self) -> bool:
        """Whether the artifact answers like the original in every variant."""
        return all(found.alike for found in self.every)

    @property
    def alike(self) -> bool:
        """Whether this variant does."""
        wrong = self.shapes_fail or self.tokenized_otherwise or self.astray
        return not (wrong or self.too_many_changed or self.drifts or self.indistinct)

    @property
    def failing_files(self) -> Set[str]:
        """The files of the variants that failed."""
        return {found.file for found in self.every if not found.alike}

    @property
    def shapes_fail(self) -> bool:
        """Whether some shapes are wrong, so that narrower ones may be right."""
        return bool(self.failure or self.failed or self.changed_by_padding)

    @property
    def padding_changes(self) -> bool:
        """Whether only padded rows are wrong."""
        return self.shapes_fail and not self.failure and all(cell.padded for cell in self.failed)

    @property
    def outputs_differ(self) -> bool:
        """Whether outputs are wrong in some variant, not just answers that were nearly a tie."""
        exact = not self.limit.changed
        return any(found.failure or found.failed or exact and found.changed for found in self.every)

    @property
    def own_decide(self) -> bool:
        """Whether the user's own samples suffice to judge whether too many answers change, or tokens of texts."""
        own = (self.own_along or TokenCounts()).tokens if self._by_token else self.own_answers
        return self.limit.changed * own >= 1

    @property
    def _by_token(self) -> bool:
        """Whether tokens decide: texts may have none that could be judged."""
        return self.along is not None and self.along.tokens > 0

    @property
    def judged(self) -> Optional[TokenCounts]:
        """The tokens that decide: along the user's own texts if these suffice, else along all; None if whole answers
        do."""
        if not self._by_token:
            return None
        return self.own_along if self.own_decide else self.along

    @property
    def drifts(self) -> bool:
        """Whether the original's texts have become likelier or less likely than the limit allows; NaN counts."""
        return self.judged is not None and not abs(self.judged.mean_drift) <= MOST_DRIFT

    @property
    def indistinct(self) -> Dict[str, float]:
        """The outputs, in a lower precision, that keep too little of what distinguishes texts; NaN counts."""
        return {
            output: share
            for output, share in self.unexplained.items()
            if self.limit.changed and not share <= most_unexplained(output)
        }

    @property
    def too_many_changed(self) -> bool:
        """Whether more answers changed than the limit allows."""
        if self.stopped:
            return True
        if self.judged is not None:
            limit = self.limit.changed if self.own_decide else self.limit.changed_elsewhere
            return self.judged.share_changed > limit
        if self.own_decide:
            return self.own_changed > self.limit.changed * self.own_answers
        return len(self.changed) > self.limit.changed_elsewhere * self.answers

    @property
    def share_changed(self) -> float:
        """Of the compared answers, or tokens, 0 to 1."""
        if self.along is not None and self._by_token:
            return self.along.share_changed
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
            "largest_difference": finite(float(np.max([cell.difference for cell in self.cells], initial=0.0))),
            "answers": self.answers,
            "answers_changed": len(self.changed),
            **self._receipt_of_variance(),
            **self._along_texts(),
        }

    def _receipt_of_variance(self) -> Dict[str, Any]:
        """Return the record of what a lower precision's outputs lost of what tells texts apart; nothing for others."""
        if not (self.limit.changed and self.unexplained):
            return {}
        return {"unexplained_variance": {output: finite(share) for output, share in self.unexplained.items()}}

    def _along_texts(self) -> Dict[str, Any]:
        """Return the record of a lower precision's texts; nothing for others."""
        if self.along is None:
            return {}
        own = {} if self.own_along is None else {"own": self.own_along.receipt()}
        return {"along_texts": {**self.along.receipt(), **own}}

    def receipt(self) -> Dict[str, Any]:
        """The manifest's record."""
        return {
            "passed": self.passed,
            "limits": self.limit._asdict(),
            "cells": len(self.cells),
            "batches": sorted({cell.batch for cell in self.cells}),
            "lengths": sorted({cell.length for cell in self.cells}),
            "largest_difference": finite(self.largest_difference),
            "answers": self.answers,
            "answers_changed": len(self.changed),
            "own_answers": self.own_answers,
            "own_answers_changed": self.own_changed,
            **self._receipt_of_refused(),
            "variants": [found.row for found in self.every],
            **self._receipt_of_texts(),
            **self._receipt_of_parts(),
            **self.compared,
        }

    def _receipt_of_refused(self) -> Dict[str, Any]:
        """Return the record of the user's samples that were not compared; nothing if all were."""
        if not self.own_refused:
            return {}
        return {"own_refused": {"samples": self.own_refused, "because": self.own_refusal}}

    def _receipt_of_parts(self) -> Dict[str, Any]:
        """Return the record of prompts that were read in parts; nothing for models that write none."""
        cells = [cell.difference for found in self.every for cell in found.in_parts]
        if not cells:
            return {}
        # Infinite, or NaN, if it could not be run so.
        return {IN_PARTS: {"passed": self.prompts_in_parts, "largest_difference": finite(float(np.max(cells)))}}

    def _receipt_of_texts(self) -> Dict[str, Any]:
        if self.along is None:
            return {}
        limits = {"near_tie": NEAR_TIE, "mean_drift": MOST_DRIFT}
        return {"along_texts": {**self._along_texts()["along_texts"], "limits": limits}}


def finite(value: float) -> Optional[float]:
    """Return a number as a record may hold it: JSON has neither NaN nor infinities."""
    return value if np.isfinite(value) else None


def most_unexplained(output: str) -> float:
    """Return the largest share of an output's variance that a lower precision may lose."""
    return MOST_UNEXPLAINED_OF_VECTORS if output == VECTOR else MOST_UNEXPLAINED


def _over(cells: Sequence[Cell], limit: Limit) -> List[Cell]:
    return [cell for cell in cells if not cell.difference <= limit.difference]


class DriftError(ExportError):
    """The gate found that the artifact does not answer like the original; `findings` says where."""

    def __init__(self, message: str, findings: Findings) -> None:
        super().__init__(message)
        self.findings = findings
