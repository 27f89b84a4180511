"""Question answering: a question and a context to the part of the context that answers it."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from traceserve_runtime.errors import InvalidRequest
from traceserve_runtime.explaining.targets import Aim, ExplanationTarget, OutputCell
from traceserve_runtime.json_types import Json, JsonObject, json_objects, number
from traceserve_runtime.largest import largest
from traceserve_runtime.runner import Arrays
from traceserve_runtime.softmax import softmax
from traceserve_runtime.tasks.contract import ModelFacts, Request, Task
from traceserve_runtime.tasks.explained import END_PARAMETER, START_PARAMETER, asked_characters
from traceserve_runtime.tasks.parameters import Field, Output, Parameter
from traceserve_runtime.texts.rows import Row, Segments

_LONGEST_WINDOW = 384  # the pipeline's default
_LONGEST_STRIDE = 128


class _Span(NamedTuple):
    start: int  # positions in the row
    end: int
    score: float
    legal: bool  # whether it lies in the context and within the requested length


class _Characters:
    """The character offsets in the context of a window's spans, widened to words if these are known and `to_words`."""

    def __init__(self, row: Row, positions: Sequence[int], to_words: bool) -> None:
        self._offsets = row.encoding.offsets
        self._words: Sequence[Optional[int]] = row.encoding.word_ids if to_words else [None] * row.length
        known = [position for position in positions if self._words[position] is not None]
        self._begins = {self._words[position]: self._offsets[position][0] for position in reversed(known)}
        self._ends = {self._words[position]: self._offsets[position][1] for position in known}

    def of(self, span: _Span) -> Tuple[int, int]:
        """Return where a span begins and ends."""
        begin, end = self._begins.get(self._words[span.start]), self._ends.get(self._words[span.end])
        if begin is None or end is None:
            return self._offsets[span.start][0], self._offsets[span.end][1]
        return begin, end


class QuestionAnswering(Task):
    """`{"score", "start", "end", "answer"}` of the best answer, or with `top_k` a list of them, best first.

    `start` and `end` are character offsets in the context. A long context is read in windows that overlap by
    `doc_stride` tokens; the best answers of all windows are returned, with the scores of equal ones added.
    """

    name = "question_answering"
    auto_model = "AutoModelForQuestionAnswering"
    pipeline = "question-answering"
    fields = (
        Field("question", True, "the question"),
        Field("context", True, "the text that holds the answer"),
    )
    outputs = (Output("start_logits", per_token=True), Output("end_logits", per_token=True))
    parameters = (
        Parameter("top_k", int, "how many answers to return; more than one make a list", most=1000, default=1),
        Parameter("doc_stride", int, "how many tokens adjacent windows share; by default 128, or half a window"),
        Parameter("max_answer_len", int, "the longest answer, in tokens", default=15),
        Parameter("max_seq_len", int, "the longest window, in tokens; by default 384, or max_length", least=16),
        Parameter("handle_impossible_answer", bool, "whether an empty answer (none found) is allowed", default=False),
        Parameter("align_to_words", bool, "widen an answer to whole words", default=True),
    )
    explains = (START_PARAMETER, END_PARAMETER)
    sample = {
        "question": "When does the train leave?",
        "context": "The train to the coast leaves at a quarter past nine from platform four.",
    }

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, object]:
        """Return the token that means "no answer" in some models, and the pipeline's order, by the tokenizer's
        padding."""
        return {
            "cls_id": model.tokens["cls"][1] if "cls" in model.tokens else None,
            "question_first": model.padding_side == "right",
        }

    @classmethod
    def check(cls, inputs: Mapping[str, object]) -> None:
        for name in ("question", "context"):
            if not inputs[name]:
                raise InvalidRequest(f"the {name} is empty", name)

    @property
    def _question_first(self) -> bool:
        first: bool = self.manifest.facts.get("question_first", self.manifest.tokenizer.padding_side == "right")
        return first

    def segments(self, request: Request) -> List[Segments]:
        window = self.parameter(request, "max_seq_len") or _LONGEST_WINDOW
        window = min(window, self.manifest.max_length)
        stride = self.parameter(request, "doc_stride") or min(window // 2, _LONGEST_STRIDE)
        if stride >= window:
            raise InvalidRequest(f'"doc_stride" is {stride}, but a window has {window} tokens', "parameters.doc_stride")
        names = ("question", "context") if self._question_first else ("context", "question")
        texts = [request.inputs[name] for name in names]
        cut = int(self._question_first)
        return [Segments(texts[0], texts[1], names, limit=window, cut=cut, stride=stride, full=True)]

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Json:
        impossible = self.parameter(request, "handle_impossible_answer")
        top_k = self.parameter(request, "top_k")
        context = request.inputs["context"]
        answers: Dict[str, Dict[str, Any]] = {}
        told_by_pipeline = set()
        null_scores = []
        for row, output in zip(rows, outputs):
            positions = row.positions(int(self._question_first))
            spans, null_score = self._spans(request, row, positions, output)
            null_scores.append(null_score)
            characters = _Characters(row, positions, self.parameter(request, "align_to_words"))
            for span in spans:
                start, end = characters.of(span)
                text = context[start:end]
                told_by_pipeline.add(text.lower())
                if not span.legal:
                    continue
                if text.lower() in answers:
                    answers[text.lower()]["score"] += span.score
                else:
                    answers[text.lower()] = {"score": span.score, "start": start, "end": end, "answer": text}
        listed = list(answers.values())
        if impossible:
            listed.append({"score": min(null_scores), "start": 0, "end": 0, "answer": ""})
        listed = sorted(listed, key=lambda answer: -answer["score"])[:top_k]
        if not answers:  # a blank context
            return {"score": min(null_scores) if impossible else 0.0, "start": 0, "end": 0, "answer": ""}
        return listed if min(top_k, len(told_by_pipeline) + impossible) > 1 else listed[0]

    def _spans(self, request: Request, row: Row, positions: Sequence[int], output: Arrays) -> Tuple[List[_Span], float]:
        """Return the best spans of one window, and its "no answer" score.

        If there are fewer than `top_k`, the pipeline fills its list with others of score 0, in arbitrary order. They
        are not answers, and not legal here; but their presence makes an answer a list.
        """
        top_k, longest = self.parameter(request, "top_k"), self.parameter(request, "max_answer_len")
        if self.parameter(request, "align_to_words"):
            top_k = 2 * top_k + 10  # several spans may be merged
        inside = np.zeros(row.length, dtype=bool)
        inside[list(positions)] = True
        allowed = inside | (np.array(row.encoding.ids) == self.manifest.facts["cls_id"])
        start, end = (softmax(np.where(allowed, output[name], np.float32(-10000.0))) for name in self.manifest.outputs)
        null_score = float(start[0] * end[0])
        start[0] = end[0] = 0
        spans = []
        for first, last, score in _best(start, end, longest, top_k):
            if allowed[first] and allowed[last]:
                legal = bool(inside[first] and inside[last]) and first <= last < first + longest
                spans.append(_Span(first, last, score, legal))
        return spans, null_score

    def target(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> ExplanationTarget:
        """Return the sum of the start's and the end's logits of the best answer, or of the characters of the context that
        the request names; of several windows, in the one that is surest."""
        context = request.inputs["context"]
        asked = asked_characters(request)
        if asked is not None:
            start, end = asked
        else:
            answer = self.decode(request, rows, outputs)
            best = json_objects(answer if isinstance(answer, list) else [answer])[0]
            start, end = int(number(best["start"])), int(number(best["end"]))
        name: JsonObject = {"answer": context[start:end], "start": start, "end": end}
        if start == end:  # no answer: the first token stands for it
            spans = [(i, 0, 0) for i in range(len(rows))]
        else:
            found = [(i, self._tokens_at(row, start, end)) for i, row in enumerate(rows)]
            most = max(len(tokens) for _, tokens in found)
            spans = [(i, tokens[0], tokens[-1]) for i, tokens in found if tokens and len(tokens) == most]
        if not spans:
            raise InvalidRequest(
                f"no window of the context has the characters {start:,} to {end:,}", "parameters.start"
            )
        first, last = self.manifest.outputs
        row, begin, stop = max(spans, key=lambda p: float(outputs[p[0]][first][p[1]] + outputs[p[0]][last][p[2]]))
        cells = (OutputCell(first, (begin,)), OutputCell(last, (stop,)))
        return ExplanationTarget(name, (Aim(row, cells),), "start logit + end logit")

    def _tokens_at(self, row: Row, start: int, end: int) -> List[int]:
        """Return the positions in a row of the tokens at these characters of the context."""
        offsets, own = row.encoding.offsets, row.positions(int(self._question_first))
        return [position for position in own if offsets[position][0] < end and offsets[position][1] > start]

    def same(self, answer: Json, other: Json) -> bool:
        """Require the best answer to have the same offsets in the context."""
        listed = (json_objects(value if isinstance(value, list) else [value]) for value in (answer, other))
        best = [[(a["start"], a["end"]) for a in each[:1]] for each in listed]
        return best[0] == best[1]

    def from_texts(self, texts: Sequence[str]) -> List[Request]:
        """Make each text a context, with the text before it as the question; long ones get a short question."""
        asked = [text for text in texts if 0 < len(text) < 200]
        return [
            Request({"question": asked[i % len(asked)], "context": text})
            for i, text in enumerate(texts)
            if text.strip()
        ]


def _best(start: np.ndarray, end: np.ndarray, longest: int, top_k: int) -> List[Tuple[int, int, float]]:
    """Return the first and the last token of the best spans, at most `longest` tokens long, and their scores, best first;
    `start` and `end` are probabilities, (length)."""
    longest = min(longest, len(start))
    ends = np.concatenate((end, np.zeros(longest - 1, end.dtype)))
    scores = (start[:, None] * np.lib.stride_tricks.sliding_window_view(ends, longest)).ravel()
    if top_k <= np.count_nonzero(scores):
        best = largest(scores, top_k)
        firsts, further = np.divmod(best, longest)
        lasts = firsts + further
    else:  # others of score 0 too, such as the pipeline takes
        scores = np.tril(np.triu(np.outer(start, end)), longest - 1).ravel()
        best = np.argpartition(-scores, top_k)[:top_k] if top_k < len(scores) else np.arange(len(scores))
        best = best[np.argsort(-scores[best], kind="stable")]
        firsts, lasts = np.divmod(best, len(start))
    return list(zip(firsts.tolist(), lasts.tolist(), scores[best].tolist()))
