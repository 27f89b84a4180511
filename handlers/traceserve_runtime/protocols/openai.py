"""The API of OpenAI, as its clients and those who followed it speak it: models, embeddings, completions, chat completions.

A model's base URL is /predictions/NAME/VERSION/v1. What a key of a body means for us stands in the tables below; what is
in none of them, or asks for something that is not done here, is refused by its name.
"""

from __future__ import annotations

import base64
import time
import uuid
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from traceserve_runtime.errors import InvalidRequest, NotFound, TraceserveError, WrongTask
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Document, Refusal, Served
from traceserve_runtime.protocols.events import CONTENT_TYPE, DONE, Stops, cut, event
from traceserve_runtime.protocols.fields import (
    IGNORED,
    Key,
    Places,
    boolean,
    checked,
    foreign_names,
    json_body,
    needed,
    read_keys,
)
from traceserve_runtime.protocols.requests import checked_fields
from traceserve_runtime.protocols.wording import kind_of, short
from traceserve_runtime.tasks.contract import Answer, Request, WrittenToken

_MOST_CHOICES = 128  # of one prompt
_TOP_LOGPROBS = 20
_DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it; a chat goes on as far as the model says

_READ = Key(read=True)
_EMBEDDINGS: Dict[str, Key] = {
    "input": _READ,
    "model": IGNORED,
    "encoding_format": _READ,
    "dimensions": Key("dimensions"),
    "user": IGNORED,
}
_WRITING: Dict[str, Key] = {
    "model": IGNORED,
    "user": IGNORED,
    "n": _READ,
    "stream": _READ,
    "stream_options": _READ,
    "temperature": Key("temperature"),
    "top_p": Key("top_p"),
    "seed": Key("seed"),
    "stop": Key("stop", neutral=([],)),
    "presence_penalty": Key(neutral=(0,), why="penalties for presence are not done here; repetition_penalty is"),
    "frequency_penalty": Key(neutral=(0,), why="penalties for frequency are not done here; repetition_penalty is"),
    "logit_bias": Key(neutral=({},)),
    # What the servers that followed OpenAI have beside.
    "top_k": Key("top_k"),
    "min_p": Key("min_p"),
    "typical_p": Key("typical_p"),
    "repetition_penalty": Key("repetition_penalty"),
    "min_tokens": Key("min_new_tokens"),
}
_COMPLETIONS: Dict[str, Key] = {
    **_WRITING,
    "prompt": _READ,
    "max_tokens": Key("max_new_tokens"),
    "logprobs": _READ,
    "echo": _READ,
    "best_of": _READ,
    "suffix": Key(neutral=("",)),
}
_CHAT: Dict[str, Key] = {
    **_WRITING,
    "messages": _READ,
    "max_tokens": Key("max_new_tokens"),
    "max_completion_tokens": Key("max_new_tokens"),
    "logprobs": _READ,
    "top_logprobs": _READ,
    "tools": Key(neutral=([],)),
    "tool_choice": Key(neutral=("none", "auto")),
    "tool_prompt": IGNORED,
    "functions": Key(neutral=([],)),
    "response_format": Key(neutral=({"type": "text"},)),
    "parallel_tool_calls": IGNORED,
    "store": Key(neutral=(False,)),
    "metadata": IGNORED,
    "modalities": Key(neutral=(["text"],)),
    "service_tier": IGNORED,
    "prompt_cache_key": IGNORED,
    "safety_identifier": IGNORED,
}
_ROLES = {"developer": "system"}  # what others call ours
_REASONS = {"length": "length"}  # all else is "stop"
_ERRORS = {404: "not_found_error", 500: "server_error", 501: "server_error"}


class _Errors:
    """What all of them are refused with."""

    def error(self, error: TraceserveError, parts: Mapping[str, Any], headers: Headers, served: Served) -> Refusal:
        """OpenAI's own shape."""
        return Refusal.of(error_document(error), error)


def error_document(error: TraceserveError) -> Dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = _ERRORS.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": type(error).__name__}}


class Models(_Errors):
    """The list of models: the one that is served; or, at a path of its own, that one."""

    def __init__(self, single: bool = False) -> None:
        self._single = single

    def read(self, parts: Mapping[str, Any], headers: Headers, served: Served, group: int) -> Document:
        """Nothing is asked; raises NotFound for another model than this one."""
        wanted = headers.path.strip("/").partition("models/")[2]
        if self._single and wanted != served.name:
            raise NotFound(f"the model {short(wanted)} is not served here; {served.name} is", "model")
        model = {
            "id": served.name,
            "object": "model",
            "created": 0,
            "owned_by": "traceserve",
            "max_model_len": served.manifest.max_length,
        }
        return Document(model if self._single else {"object": "list", "data": [model]})


class Embeddings(_Errors):
    """Texts to vectors, by a model of feature extraction."""

    def read(self, parts: Mapping[str, Any], headers: Headers, served: Served, group: int) -> Body:
        """The requests in `input`: a text, a list of texts, a list of token ids, or a list of such lists."""
        if not served.task.reads_vectors:
            raise WrongTask(
                f"this model's task is {served.task.name}; embeddings are made by one of feature_extraction"
            )
        value = json_body(parts, headers, served)
        parameters = checked(read_keys(value, _EMBEDDINGS), served, foreign_names(_EMBEDDINGS))
        form = value.get("encoding_format") or "float"
        if form not in ("float", "base64"):
            raise InvalidRequest('"encoding_format" should be "float" or "base64"', "encoding_format")
        texts = _texts(needed(value, "input"), "input", served)
        if served.manifest.parameters.get("pooling", "none") == "none":
            parameters = {"pooling": "mean", **parameters}  # one vector is asked for, and the model names no pooling
        requests = [Request(checked_fields({"text": t}, served.task, w), parameters, group, w) for t, w in texts]
        return Body(requests, _Vectors({"text": "input"}, foreign_names(_EMBEDDINGS), encode=form == "base64"))


@dataclass(frozen=True)
class _Vectors(Places):
    encode: bool = False

    def reply(self, answers: Sequence[Answer], served: Served) -> Any:
        """The vectors in order; in base64 they are float32, little-endian."""
        data = [
            {"object": "embedding", "index": i, "embedding": self._written(answer.value)}
            for i, answer in enumerate(answers)
        ]
        return {"object": "list", "data": data, "model": served.name, "usage": usage(answers)}

    def _written(self, vector: List[float]) -> Union[str, List[float]]:
        if not self.encode:
            return vector
        return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode("ascii")


def usage(answers: Sequence[Answer], completion: Optional[int] = None) -> Dict[str, int]:
    """How many tokens were read, and written where any were."""
    read = sum(answer.tokens for answer in answers)
    if completion is None:
        return {"prompt_tokens": read, "total_tokens": read}
    return {"prompt_tokens": read, "completion_tokens": completion, "total_tokens": read + completion}


def _texts(value: Any, name: str, served: Served) -> List[Tuple[Any, str]]:
    """The texts that a prompt or input is, each with its path. Ids of the model's tokens are read as the text that they say."""
    if isinstance(value, str):
        return [(value, name)]
    if not isinstance(value, list):
        raise InvalidRequest(f'"{name}" should be a string or a list of strings, not {kind_of(value)}', name)
    if not value:
        raise InvalidRequest(f'"{name}" is an empty list: it asks nothing', name)
    if _are_ids(value):
        return [(_text_of(value, name, served), name)]
    lists = all(isinstance(item, list) and _are_ids(item) for item in value)
    return [
        (_text_of(item, w, served) if lists else item, w)
        for w, item in ((f"{name}[{i}]", t) for i, t in enumerate(value))
    ]


def _text_of(ids: Sequence[int], where: str, served: Served) -> str:
    try:
        return served.text_of(ids)
    except OverflowError:
        raise InvalidRequest("a token id is a whole number from 0 to 4,294,967,295", where) from None


def _are_ids(value: Any) -> bool:
    return bool(value) and all(type(item) is int for item in value)


class _Choices(NamedTuple):
    """How many texts are written to each prompt, where they stop, and what is said of each."""

    of_each: int
    stops: Sequence[str]
    logprobs: Optional[int]  # so many of the likeliest tokens; None: no log-probabilities


class _Writing(_Errors):
    """What completions and chat completions have in common."""

    keys: Mapping[str, Key]
    prefix: str  # of an answer's id

    def read(self, parts: Mapping[str, Any], headers: Headers, served: Served, group: int) -> Body:
        """The requests: for each prompt as many as choices are asked for."""
        if not served.task.loop:
            raise WrongTask(f"this model's task is {served.task.name}; texts are written by one of text_generation")
        value = json_body(parts, headers, served)
        parameters = checked(self._parameters(value, served), served, self._names())
        prompts = self._prompts(value, served)
        choices = _Choices(_count(value), _strings(parameters.get("stop")), self._logprobs(value))
        if choices.logprobs is not None:
            parameters = {**parameters, "details": True, "top_n_tokens": choices.logprobs}
        if boolean(value, "stream"):
            return self._streamed(value, prompts, parameters, choices, served, group)
        requests = [
            Request(fields, self._of_choice(parameters, i), group, where)
            for fields, where in prompts
            for i in range(choices.of_each)
        ]
        return Body(requests, self._form(value, choices, served))

    def _streamed(
        self,
        value: Mapping[str, Any],
        prompts: Sequence[Tuple[Mapping[str, Any], str]],
        parameters: Mapping[str, Any],
        choices: _Choices,
        served: Served,
        group: int,
    ) -> Body:
        if len(prompts) > 1 or choices.of_each > 1:
            raise InvalidRequest("one text is streamed at a time: send one prompt, and n = 1", "n")
        if "stream" not in {parameter.name for parameter in served.task.all_parameters()}:
            raise InvalidRequest("this model's texts are not streamed; leave stream out", "stream")
        if boolean(value, "echo"):
            raise InvalidRequest('"echo" of a stream is not done here', "echo")
        options = value.get("stream_options") or {}
        if not isinstance(options, dict):
            raise InvalidRequest(f'"stream_options" should be an object, not {kind_of(options)}', "stream_options")
        read_keys(options, {"include_usage": _READ, "include_obfuscation": IGNORED}, "stream_options")
        [(fields, where)] = prompts
        request = Request(fields, {**parameters, "stream": True}, group, where)
        frames = self._frames(choices, served, boolean(options, "include_usage"))
        return Body([request], self._form(value, choices, served), frames)

    @staticmethod
    def _of_choice(parameters: Mapping[str, Any], number: int) -> Dict[str, Any]:
        """Each choice draws other tokens."""
        seed = parameters.get("seed")
        return dict(parameters) if seed is None else {**parameters, "seed": (seed + number) % 2**32}

    def _names(self) -> Dict[str, str]:
        return {**foreign_names(self.keys), "details": "logprobs", "top_n_tokens": "top_logprobs", "num_beams": "n"}

    def _parameters(self, value: Mapping[str, Any], served: Served) -> Dict[str, Any]:
        found = read_keys(value, self.keys)
        if "return_full_text" in {parameter.name for parameter in served.task.all_parameters()}:
            found["return_full_text"] = False
        return found

    def _prompts(self, value: Mapping[str, Any], served: Served) -> List[Tuple[Mapping[str, Any], str]]:
        raise NotImplementedError

    def _logprobs(self, value: Mapping[str, Any]) -> Optional[int]:
        raise NotImplementedError

    def _form(self, value: Mapping[str, Any], choices: _Choices, served: Served) -> _Texts:
        raise NotImplementedError

    def _frames(self, choices: _Choices, served: Served, with_usage: bool) -> _Chunks:
        raise NotImplementedError


class Completions(_Writing):
    """Prompts to texts."""

    keys = _COMPLETIONS
    prefix = "cmpl-"

    def _parameters(self, value: Mapping[str, Any], served: Served) -> Dict[str, Any]:
        return {"max_new_tokens": _DEFAULT_TOKENS, **super()._parameters(value, served)}

    def _prompts(self, value: Mapping[str, Any], served: Served) -> List[Tuple[Mapping[str, Any], str]]:
        best = value.get("best_of")
        if best is not None and best != _count(value):
            raise InvalidRequest('"best_of" is not done here; leave it out', "best_of")
        texts = _texts(needed(value, "prompt"), "prompt", served)
        return [(checked_fields({"text": text}, served.task, where), where) for text, where in texts]

    def _logprobs(self, value: Mapping[str, Any]) -> Optional[int]:
        wanted = value.get("logprobs")
        if wanted is None or wanted is False:
            return None
        if type(wanted) is not int or not 0 <= wanted <= _TOP_LOGPROBS:
            raise InvalidRequest(f'"logprobs" should be a whole number from 0 to {_TOP_LOGPROBS}', "logprobs")
        return wanted

    def _form(self, value: Mapping[str, Any], choices: _Choices, served: Served) -> _Texts:
        echoed = [t for t, _ in _texts(value["prompt"], "prompt", served)] if boolean(value, "echo") else []
        return _CompletionTexts({"text": "prompt"}, self._names(), choices=choices, echoed=echoed)

    def _frames(self, choices: _Choices, served: Served, with_usage: bool) -> _Chunks:
        return _CompletionChunks(choices, served, with_usage)


class Chat(_Writing):
    """Messages to the next one."""

    keys = _CHAT
    prefix = "chatcmpl-"

    def _prompts(self, value: Mapping[str, Any], served: Served) -> List[Tuple[Mapping[str, Any], str]]:
        if "messages" not in {field.name for field in served.task.fields}:
            raise WrongTask(
                f"this model's task is {served.task.name}; chats are gone on with by one of text_generation"
            )
        messages = needed(value, "messages")
        if not isinstance(messages, list):
            raise InvalidRequest(f'"messages" should be a list, not {kind_of(messages)}', "messages")
        own = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        return [(checked_fields({"messages": own}, served.task, ""), "")]

    def _logprobs(self, value: Mapping[str, Any]) -> Optional[int]:
        most = value.get("top_logprobs")
        if most is not None and (type(most) is not int or not 0 <= most <= _TOP_LOGPROBS):
            raise InvalidRequest(f'"top_logprobs" should be a whole number from 0 to {_TOP_LOGPROBS}', "top_logprobs")
        if not boolean(value, "logprobs"):
            if most:
                raise InvalidRequest('"top_logprobs" needs "logprobs": true', "top_logprobs")
            return None
        return most or 0

    def _form(self, value: Mapping[str, Any], choices: _Choices, served: Served) -> _Texts:
        return _ChatTexts({}, self._names(), choices=choices)

    def _frames(self, choices: _Choices, served: Served, with_usage: bool) -> _Chunks:
        return _ChatChunks(choices, served, with_usage)


def _message(message: Any, where: str) -> Any:
    """A message as ours: its content one text."""
    if not isinstance(message, dict):
        raise InvalidRequest('a message is an object like {"role": "user", "content": "..."}', where)
    read_keys(message, {"role": _READ, "content": _READ, "name": Key(), "refusal": Key()}, where)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    role = message.get("role")
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise InvalidRequest('this model reads text: a part is an object like {"type": "text", "text": "..."}', where)
    return text


def _count(value: Mapping[str, Any]) -> int:
    count = value.get("n")
    if count is None:
        return 1
    if type(count) is not int or not 1 <= count <= _MOST_CHOICES:
        raise InvalidRequest(f'"n" should be a whole number from 1 to {_MOST_CHOICES}', "n")
    return count


def _strings(value: Any) -> List[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _written(answer: Answer) -> str:
    """The text of an answer of text_generation or text2text_generation, or of a stream."""
    value = answer.value[0] if isinstance(answer.value, list) else answer.value
    return value if isinstance(value, str) else str(value["generated_text"])


def _reason(answer: Answer) -> str:
    return _REASONS.get((answer.details or {}).get("finish_reason", ""), "stop")


def _tokens(answers: Sequence[Answer]) -> int:
    return sum((answer.details or {}).get("generated_tokens", 0) for answer in answers)


@dataclass(frozen=True)
class _Texts(Places):
    choices: _Choices = _Choices(1, (), None)
    echoed: Sequence[str] = ()

    object: str = ""
    prefix: str = ""

    def reply(self, answers: Sequence[Answer], served: Served) -> Any:
        """The choices of all prompts, in order; a prompt that has several was read once for each."""
        read = [answers[i] for i in range(0, len(answers), self.choices.of_each)]
        return {
            **head(self.prefix, self.object, served),
            "choices": [self._choice(i, answer) for i, answer in enumerate(answers)],
            "usage": usage(read, _tokens(answers)),
        }

    def _choice(self, index: int, answer: Answer) -> Dict[str, Any]:
        text, _ = cut(_written(answer), self.choices.stops)
        logprobs = None if self.choices.logprobs is None else self._logprobs(answer)
        return {"index": index, **self._said(index, text), "logprobs": logprobs, "finish_reason": _reason(answer)}

    def _said(self, index: int, text: str) -> Dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, answer: Answer) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class _CompletionTexts(_Texts):
    object: str = "text_completion"
    prefix: str = Completions.prefix

    def _said(self, index: int, text: str) -> Dict[str, Any]:
        return {"text": (self.echoed[index // self.choices.of_each] if self.echoed else "") + text}

    def _logprobs(self, answer: Answer) -> Any:
        return completion_logprobs((answer.details or {}).get("tokens", ()), (answer.details or {}).get("top_tokens"))


@dataclass(frozen=True)
class _ChatTexts(_Texts):
    object: str = "chat.completion"
    prefix: str = Chat.prefix

    def _said(self, index: int, text: str) -> Dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, answer: Answer) -> Any:
        return chat_logprobs((answer.details or {}).get("tokens", ()), (answer.details or {}).get("top_tokens"))


def completion_logprobs(tokens: Sequence[Mapping[str, Any]], tops: Optional[Sequence[Any]]) -> Dict[str, Any]:
    """Token by token, as completions tell them."""
    offsets, place = [], 0
    for token in tokens:
        offsets.append(place)
        place += len(token["text"])
    return {
        "tokens": [token["text"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{each["text"]: each["logprob"] for each in top} for top in tops] if tops else None,
        "text_offset": offsets,
    }


def chat_logprobs(tokens: Sequence[Mapping[str, Any]], tops: Optional[Sequence[Any]]) -> Dict[str, Any]:
    """Token by token, as chat completions tell them."""

    def told(token: Mapping[str, Any]) -> Dict[str, Any]:
        return {"token": token["text"], "logprob": token["logprob"], "bytes": list(token["text"].encode("utf-8"))}

    lists = tops or [[]] * len(tokens)
    return {
        "content": [{**told(t), "top_logprobs": [told(each) for each in top]} for t, top in zip(tokens, lists)],
        "refusal": None,
    }


def head(prefix: str, kind: str, served: Served) -> Dict[str, Any]:
    """What an answer begins with."""
    return {"id": prefix + uuid.uuid4().hex, "object": kind, "created": int(time.time()), "model": served.name}


class _Chunks:
    """The events of one stream; log-probabilities, where they are asked for, come with the last text."""

    content_type = CONTENT_TYPE
    prefix = ""
    object = ""

    def __init__(self, choices: _Choices, served: Served, with_usage: bool) -> None:
        self._head = head(self.prefix, self.object, served)
        self._stops = Stops(choices.stops)
        self._choices = choices
        self._with_usage = with_usage
        self._begun = False

    def piece(self, text: str, tokens: Sequence[WrittenToken]) -> bytes:
        """One event, but where all of the text is held back."""
        text = self._stops.feed(text)
        return self._chunk(self._delta(text)) if text else b""

    def end(self, text: str, answer: Answer, tokens: int) -> bytes:
        """The rest of the text, why it ended, and how many tokens there were where that was asked for."""
        text = self._stops.feed(text) + self._stops.rest()
        logprobs = None if self._choices.logprobs is None else self._logprobs(answer)
        last = self._chunk(self._delta(text), logprobs=logprobs) if text or logprobs or not self._begun else b""
        last += self._chunk(self._nothing(), _reason(answer))
        if self._with_usage:
            last += event({**self._head, "choices": [], "usage": usage([answer], _tokens([answer]))})
        return last + DONE

    def failed(self, error: TraceserveError) -> bytes:
        """The error, as an answer has it."""
        return event(error_document(error)) + DONE

    def _chunk(self, said: Mapping[str, Any], reason: Optional[str] = None, logprobs: Any = None) -> bytes:
        self._begun = True
        return event({**self._head, "choices": [{"index": 0, **said, "logprobs": logprobs, "finish_reason": reason}]})

    def _delta(self, text: str) -> Dict[str, Any]:
        raise NotImplementedError

    def _nothing(self) -> Dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, answer: Answer) -> Any:
        raise NotImplementedError


class _CompletionChunks(_Chunks):
    prefix = Completions.prefix
    object = "text_completion"

    def _delta(self, text: str) -> Dict[str, Any]:
        return {"text": text}

    def _nothing(self) -> Dict[str, Any]:
        return {"text": ""}

    def _logprobs(self, answer: Answer) -> Any:
        return completion_logprobs((answer.details or {}).get("tokens", ()), (answer.details or {}).get("top_tokens"))


class _ChatChunks(_Chunks):
    prefix = Chat.prefix
    object = "chat.completion.chunk"

    def _delta(self, text: str) -> Dict[str, Any]:
        return {"delta": {"content": text} if self._begun else {"role": "assistant", "content": text}}

    def _nothing(self) -> Dict[str, Any]:
        return {"delta": {}}

    def _logprobs(self, answer: Answer) -> Any:
        return chat_logprobs((answer.details or {}).get("tokens", ()), (answer.details or {}).get("top_tokens"))
