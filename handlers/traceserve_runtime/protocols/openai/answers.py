"""Responses with generated texts: completions and chat completions, whole or as events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional, Sequence, Tuple

from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.json_types import Json, JsonObject
from traceserve_runtime.protocols.contract import Served
from traceserve_runtime.protocols.events import CONTENT_TYPE, DONE, Stops, cut_at_stop, event
from traceserve_runtime.protocols.fields import FieldPaths
from traceserve_runtime.protocols.openai.shared import error_document, head, usage
from traceserve_runtime.tasks.contract import Answer, Details, WrittenToken

_REASONS = {"length": "length"}  # everything else is "stop"


class Choices(NamedTuple):
    """The number of texts per prompt, their stop strings, and the details to report."""

    of_each: int
    stops: Sequence[str]
    logprobs: Optional[int]  # the number of top tokens; None: no log-probabilities


def _written(answer: Answer) -> str:
    """Return the text of a text_generation or text2text_generation answer, or of a stream."""
    value = answer.value[0] if isinstance(answer.value, list) else answer.value
    return str(value["generated_text"] if isinstance(value, dict) else value)


def _reason(answer: Answer) -> str:
    return _REASONS.get((answer.details or {}).get("finish_reason", ""), "stop")


def _tokens(answers: Sequence[Answer]) -> int:
    return sum((answer.details or {}).get("generated_tokens", 0) for answer in answers)


@dataclass(frozen=True)
class WrittenTexts(FieldPaths):
    choices: Choices = Choices(1, (), None)
    echoed: Sequence[str] = ()

    object: str = ""
    prefix: str = ""

    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        """Return all prompts' choices, in order; a prompt with several was read once for each."""
        read = [answers[i] for i in range(0, len(answers), self.choices.of_each)]
        return {
            **head(self.prefix, self.object, served),
            "choices": [self._choice(i, answer.continued) for i, answer in enumerate(answers)],
            "usage": usage(read, _tokens(answers)),
        }

    def _choice(self, index: int, answer: Answer) -> JsonObject:
        text = cut_at_stop(_written(answer), self.choices.stops)
        logprobs = None if self.choices.logprobs is None else self._logprobs(answer)
        return {"index": index, **self._said(index, text), "logprobs": logprobs, "finish_reason": _reason(answer)}

    def _said(self, index: int, text: str) -> JsonObject:
        raise NotImplementedError

    def _logprobs(self, answer: Answer) -> JsonObject:
        raise NotImplementedError


@dataclass(frozen=True)
class CompletionTexts(WrittenTexts):
    object: str = "text_completion"
    prefix: str = "cmpl-"

    def _said(self, index: int, text: str) -> JsonObject:
        return {"text": (self.echoed[index // self.choices.of_each] if self.echoed else "") + text}

    def _logprobs(self, answer: Answer) -> JsonObject:
        return completion_logprobs(answer)


@dataclass(frozen=True)
class ChatTexts(WrittenTexts):
    object: str = "chat.completion"
    prefix: str = "chatcmpl-"

    def _said(self, index: int, text: str) -> JsonObject:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, answer: Answer) -> JsonObject:
        return chat_logprobs(answer)


def _written_tokens(answer: Answer) -> Tuple[Sequence[Details], Optional[Sequence[Sequence[Details]]]]:
    """Return the tokens of an answer with details, and the top tokens at each position."""
    details = answer.details or {}
    return details.get("tokens", ()), details.get("top_tokens")


def completion_logprobs(answer: Answer) -> JsonObject:
    """Return per-token log-probabilities in completions' format: the written token is always among the top ones."""
    tokens, tops = _written_tokens(answer)
    offsets, position = [], 0
    for token in tokens:
        offsets.append(position)
        position += len(token["text"])
    return {
        "tokens": [token["text"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [_with_written(top, token) for top, token in zip(tops, tokens)] if tops else None,
        "text_offset": offsets,
    }


def _with_written(top: Sequence[Details], written: Details) -> JsonObject:
    """Return the log-probabilities of the top tokens and of the written one, whose text may depend on those before it."""
    others = {each["text"]: each["logprob"] for each in top if each["id"] != written["id"]}
    return {**others, written["text"]: written["logprob"]}


def chat_logprobs(answer: Answer) -> JsonObject:
    """Return per-token log-probabilities in chat completions' format."""
    tokens, tops = _written_tokens(answer)

    def told(token: Details) -> JsonObject:
        return {"token": token["text"], "logprob": token["logprob"], "bytes": list(token["text"].encode("utf-8"))}

    lists = tops or [[]] * len(tokens)
    return {
        "content": [{**told(t), "top_logprobs": [told(each) for each in top]} for t, top in zip(tokens, lists)],
        "refusal": None,
    }


class Chunks:
    """The events of one stream; log-probabilities, if requested, come with the last text."""

    content_type = CONTENT_TYPE
    prefix = ""
    object = ""

    def __init__(self, choices: Choices, served: Served, with_usage: bool) -> None:
        self._head = head(self.prefix, self.object, served)
        self._stops = Stops(choices.stops)
        self._choices = choices
        self._with_usage = with_usage
        self._begun = False

    def piece(self, text: str, tokens: Sequence[WrittenToken]) -> bytes:
        """Return one event, or nothing if all of the text is held back."""
        text = self._stops.feed(text)
        return self._chunk(self._delta(text)) if text else b""

    def end(self, text: str, answer: Answer, tokens: int) -> bytes:
        """Return the rest of the text, why it ended and, if requested, the token counts."""
        text = self._stops.feed(text) + self._stops.rest()
        logprobs = None if self._choices.logprobs is None else self._logprobs(answer)
        last = self._chunk(self._delta(text), logprobs=logprobs) if text or logprobs or not self._begun else b""
        last += self._chunk(self._nothing(), _reason(answer))
        if self._with_usage:
            last += event({**self._head, "choices": [], "usage": usage([answer], _tokens([answer]))})
        return last + DONE

    def failed(self, error: TraceserveError) -> bytes:
        """Return the error in the usual format."""
        return event(error_document(error)) + DONE

    def _chunk(self, said: JsonObject, reason: Optional[str] = None, logprobs: Optional[JsonObject] = None) -> bytes:
        self._begun = True
        return event({**self._head, "choices": [{"index": 0, **said, "logprobs": logprobs, "finish_reason": reason}]})

    def _delta(self, text: str) -> JsonObject:
        raise NotImplementedError

    def _nothing(self) -> JsonObject:
        raise NotImplementedError

    def _logprobs(self, answer: Answer) -> JsonObject:
        raise NotImplementedError


class CompletionChunks(Chunks):
    prefix = "cmpl-"
    object = "text_completion"

    def _delta(self, text: str) -> JsonObject:
        return {"text": text}

    def _nothing(self) -> JsonObject:
        return {"text": ""}

    def _logprobs(self, answer: Answer) -> JsonObject:
        return completion_logprobs(answer)


class ChatChunks(Chunks):
    prefix = "chatcmpl-"
    object = "chat.completion.chunk"

    def _delta(self, text: str) -> JsonObject:
        return {"delta": {"content": text} if self._begun else {"role": "assistant", "content": text}}

    def _nothing(self) -> JsonObject:
        return {"delta": {}}

    def _logprobs(self, answer: Answer) -> JsonObject:
        return chat_logprobs(answer)
