"""The protocol of huggingface_hub's InferenceClient and the Inference API: `{"inputs": ..., "parameters": {...}}`.

It uses our own envelope; the differences are translated here. Its clients are recognized by their user agent, or use
the path /hf.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Union

from traceserve_runtime.errors import InvalidRequest, TraceserveError
from traceserve_runtime.json_types import Json, JsonObject
from traceserve_runtime.protocols import bodies, tei
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Document, Refusal, Served
from traceserve_runtime.protocols.events import CONTENT_TYPE, event
from traceserve_runtime.protocols.fields import READ, Key, boolean, classifies, pooled, read_keys
from traceserve_runtime.protocols.native import Plain, noted
from traceserve_runtime.protocols.requests import check_size, in_words, parse_value
from traceserve_runtime.tasks.contract import Answer, WrittenToken

CLIENT = "hf_hub/"  # in huggingface_hub's user agent
_OLD_CLIENT = "hf_hub/0."

# Keys that may stand beside "inputs" and "parameters".
_ROOT: Dict[str, Key] = {
    "inputs": READ,
    "parameters": READ,
    "stream": Key("stream"),
    "options": READ,
    # Feature extraction has its parameters here.
    "normalize": Key("normalize"),
    "prompt_name": Key("prompt_name"),
    "dimensions": Key("dimensions"),
    "truncate": READ,
    "truncation_direction": Key(neutral=("right", "Right"), why="texts are cut at their end"),
}
# Parameters that are no-ops or unsupported here; all others are our own.
_PARAMETERS: Dict[str, Key] = {
    "max_question_len": READ,  # with a fast tokenizer the pipeline ignores it too
    "clean_up_tokenization_spaces": Key(neutral=(False, True)),
    "truncation": Key(neutral=("do_not_truncate", "longest_first", "only_first")),
    "generate_parameters": READ,
    "watermark": Key(neutral=(False,)),
    "decoder_input_details": Key(neutral=(False,)),
    "best_of": Key(neutral=(1,)),
    "adapter_id": Key(),
    "grammar": Key(),
    "frequency_penalty": Key(neutral=(0,)),
}


class HuggingFace:
    """What huggingface_hub's InferenceClient sends: our own envelope with additions."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Union[Body, Document]:
        """Read a call."""
        value = bodies.read_body(parts, headers, served.task, served.manifest.max_rows)
        if not isinstance(value, dict) or "inputs" not in value:
            return parse_value(value, served.task, group, served.manifest.max_rows)
        parameters = _parameters(value)
        inputs = value["inputs"]
        if isinstance(inputs, dict) and "source_sentence" in inputs:
            check_size(value, served.manifest.max_rows)
            return tei.similarity(inputs, parameters, served, group)
        streams = boolean(value, "stream")
        if served.task.loop and served.task.has_parameter("return_full_text"):
            parameters.setdefault("return_full_text", False)
        if streams:
            parameters = {**parameters, "stream": True, "details": True}
        parameters = {**_defaults(served), **parameters}
        body = parse_value({"inputs": inputs, "parameters": parameters}, served.task, group, served.manifest.max_rows)
        answers = _OLD_ANSWERS if _OLD_CLIENT in headers.client else _ANSWERS
        form = _Answers(_is_list(body), answers.get(served.task.name, _unchanged))
        requests = [replace(request, continues=True) for request in body.requests]
        return replace(
            body, requests=requests, protocol=form, frames=_Tokens() if streams and body.streamable else None
        )

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return a string and its kind, which the clients show."""
        return Refusal.of(
            {"error": in_words(error), "error_type": "validation" if error.status < 500 else "generation"}, error
        )


def _is_list(body: Body) -> bool:
    """Return whether a list is answered, as for the elements of the Open Inference Protocol's tensors."""
    return not isinstance(body.protocol, Plain) or body.protocol.is_list


def _parameters(value: Mapping[str, object]) -> Dict[str, object]:
    """Return all parameters under our own names; raises InvalidRequest for unsupported ones."""
    found = read_keys(value, _ROOT)
    if value.get("truncate") is not None:
        found["long_inputs"] = "truncate" if boolean(value, "truncate") else "reject"
    given = value.get("parameters")
    if given is None:
        return found
    if not isinstance(given, dict):
        raise InvalidRequest('"parameters" should be an object', "parameters")
    more = given.get("generate_parameters") or {}
    if not isinstance(more, dict):
        raise InvalidRequest('"generate_parameters" should be an object', "parameters.generate_parameters")
    given = {**more, **given}
    foreign = {name: item for name, item in given.items() if name in _PARAMETERS}
    read_keys(foreign, _PARAMETERS, "parameters")
    # null counts as absent, except for top_k, where it means all.
    return {**found, **{name: item for name, item in given.items() if name not in _PARAMETERS and item is not None}}


def _defaults(served: Served) -> Dict[str, object]:
    """Return these clients' defaults."""
    if classifies(served) and served.manifest.labels:
        return {"top_k": None}
    if served.task.reads_vectors:
        return pooled(served)
    return {}


@dataclass(frozen=True)
class _Answers(Plain):
    """Our own answers in the shapes that these clients expect, with texts as text-generation-inference returns them."""

    change: Callable[[Json, bool], Json] = lambda value, is_list: value

    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        values = [self.change(noted(answer.continued), self.is_list) for answer in answers]
        return values if self.is_list else values[0]


def _unchanged(value: Json, is_list: bool) -> Json:
    return value


def _in_a_list(value: Json, is_list: bool) -> Json:
    """Nest a text's list of labels in another list."""
    return value if is_list else [value]


def _label_by_label(value: Any, is_list: bool) -> Json:
    return [{"label": label, "score": score} for label, score in zip(value["labels"], value["scores"])]


def _text_of_each_kind(value: Any, is_list: bool) -> Json:
    """Rename the keys of translations and summaries."""
    text = value["generated_text"]
    named = {**value, "translation_text": text, "summary_text": text}
    return named if is_list else [named]


_ANSWERS: Dict[str, Callable[[Any, bool], Json]] = {
    "sequence_classification": _in_a_list,
    "zero_shot_classification": _label_by_label,
    "text2text_generation": _text_of_each_kind,
}
# huggingface_hub before 1.0 read zero-shot answers as the pipeline returns them.
_OLD_ANSWERS = {name: change for name, change in _ANSWERS.items() if change is not _label_by_label}


class _Tokens:
    """A stream's events in text-generation-inference's format: one per token, the last with the whole text."""

    content_type = CONTENT_TYPE

    def __init__(self) -> None:
        self._index = 0
        self._text = ""
        self._held: Optional[Tuple[WrittenToken, str]] = None  # may turn out to be the last token

    def piece(self, text: str, tokens: Sequence[WrittenToken]) -> bytes:
        """Return events for the new tokens; if several were held back together, the first one has their text."""
        self._text += text
        events = []
        for token, own in zip(tokens, [text, *[""] * len(tokens)]):
            if self._held is not None:
                events.append(self._event(self._held[0].id, self._held[0].logarithm, self._held[1], False))
            self._held = token, own
        return b"".join(events)

    def end(self, text: str, answer: Answer, tokens: int) -> bytes:
        """Return the remaining tokens' events; the last one has the whole text."""
        self._text += text
        details = dict(answer.details or {})
        rest = [(t["id"], t["logprob"], "", t["special"]) for t in list(details.get("tokens", ()))[tokens:]]
        if self._held is not None:
            held, own = self._held
            rest.insert(0, (held.id, held.logarithm, own, False))
        *before, last = rest or [(0, 0.0, "", True)]
        said: JsonObject = {
            "finish_reason": details.get("finish_reason", "length"),
            "generated_tokens": details.get("generated_tokens", 0),
            "input_length": answer.tokens,
            "seed": details.get("seed"),
        }
        number, logarithm, own, special = last
        ended: JsonObject = {"generated_text": self._text, "details": said}
        events = [self._event(*each) for each in before]
        return b"".join([*events, self._event(number, logarithm, own + text, special, ended)])

    def failed(self, error: TraceserveError) -> bytes:
        """Return the error's event."""
        return event({"error": in_words(error), "error_type": "generation"}, "")

    def _event(self, token: int, logprob: float, text: str, special: bool, more: Optional[JsonObject] = None) -> bytes:
        self._index += 1
        named: JsonObject = {"id": token, "text": text, "logprob": logprob, "special": special}
        return event(
            {"index": self._index, "token": named, "generated_text": None, "details": None, **(more or {})}, ""
        )
