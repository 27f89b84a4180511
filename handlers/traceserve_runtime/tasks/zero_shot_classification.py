"""Zero-shot classification: an entailment model judges a text by labels that it never saw."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple, Union

import numpy as np

from traceserve_runtime.errors import InputTooLong, InvalidRequest, Unsupported
from traceserve_runtime.json_types import Json
from traceserve_runtime.runner import Arrays
from traceserve_runtime.softmax import softmax
from traceserve_runtime.tasks.contract import ModelFacts, Request, Task, TextOrPair, by_part
from traceserve_runtime.tasks.parameters import Field, Output, Parameter
from traceserve_runtime.tasks.scores import average
from traceserve_runtime.texts.rows import Row, Segments

_TEMPLATE = "This example is {}."


class ZeroShotClassification(Task):
    """`{"sequence", "labels", "scores"}`, best first: for each label, whether the text entails it.

    For a text with several windows, their entailments are averaged, weighted by their tokens.
    """

    name = "zero_shot_classification"
    auto_model = "AutoModelForSequenceClassification"
    pipeline = "zero-shot-classification"
    fields = (Field("text", True, "the text to classify"),)
    outputs = (Output("logits", per_token=False),)
    parameters = (
        Parameter("candidate_labels", list, "the labels, as a list or a comma-separated string; required"),
        Parameter(
            "hypothesis_template",
            str,
            "the sentence to judge, with {} for the label",
            default=_TEMPLATE,
        ),
        Parameter("multi_label", bool, "judge each label separately, since several may apply", default=False),
    )
    labelled = True
    sample = {"text": "The parcel arrived, but the box was open and a cup is missing."}
    sample_parameters = {"candidate_labels": ["delivery", "damage", "praise"]}
    gate_parameters = {"candidate_labels": ["a question", "travel", "shopping"]}

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, object]:
        """Return the label for entailment; raises Unsupported without one, and if the checkpoint names two."""
        labels = model.labels
        here = [index for index, label in enumerate(labels) if label.lower().startswith("entail")]
        numbers = (model.config.get("label2id") or {}).items()  # read by the pipeline, and may differ from id2label
        there = [int(index) for label, index in numbers if label.lower().startswith("entail")]
        if here and there and here[0] != there[0] and not model.labels_named:
            raise Unsupported(
                f"in config.json the entailment is label {here[0]} by id2label and label {there[0]} by label2id; "
                "index_to_name can say which label is which"
            )
        entailment = here + there
        if not entailment or len(labels) < 2:
            raise Unsupported(
                f"zero_shot_classification needs a model of entailment, with a label called entailment; this one has "
                f"{', '.join(labels[:5])}; index_to_name can name them"
            )
        # Like the pipeline: the first label is the contradiction, or the last if the first is the entailment.
        return {"entailment": entailment[0], "contradiction": len(labels) - 1 if entailment[0] == 0 else 0}

    @classmethod
    def texts_of(cls, request: Request) -> List[TextOrPair]:
        labels: Any = request.parameters.get("candidate_labels") or cls.gate_parameters["candidate_labels"]
        template = request.parameters.get("hypothesis_template", _TEMPLATE)
        return [(request.inputs["text"], template.replace("{}", label)) for label in _each(labels)]

    def _labels(self, request: Request) -> List[str]:
        value = self.parameter(request, "candidate_labels")
        if value is None:
            raise InvalidRequest(
                '"candidate_labels" is missing: send "parameters": {"candidate_labels": ["...", "..."]}',
                "parameters.candidate_labels",
            )
        labels = _each(value)
        if not labels:
            raise InvalidRequest('"candidate_labels" holds no label', "parameters.candidate_labels")
        most = self.manifest.max_rows
        if len(labels) > most:
            raise InputTooLong(
                f"there are {len(labels):,} labels, each of one row or more; one request may have {most:,} rows",
                "parameters.candidate_labels",
            )
        return labels

    def segments(self, request: Request) -> List[Segments]:
        template = self.parameter(request, "hypothesis_template")
        if "{}" not in template:
            raise InvalidRequest('"hypothesis_template" should hold {} for the label', "parameters.hypothesis_template")
        if not request.inputs["text"]:
            raise InvalidRequest("the text is empty", "text")
        labels = self._labels(request)
        self._check_characters(template, labels)
        return [
            Segments(request.inputs["text"], template.replace("{}", label), ("text", "candidate_labels"), cut=0)
            for label in labels
        ]

    def _check_characters(self, template: str, labels: Sequence[str]) -> None:
        """Raise InputTooLong if the labels in the template are too long, before these texts are made."""
        most = self.tokenizer.limits.characters
        count = template.count("{}")
        characters = sum(len(template) + count * (len(label) - len("{}")) for label in labels)
        if characters > most:
            raise InputTooLong(
                f"the labels in the template have {characters:,} characters together; one request may have {most:,}; "
                "shorten them",
                "parameters.hypothesis_template",
            )

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Json:
        labels = self._labels(request)
        facts = self.manifest.facts
        logits = np.stack(
            [average([output["logits"] for output in own], list(windows)) for windows, own in by_part(rows, outputs)]
        )
        if self.parameter(request, "multi_label") or len(labels) == 1:
            scores = softmax(logits[:, [facts["contradiction"], facts["entailment"]]])[:, 1]
            ranks = logits[:, facts["entailment"]] - logits[:, facts["contradiction"]]
        else:
            ranks = logits[:, facts["entailment"]]
            scores = softmax(ranks)
        order = np.lexsort((ranks, scores))[::-1]  # equal scores, such as 1, by their logits
        return {
            "sequence": request.inputs["text"],
            "labels": [labels[i] for i in order],
            "scores": scores[order].tolist(),
        }

    def same(self, answer: Json, other: Json) -> bool:
        """Require the same best label, except for ties."""
        one, two = _ranked_labels(answer), _ranked_labels(other)
        tied = next(score for label, score in one if label == two[0][0])
        return one[0][1] - tied < 1e-5

    def from_texts(self, texts: Sequence[str]) -> List[Request]:
        return [request for request in super().from_texts(texts) if request.inputs["text"]]


def _each(labels: Union[str, List[str]]) -> List[str]:
    """Return the labels, like the pipeline: only comma-separated ones are stripped, and dropped if blank."""
    return [label.strip() for label in labels.split(",") if label.strip()] if isinstance(labels, str) else labels


def _ranked_labels(answer: Json) -> List[Tuple[str, float]]:
    """Return an answer's labels and their scores, best first."""
    if not isinstance(answer, dict):
        raise TypeError(f"an object is needed, not {type(answer).__name__}")
    return list(zip(answer["labels"], answer["scores"]))
