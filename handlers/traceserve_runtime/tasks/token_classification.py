"""Token classification: a text to its entities, with their offsets."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from traceserve_runtime.errors import InvalidRequest
from traceserve_runtime.runner import Arrays
from traceserve_runtime.softmax import softmax
from traceserve_runtime.tasks.contract import ModelFacts, Request, Task
from traceserve_runtime.tasks.parameters import Field, Output, Parameter, strings
from traceserve_runtime.texts import windows
from traceserve_runtime.texts.rows import Row, Segments

# A word's label from its tokens' scores, (tokens, labels), for the strategies that work on words.
_WORD_SCORES = {
    "first": lambda scores: scores[0],
    "average": lambda scores: scores.mean(axis=0),
    "max": lambda scores: scores[scores.max(axis=-1).argmax()],
}


class TokenClassification(Task):
    """A list of `{"entity", "score", "index", "word", "start", "end"}` for each token whose label is not ignored.

    With an aggregation strategy, a list of `{"entity_group", "score", "word", "start", "end"}`, one per entity;
    `start` and `end` are character offsets. A long text is read in overlapping windows; each token's
    scores come from the window where it is farther from the edge, before any aggregation.
    """

    name = "token_classification"
    auto_model = "AutoModelForTokenClassification"
    pipeline = "token-classification"
    fields = (Field("text", True, "the text to label"),)
    outputs = (Output("logits", per_token=True),)
    parameters = (
        Parameter(
            "aggregation_strategy",
            str,
            "from tokens to entities: none; simple joins adjacent tokens of one label; first, average and max label whole words",
            ("none", "simple", "first", "average", "max"),
            default="none",
        ),
        Parameter("ignore_labels", list, "labels to leave out", default=["O"]),
        Parameter(
            "stride", int, "how many tokens the windows of a long text share; by default a quarter of one", least=0
        ),
    )
    labelled = True
    gate_parameters = {"ignore_labels": ["\0"]}  # leave nothing out
    windows_overlap = True
    sample = {"text": "Ada Lovelace wrote to Charles Babbage from London."}

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, Any]:
        """Return the unknown token, which the pipeline replaces by the text itself."""
        return {"unknown_id": model.tokens["unk"][1] if "unk" in model.tokens else None}

    def segments(self, request: Request) -> List[Segments]:
        stride = request.parameters.get("stride")
        if stride is None:
            return super().segments(request)
        if stride >= self.manifest.max_length:
            raise InvalidRequest(
                f'"stride" is {stride:,}, but a window has {self.manifest.max_length:,} tokens', "parameters.stride"
            )
        return [segments._replace(stride=stride) for segments in super().segments(request)]

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Any:
        tokens, scores = self._tokens(request.inputs["text"], rows, outputs)
        strategy = self.parameter(request, "aggregation_strategy")
        if strategy in _WORD_SCORES:
            entities = [self._word(group, scores, strategy) for group in _words(tokens)]
        else:
            entities = [{**self._label(scores[i]), **token} for i, token in enumerate(tokens)]
        ignored = strings(self.parameter(request, "ignore_labels"))
        if strategy == "none":
            keys = ("entity", "score", "index", "word", "start", "end")
            return [{key: e[key] for key in keys} for e in entities if e["entity"] not in ignored]
        return [group for group in self._groups(entities) if group["entity_group"] not in ignored]

    def _tokens(
        self, text: str, rows: Sequence[Row], outputs: Sequence[Arrays]
    ) -> Tuple[List[Dict[str, Any]], np.ndarray]:
        """Return each token of the text, and all their scores, (tokens, labels)."""
        merged = windows.merge_windows(rows)
        logits = [outputs[window]["logits"][position] for window, position, special in merged if not special]
        scores = softmax(np.stack(logits)) if logits else np.zeros((0, len(self.manifest.labels)), np.float32)
        ids, offsets = [row.encoding.ids for row in rows], [row.encoding.offsets for row in rows]
        tokens: List[Dict[str, Any]] = []
        for index, (window, position, special) in enumerate(merged):
            if special:
                continue
            token_id, (start, end) = ids[window][position], offsets[window][position]
            word, written = self.tokenizer.token(token_id), text[start:end]
            if self.tokenizer.marks_subwords:
                continues = len(word) != len(written)
            else:
                continues = start > 0 and " " not in text[start - 1 : start + 1]
            if token_id == self.manifest.facts["unknown_id"]:
                word, continues = written, False
            tokens.append(
                {"index": index, "word": word, "start": start, "end": end, "row": len(tokens), "continues": continues}
            )
        return tokens, scores

    def _label(self, scores: np.ndarray) -> Dict[str, Any]:
        best = int(scores.argmax())
        return {"entity": self.manifest.labels[best], "score": float(scores[best])}

    def _word(self, tokens: List[Dict[str, Any]], scores: np.ndarray, strategy: str) -> Dict[str, Any]:
        own = scores[tokens[0]["row"] : tokens[-1]["row"] + 1]
        word = self.tokenizer.join([token["word"] for token in tokens])
        label = self._label(_WORD_SCORES[strategy](own))
        return {**label, "word": word, "start": tokens[0]["start"], "end": tokens[-1]["end"]}

    def _groups(self, entities: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
        """Join neighbours of one kind, except before a label with B-."""
        groups: List[List[Dict[str, Any]]] = []
        for entity in entities:
            begins, kind = _kind(entity["entity"])
            if groups and not begins and kind == _kind(groups[-1][-1]["entity"])[1]:
                groups[-1].append(entity)
            else:
                groups.append([entity])
        return [
            {
                "entity_group": group[0]["entity"].split("-", 1)[-1],
                "score": float(np.mean([entity["score"] for entity in group])),
                "word": self.tokenizer.join([entity["word"] for entity in group]),
                "start": group[0]["start"],
                "end": group[-1]["end"],
            }
            for group in groups
        ]

    def same(self, answer: Any, other: Any) -> bool:
        """Require the same entities at the same offsets."""
        return [_without_score(item) for item in answer] == [_without_score(item) for item in other]


def _words(tokens: Sequence[Dict[str, Any]]) -> List[List[Dict[str, Any]]]:
    words: List[List[Dict[str, Any]]] = []
    for token in tokens:
        if words and token["continues"]:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _kind(label: str) -> Tuple[bool, str]:
    """Return whether a label begins an entity (B-), and its kind."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _without_score(item: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in item.items() if key != "score"}
