"""Token classification: a text to its entities, with their offsets."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from traceserve_runtime.errors import InvalidRequest
from traceserve_runtime.explaining.targets import Aim, ExplanationTarget, OutputCell
from traceserve_runtime.json_types import Json, JsonObject, json_objects
from traceserve_runtime.runner import Arrays
from traceserve_runtime.softmax import softmax
from traceserve_runtime.tasks.contract import ModelFacts, Request, Task
from traceserve_runtime.tasks.explained import END_PARAMETER, LABEL, START_PARAMETER, asked_characters, label_index
from traceserve_runtime.tasks.parameters import Field, Output, Parameter, strings
from traceserve_runtime.texts import windows
from traceserve_runtime.texts.rows import Row, Segments

# A word's label from its tokens' scores, (tokens, labels), for the strategies that work on words.
_WORD_SCORES = {
    "first": lambda scores: scores[0],
    "average": lambda scores: scores.mean(axis=0),
    "max": lambda scores: scores[scores.max(axis=-1).argmax()],
}


class _Token(NamedTuple):
    """A token of the text with its offsets; `number` counts special tokens too, `row` is its row of the scores."""

    number: int
    word: str
    start: int
    end: int
    row: int
    continues: bool  # whether it continues the word before


class _Entity(NamedTuple):
    """A labelled token or word."""

    label: str
    score: float
    number: int
    word: str
    start: int
    end: int


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
    # Few of the built-in samples have an entity: a tagger in int8 passes the gate on them, and changes its answers to several
    # of a hundred real sentences (docs/measurements.md).
    auto_int8 = False
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
    explains = (LABEL, START_PARAMETER, END_PARAMETER)
    gate_parameters = {"ignore_labels": ["\0"]}  # leave nothing out
    windows_overlap = True
    sample = {"text": "Ada Lovelace wrote to Charles Babbage from London."}

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, object]:
        """Return the unknown token, which the pipeline replaces by the text itself."""
        return {"unknown_id": model.tokens["unk"][1] if "unk" in model.tokens else None}

    def segments(self, request: Request) -> List[Segments]:
        stride = self.parameter(request, "stride")
        if stride is None:
            return super().segments(request)
        if stride >= self.manifest.max_length:
            raise InvalidRequest(
                f'"stride" is {stride:,}, but a window has {self.manifest.max_length:,} tokens', "parameters.stride"
            )
        return [segments._replace(stride=stride) for segments in super().segments(request)]

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Json:
        tokens, scores = self._tokens(request.inputs["text"], rows, outputs)
        strategy = self.parameter(request, "aggregation_strategy")
        if strategy in _WORD_SCORES:
            entities = [self._word(group, scores, strategy) for group in _words(tokens)]
        else:
            entities = [self._entity(scores[t.row], t.number, t.word, t.start, t.end) for t in tokens]
        ignored = strings(self.parameter(request, "ignore_labels"))
        if strategy == "none":
            return [_written(entity) for entity in entities if entity.label not in ignored]
        return [group for group in self._groups(entities) if group["entity_group"] not in ignored]

    def _tokens(self, text: str, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Tuple[List[_Token], np.ndarray]:
        """Return each token of the text, and all their scores, (tokens, labels)."""
        merged = windows.merge_windows(rows)
        logits = [outputs[window]["logits"][position] for window, position, special in merged if not special]
        scores = softmax(np.stack(logits)) if logits else np.zeros((0, len(self.manifest.labels)), np.float32)
        ids, offsets = [row.encoding.ids for row in rows], [row.encoding.offsets for row in rows]
        tokens: List[_Token] = []
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
            tokens.append(_Token(index, word, start, end, len(tokens), continues))
        return tokens, scores

    def target(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> ExplanationTarget:
        """Return the labels' average logit of the tokens at the characters that the request names, or of the token that
        is an entity most surely; of their own label unless the request names one."""
        text = request.inputs["text"]
        tokens, scores = self._tokens(text, rows, outputs)
        if not tokens:
            raise InvalidRequest("the text has no tokens to explain", "text")
        positions = [(window, position) for window, position, special in windows.merge_windows(rows) if not special]
        label = request.parameters.get("label")
        given = None if label is None else label_index(label, self.manifest.labels)
        chosen = self._chosen(request, tokens, scores, given)
        own = np.sum([scores[token.row] for token in chosen], axis=0)
        if request.parameters.get(START_PARAMETER.name) is None:  # where all tokens are ignored, the nearest entity
            own = np.where(self._ignored(request), -1.0, own)
        best = int(own.argmax()) if given is None else given
        cells: Dict[int, List[OutputCell]] = {}
        for token in chosen:
            window, position = positions[token.row]
            cells.setdefault(window, []).append(OutputCell("logits", (position, best)))
        start, end = chosen[0].start, chosen[-1].end
        name: JsonObject = {
            "label": self.manifest.labels[best],
            "word": text[start:end],
            "start": start,
            "end": end,
        }
        return ExplanationTarget(name, tuple(Aim(row, tuple(each), 1 / len(chosen)) for row, each in cells.items()))

    def _ignored(self, request: Request) -> np.ndarray:
        """Return which labels are ignored, unless that would be all of them."""
        names = strings(self.parameter(request, "ignore_labels"))
        found = np.array([label in names for label in self.manifest.labels])
        return found if not found.all() else ~found

    def _chosen(
        self, request: Request, tokens: Sequence[_Token], scores: np.ndarray, label: Optional[int]
    ) -> List[_Token]:
        """Return the tokens to explain."""
        asked = asked_characters(request)
        if asked is None:
            sure = np.where(self._ignored(request), -1.0, scores).max(axis=1) if label is None else scores[:, label]
            return [tokens[int(sure.argmax())]]
        start, end = asked
        found = [token for token in tokens if token.start < end and token.end > start]
        if not found:
            raise InvalidRequest(f"no token is at the characters {start:,} to {end:,}", "parameters.start")
        return found

    def _entity(self, scores: np.ndarray, number: int, word: str, start: int, end: int) -> _Entity:
        """Label a token or word by its scores, (labels)."""
        best = int(scores.argmax())
        return _Entity(self.manifest.labels[best], float(scores[best]), number, word, start, end)

    def _word(self, tokens: Sequence[_Token], scores: np.ndarray, strategy: str) -> _Entity:
        first, last = tokens[0], tokens[-1]
        own = _WORD_SCORES[strategy](scores[first.row : last.row + 1])
        word = self.tokenizer.join([token.word for token in tokens])
        return self._entity(own, first.number, word, first.start, last.end)

    def _groups(self, entities: Sequence[_Entity]) -> List[JsonObject]:
        """Join neighbours of one kind, except before a label with B-."""
        groups: List[List[_Entity]] = []
        for entity in entities:
            begins, kind = _kind(entity.label)
            if groups and not begins and kind == _kind(groups[-1][-1].label)[1]:
                groups[-1].append(entity)
            else:
                groups.append([entity])
        return [
            {
                "entity_group": group[0].label.split("-", 1)[-1],
                "score": float(np.mean([entity.score for entity in group])),
                "word": self.tokenizer.join([entity.word for entity in group]),
                "start": group[0].start,
                "end": group[-1].end,
            }
            for group in groups
        ]

    def same(self, answer: Json, other: Json) -> bool:
        """Require the same entities at the same offsets."""
        return [_without_score(item) for item in json_objects(answer)] == [
            _without_score(item) for item in json_objects(other)
        ]


def _words(tokens: Sequence[_Token]) -> List[List[_Token]]:
    words: List[List[_Token]] = []
    for token in tokens:
        if words and token.continues:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _kind(label: str) -> Tuple[bool, str]:
    """Return whether a label begins an entity (B-), and its kind."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _written(entity: _Entity) -> JsonObject:
    label, score, number, word, start, end = entity
    return {"entity": label, "score": score, "index": number, "word": word, "start": start, "end": end}


def _without_score(item: JsonObject) -> JsonObject:
    return {key: value for key, value in item.items() if key != "score"}
