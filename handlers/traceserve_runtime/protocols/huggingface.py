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
from traceserve_runtime.protocols.fields import READ, Key, boolean, classifies, pooled, read_keys, without_beams
from traceserve_runtime.protocols.native import Plain, noted
from traceserve_runtime.protocols.requests import check_size, in_words, parse_value
from traceserve_runtime.protocols.wording import kind_of
from traceserve_runtime.tasks.contract import Answer, Request, WrittenToken
from traceserve_runtime.texts.tokenization import clean_up

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
    "encoding_format": Key(neutral=("float",)),
    "truncate": READ,
    "truncation_direction": Key(neutral=("right", "Right"), why="texts are cut at their end"),
}
# Values of "truncation", and how long texts are handled; None: as by default.
_TRUNCATIONS = {"do_not_truncate": None, "longest_first": "truncate", "only_first": "truncate"}
# Parameters that are no-ops, unsupported here, or have neutral values; all others are our own.
_PARAMETERS: Dict[str, Key] = {
    "max_question_len": READ,  # with a fast tokenizer the pipeline ignores it too
    "clean_up_tokenization_spaces": READ,
    "truncation": Key(neutral=tuple(_TRUNCATIONS)),
    "generate_parameters": READ,
    "watermark": Key(neutral=(False,)),
    "decoder_input_details": Key(neutral=(False,)),
    "best_of": Key(neutral=(1,)),
    "adapter_id": Key(),
    "grammar": Key(),
    "frequency_penalty": Key(neutral=(0,)),
    "stop": Key("stop", neutral=([],)),
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
            _check_streamed(parameters)
            parameters = {**parameters, "stream": True, "details": True}
        parameters = {**_defaults(served), **parameters}
        body = parse_value({"inputs": inputs, "parameters": parameters}, served.task, group, served.manifest.max_rows)
        answers = _OLD_ANSWERS if _OLD_CLIENT in headers.client else _ANSWERS
        clean = _cleans_up(value, served, streams)
        cleans = bool(clean) and not _cleaned_already(served)
        form = _Answers(_is_list(body), answers.get(served.task.name, _unchanged), cleans)
        requests = [replace(request, continues=True, clean_up=clean is not False) for request in body.requests]
        if streams:
            requests = [replace(each, parameters=without_beams(each.parameters, served)) for each in requests]
        frames = _Tokens(_returned_prompt(requests[0])) if streams and body.streamable else None
        return replace(body, requests=requests, protocol=form, frames=frames)

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
    if not isinstance(value.get("options", {}), (dict, type(None))):  # of a cache that is not here
        raise InvalidRequest(f'"options" should be an object, not {kind_of(value["options"])}', "options")
    if value.get("truncate") is not None:
        found["long_inputs"] = "truncate" if boolean(value, "truncate") else "reject"
    given = _given(value)
    foreign = {name: item for name, item in given.items() if name in _PARAMETERS}
    found.update(read_keys(foreign, _PARAMETERS, "parameters"))
    how = _TRUNCATIONS.get(foreign.get("truncation") or "")
    if how is not None:
        found.setdefault("long_inputs", how)
    # null counts as absent, except for top_k, where it means all.
    return {**found, **{name: item for name, item in given.items() if name not in _PARAMETERS and item is not None}}


def _given(value: Mapping[str, object]) -> Dict[str, Any]:
    """Return what is in "parameters" and "generate_parameters"."""
    given = value.get("parameters")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidRequest('"parameters" should be an object', "parameters")
    more = given.get("generate_parameters") or {}
    if not isinstance(more, dict):
        raise InvalidRequest('"generate_parameters" should be an object', "parameters.generate_parameters")
    return {**more, **given}


def _check_streamed(parameters: Mapping[str, object]) -> None:
    """Raise InvalidRequest for a stream's parameters: each event tells of one token, which beams do not know before the end,
    and of no others at its position, whose texts are made at the end."""
    beams = parameters.get("num_beams", 1)
    if isinstance(beams, int) and beams > 1:
        raise InvalidRequest(
            'beams are not streamed; leave num_beams out, or send "num_beams": 1', "parameters.num_beams"
        )
    if parameters.get("top_n_tokens", 0) not in (0, None):
        raise InvalidRequest(
            "the likeliest tokens are not streamed; leave top_n_tokens out, or ask without a stream",
            "parameters.top_n_tokens",
        )


def _returned_prompt(request: Request) -> str:
    """Return the prompt that a streamed text is returned behind."""
    return str(request.inputs.get("text", "")) if request.parameters.get("return_full_text") else ""


def _cleans_up(value: Mapping[str, object], served: Served, streams: bool) -> Optional[bool]:
    """Return whether written texts are cleaned up, None: as the tokenizer does. Raises InvalidRequest for a stream's: what
    was sent would change."""
    name = "clean_up_tokenization_spaces"
    wanted = _given(value).get(name)
    if not isinstance(wanted, (bool, type(None))):
        raise InvalidRequest(f'"{name}" should be true or false, not {kind_of(wanted)}', f"parameters.{name}")
    if wanted and streams and not _cleaned_already(served):
        raise InvalidRequest(f'"{name}" is not supported for streams; leave it out', f"parameters.{name}")
    return wanted if served.task.loop else None


def _cleaned_already(served: Served) -> bool:
    """Return whether the task cleans up what this model writes."""
    return served.task.cleans_up and served.manifest.tokenizer.clean_up


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
    cleans_up: bool = False

    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        noted_answers = [noted(answer.continued) for answer in answers]
        if self.cleans_up:
            noted_answers = list(map(_cleaned, noted_answers))
        values = [self.change(value, self.is_list) for value in noted_answers]
        return values if self.is_list else values[0]


def _cleaned(value: Json) -> Json:
    """Clean up the texts in an answer of a task that writes."""
    if isinstance(value, list):
        return list(map(_cleaned, value))
    if not isinstance(value, dict) or not isinstance(value.get("generated_text"), str):
        return value
    return {**value, "generated_text": clean_up(str(value["generated_text"]))}


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
    """A stream's events in text-generation-inference's format: one per token, the last with the whole text behind `prompt`."""

    content_type = CONTENT_TYPE

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._index = 0
        self._text = ""
        self._held: Optional[Tuple[WrittenToken, str]] = None  # may turn out to be the last token

    def piece(self, text: str, tokens: Sequence[WrittenToken]) -> bytes:
        """Return events for the new tokens; if several were held back together, the last one has their text."""
        self._text += text
        told = [] if self._held is None else [self._held]
        told += [(token, "") for token in tokens]
        if told:
            token, own = told[-1]
            *told, self._held = *told[:-1], (token, own + text)
        return b"".join(self._event(token, own) for token, own in told)

    def end(self, text: str, answer: Answer, tokens: int) -> bytes:
        """Return the remaining tokens' events; the last one has the whole text."""
        self._text += text
        details = dict(answer.details or {})
        rest = [] if self._held is None else [self._held]
        new = list(details.get("tokens", ()))[tokens:]
        rest += [(WrittenToken(each["id"], each["logprob"], each["special"]), "") for each in new]
        rest = rest or [(WrittenToken(0, 0.0, True), "")]
        # Clients leave out special tokens with their texts.
        shown = [i for i, (token, _) in enumerate(rest) if not token.special]
        position = shown[-1] if shown else len(rest) - 1
        rest[position] = rest[position][0], rest[position][1] + text
        said: JsonObject = {
            "finish_reason": details.get("finish_reason", "length"),
            "generated_tokens": details.get("generated_tokens", 0),
            "input_length": answer.tokens,
            "seed": details.get("seed"),
        }
        ended: JsonObject = {"generated_text": self._prompt + self._text, "details": said}
        events = [self._event(*each) for each in rest[:-1]]
        return b"".join([*events, self._event(*rest[-1], ended)])

    def failed(self, error: TraceserveError) -> bytes:
        """Return the error's event."""
        return event({"error": in_words(error), "error_type": "generation"}, "")

    def _event(self, token: WrittenToken, text: str, more: Optional[JsonObject] = None) -> bytes:
        self._index += 1
        named: JsonObject = {"id": token.id, "text": text, "logprob": token.logarithm, "special": token.special}
        return event(
            {"index": self._index, "token": named, "generated_text": None, "details": None, **(more or {})}, ""
        )
