"""Text ranking: a cross-encoder scores documents for a query."""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional, Sequence

import numpy as np

from traceserve_runtime.errors import InvalidRequest, Unsupported
from traceserve_runtime.explaining.targets import Aim, ExplanationTarget, OutputCell
from traceserve_runtime.json_types import Json, json_objects, number
from traceserve_runtime.runner import Arrays
from traceserve_runtime.tasks.contract import ModelFacts, Request, Task, by_part
from traceserve_runtime.tasks.explained import DOCUMENT
from traceserve_runtime.tasks.parameters import Field, Output, Parameter
from traceserve_runtime.tasks.scores import FUNCTIONS, MOST_MOVED, function_to_apply
from traceserve_runtime.texts.rows import Row, Segments

# The activations that sentence-transformers may name.
_ACTIVATIONS = {
    **dict.fromkeys(("torch.nn.modules.activation.Sigmoid", "torch.nn.Sigmoid", "torch.sigmoid"), "sigmoid"),
    **dict.fromkeys(("torch.nn.modules.linear.Identity", "torch.nn.Identity"), "none"),
}
_CLEARLY = 0.1  # by which a better document's logit is the larger: no near tie, as the gate calls two tokens' choice
_SECTION = ("activation_fn", "version")  # the keys that sentence-transformers writes into config.json


class TextRanking(Task):
    """A list of `{"index", "score"}`, one per document, in order; with `sort` or `top_k` best first.

    A score is the text-classification pipeline's for the pair of query and document; a long document gets the
    score of its best window.
    """

    name = "text_ranking"
    auto_model = "AutoModelForSequenceClassification"
    pipeline = "text-classification"
    scores_pairs = True
    fields = (
        Field("query", True, "the search query"),
        Field("documents", True, "the texts to rank", "texts"),
    )
    outputs = (Output("logits", per_token=False),)
    parameters = (
        Parameter("sort", bool, "best first", default=False),
        Parameter("top_k", int, "only this many, best first"),
        Parameter("return_documents", bool, 'return each document\'s "text"', default=False),
        Parameter(
            "function_to_apply",
            str,
            "how the model's output becomes a score; by default the model's own function",
            ("sigmoid", "none"),
        ),
    )
    explains = (DOCUMENT,)
    sample = {
        "query": "When does the train to the coast leave?",
        "documents": [
            "The train to the coast leaves at a quarter past nine from platform four.",
            "Bread is baked every morning before the market opens.",
        ],
    }

    @classmethod
    def defaults(cls, model: ModelFacts) -> Dict[str, object]:
        """Return the function that the pipeline applies; raises Unsupported for a model with several outputs."""
        count = len(model.config["id2label"])
        if count != 1:
            raise Unsupported(f"text_ranking needs a cross-encoder, whose head has one output; this one has {count}")
        return {"function_to_apply": _activation(model) or function_to_apply(model)}

    @classmethod
    def check(cls, inputs: Mapping[str, object]) -> None:
        if not inputs["documents"]:
            raise InvalidRequest("the list is empty: there is nothing to rank", "documents")

    def segments(self, request: Request) -> List[Segments]:
        query = request.inputs["query"]
        return [
            Segments(query, document, ("query", f"documents[{i}]"), cut=1)
            for i, document in enumerate(request.inputs["documents"])
        ]

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Json:
        function = FUNCTIONS[self.parameter(request, "function_to_apply")]
        documents = request.inputs["documents"]
        best = [
            max((output["logits"][:1] for output in own), key=lambda own: float(own[0]))
            for _, own in by_part(rows, outputs)
        ]
        order = list(range(len(documents)))
        top_k = self.parameter(request, "top_k")
        if self.parameter(request, "sort") or top_k is not None:
            # By logits: a sigmoid maps all large ones to 1, and the order would be lost.
            order.sort(key=lambda i: -float(best[i][0]))
        told = self.parameter(request, "return_documents")
        return [
            {"index": i, "score": float(function(best[i])[0]), **({"text": documents[i]} if told else {})}
            for i in order[:top_k]
        ]

    def target(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> ExplanationTarget:
        """Return the score, before any function, of the best document, or of the one that the request names."""
        scores = [float(output["logits"][0]) for output in outputs]
        chosen = request.parameters.get("document")
        count = len(request.inputs["documents"])
        if chosen is not None and chosen >= count:
            raise InvalidRequest(f"there are {count:,} documents, numbered from 0", "parameters.document")
        candidates = [i for i, row in enumerate(rows) if chosen in (None, row.part)]
        best = max(candidates, key=scores.__getitem__)
        return ExplanationTarget({"document": rows[best].part}, (Aim(best, (OutputCell("logits", (0,)),)),))

    def same(self, answer: Json, other: Json) -> bool:
        """Require the same order of documents that differ clearly, and scores within a twentieth."""
        one, two = (
            {number(item["index"]): number(item["score"]) for item in json_objects(each)} for each in (answer, other)
        )
        if len(one) != len(two):
            return False
        ranked = sorted({*one, *two})
        # With `top_k` a document may be in one answer alone: in the other it is no better than the last.
        scores = np.array([[each.get(i, min(each.values())) for i in ranked] for each in (one, two)])
        if (np.abs(scores[0] - scores[1]) > _moved(scores)).any():
            return False
        logits = _logits(scores)
        ahead = logits[:, :, None] - logits[:, None]  # of answer, document, other document
        return not ((ahead[0] > _CLEARLY) & (ahead[1] <= 0) | (ahead[1] > _CLEARLY) & (ahead[0] <= 0)).any()

    def from_texts(self, texts: Sequence[str]) -> List[Request]:
        """Use each text as a query for itself and the next two."""
        return [
            Request({"query": text, "documents": [texts[(i + k) % len(texts)] for k in range(3)]})
            for i, text in enumerate(texts)
            if len(text) < 200
        ]


def _are_sigmoids(scores: np.ndarray) -> bool:
    return bool(scores.min() >= 0 and scores.max() <= 1)


def _moved(scores: np.ndarray) -> np.ndarray:
    """Return by how much a score may differ: a model's outputs by more than their sigmoids, whose slope is a quarter at
    most."""
    return (
        np.full(len(scores[0]), MOST_MOVED)
        if _are_sigmoids(scores)
        else MOST_MOVED * np.maximum(4, np.abs(scores).max(axis=0))
    )


def _logits(scores: np.ndarray) -> np.ndarray:
    """Return the model's outputs of which these are sigmoids; other scores as they are."""
    if not _are_sigmoids(scores):
        return scores
    within = np.clip(scores, 1e-38, 1 - 1e-7)
    return np.asarray(np.log(within / (1 - within)))


def _activation(model: ModelFacts) -> Optional[str]:
    """Return the function that a sentence-transformers cross-encoder names, or None; raises Unsupported.

    sentence-transformers 6 writes it into config_sentence_transformers.json, 4 into a section of config.json, and
    earlier versions into a key of its own there; the first of them wins.
    """
    own = model.read_json("config_sentence_transformers.json") or {}
    section = model.config.get("sentence_transformers") or {}
    unknown = sorted(set(section) - set(_SECTION)) if isinstance(section, dict) else ["sentence_transformers"]
    if unknown:
        raise Unsupported(
            f"config.json's sentence_transformers has {', '.join(unknown)}, which is unknown; remove it if it changes "
            "no score"
        )
    old = "sbert_ce_default_activation_function"
    for value, where in (
        (own.get("activation_fn"), "config_sentence_transformers.json"),
        (section.get("activation_fn"), "config.json's sentence_transformers"),
        (model.config.get(old), f"config.json's {old}"),
    ):
        if value is not None:
            if value not in _ACTIVATIONS:
                raise Unsupported(
                    f"this cross-encoder's scores are made by {value} ({where}), which is not supported; known are "
                    f"{', '.join(_ACTIVATIONS)}"
                )
            return _ACTIVATIONS[value]
    return None
