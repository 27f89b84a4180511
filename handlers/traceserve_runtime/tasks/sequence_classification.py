"""Sequence classification: a text, or a pair of texts, to labels with scores."""

from __future__ import annotations

import math
from typing import Dict, Mapping, Sequence, Tuple

import numpy as np

from traceserve_runtime.explaining.targets import Aim, ExplanationTarget, OutputCell
from traceserve_runtime.json_types import Json, json_objects, number
from traceserve_runtime.runner import Arrays
from traceserve_runtime.tasks.contract import ModelFacts, Request, Task
from traceserve_runtime.tasks.explained import LABEL, label_index
from traceserve_runtime.tasks.parameters import Field, Output, Parameter
from traceserve_runtime.tasks.scores import FUNCTIONS, MOST_MOVED, average, function_to_apply, window_shares
from traceserve_runtime.texts.rows import Row

_REGRESSION = "regression"  # in `Manifest.facts`


class SequenceClassification(Task):
    """`{"label", "score"}` of the best label, or with `top_k` a list of them, best first.

    The scores of a text's windows are averaged.
    """

    name = "sequence_classification"
    auto_model = "AutoModelForSequenceClassification"
    pipeline = "text-classification"
    fields = (
        Field("text", True, "the text to classify"),
        Field("text_pair", False, "the second text, for a model of text pairs"),
    )
    outputs = (Output("logits", per_token=False),)
    parameters = (
        Parameter(
            "top_k", int, "answer with a list of this many labels, best first; null: with all labels", nullable=True
        ),
        Parameter(
            "function_to_apply",
            str,
            "how the model's output becomes scores; by default the model's own function",
            tuple(FUNCTIONS),
        ),
    )
    labelled = True
    explains = (LABEL,)
    gate_parameters = {"top_k": None}
    sample = {"text": "The parcel arrived, but the box was open and a cup is missing."}

    @classmethod
    def defaults(cls, model: ModelFacts) -> Dict[str, object]:
        """Return the function that the pipeline applies to this model's logits."""
        return {"function_to_apply": function_to_apply(model)}

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, object]:
        """Return whether the outputs are values, of which each counts, and not labels, of which the best one does."""
        return {_REGRESSION: True} if model.config.get("problem_type") == "regression" else {}

    def _ranked(
        self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]
    ) -> Tuple[np.ndarray, np.ndarray]:
        """Return all labels' scores, and their numbers, best first."""
        function = FUNCTIONS[self.parameter(request, "function_to_apply")]
        scores = average([function(output["logits"]) for output in outputs], rows)
        # Logits order labels whose large outputs the function maps to the same score.
        logits = average([output["logits"] for output in outputs], rows)
        return scores, np.lexsort((-logits, -scores))

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Json:
        scores, ranked = self._ranked(request, rows, outputs)
        labels = self.manifest.labels
        if not {"top_k"} & {*request.parameters, *self.manifest.parameters}:
            best = int(ranked[0])
            return {"label": labels[best], "score": float(scores[best])}
        return [{"label": labels[i], "score": float(scores[i])} for i in ranked[: self.parameter(request, "top_k")]]

    def target(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> ExplanationTarget:
        """Return a label's logit: the best label's unless the request names one; of several windows, the average."""
        label = request.parameters.get("label")
        labels = self.manifest.labels
        best = int(self._ranked(request, rows, outputs)[1][0])
        chosen = best if label is None else label_index(label, labels)
        cells = (OutputCell("logits", (chosen,)),)
        aims = tuple(Aim(i, cells, share) for i, share in enumerate(window_shares(rows)))
        return ExplanationTarget({"label": labels[chosen]}, aims)

    @property
    def _independent(self) -> bool:
        """Whether a text may have several labels, or none."""
        return bool(self.manifest.parameters.get("function_to_apply") == "sigmoid")

    @property
    def answers_by_column(self) -> bool:
        """Independent labels, and the values of a regression; labels of which one is the best are weighed together."""
        return self._independent or bool(self.manifest.facts.get(_REGRESSION))

    def same(self, answer: Json, other: Json) -> bool:
        """Require the same best label; for independent labels the same ones above 0.5, and a single one's score within a
        twentieth; for a regression, each value within a hundredth."""
        listed = (json_objects(each if isinstance(each, list) else [each]) for each in (answer, other))
        one, two = ([(str(item["label"]), number(item["score"])) for item in each] for each in listed)
        independent = self._independent
        single = len(self.manifest.labels) == 1
        if not independent and (single or self.manifest.facts.get(_REGRESSION)):
            return _alike(dict(one), dict(two))
        if single and abs(one[0][1] - two[0][1]) > MOST_MOVED:
            return False
        if one[0][0] != two[0][0]:
            return False
        if not independent:
            return True
        accepted = [{label for label, score in ranked if score > 0.5} for ranked in (one, two)]
        return accepted[0] == accepted[1]


def _alike(values: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Return whether these are the same labels' values, each within a hundredth."""
    same = (math.isclose(value, others[label], rel_tol=1e-2, abs_tol=1e-3) for label, value in values.items())
    return values.keys() == others.keys() and all(same)
