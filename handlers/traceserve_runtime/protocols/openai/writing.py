"""Prompts and chats: the keys of their bodies, and how these map to our parameters.

The tables below map the keys; a key that is in none of them, or requests something unsupported, is refused by name.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from traceserve_runtime.errors import InputTooLong, InvalidRequest
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Served
from traceserve_runtime.protocols.fields import (
    IGNORED,
    READ,
    Key,
    boolean,
    check_values,
    foreign_names,
    json_body,
    read_keys,
    require_key,
    without_beams,
    wrong_task,
)
from traceserve_runtime.protocols.openai.answers import (
    ChatChunks,
    ChatTexts,
    Choices,
    Chunks,
    CompletionChunks,
    CompletionTexts,
    WrittenTexts,
)
from traceserve_runtime.protocols.openai.shared import OpenAiErrors, texts_of
from traceserve_runtime.protocols.requests import checked_fields
from traceserve_runtime.protocols.wording import kind_of
from traceserve_runtime.tasks.contract import Request

_MOST_CHOICES = 128  # per prompt
_TOP_LOGPROBS = 20
_DEFAULT_TOKENS = 16  # of a completion, OpenAI's default; a chat's is the model's

_WRITING: Dict[str, Key] = {
    "model": IGNORED,
    "user": IGNORED,
    "n": READ,
    "stream": READ,
    "stream_options": READ,
    "temperature": Key("temperature"),
    "top_p": Key("top_p"),
    "seed": Key("seed"),
    "stop": Key("stop", neutral=([],)),
    "presence_penalty": Key("presence_penalty"),
    "frequency_penalty": Key("frequency_penalty"),
    "logit_bias": Key("logit_bias"),
    # Additions of OpenAI-compatible servers.
    "top_k": Key("top_k"),
    "min_p": Key("min_p"),
    "typical_p": Key("typical_p"),
    "repetition_penalty": Key("repetition_penalty"),
    "min_tokens": Key("min_new_tokens"),
}
_COMPLETIONS: Dict[str, Key] = {
    **_WRITING,
    "prompt": READ,
    "max_tokens": Key("max_new_tokens"),
    "logprobs": READ,
    "echo": READ,
    "best_of": READ,
    "suffix": Key(neutral=("",)),
}
_CHAT: Dict[str, Key] = {
    **_WRITING,
    "messages": READ,
    "max_tokens": Key("max_new_tokens"),
    "max_completion_tokens": Key("max_new_tokens"),
    "logprobs": READ,
    "top_logprobs": READ,
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
_MESSAGE: Dict[str, Key] = {
    "role": READ,
    "content": READ,
    "name": Key(),
    # Of an answer that the client sends back.
    "refusal": Key(neutral=("",)),
    "annotations": Key(neutral=([],)),
    "audio": Key(),
    "function_call": Key(),
    "reasoning": Key(neutral=("",)),
    "reasoning_content": Key(neutral=("",)),
    "tool_calls": Key(neutral=([],)),
    "tool_call_id": Key(),
}
_ROLES = {"developer": "system"}  # other names of our roles


class _Writing(OpenAiErrors):
    """Parts common to completions and chat completions."""

    keys: Mapping[str, Key]

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Make one request per choice of each prompt."""
        if not served.task.loop:
            raise wrong_task(served, "texts are written", "text_generation")
        value = json_body(parts, headers, served)
        parameters = check_values(self._parameters(value, served), served, self._names(value))
        prompts = self._prompts(value, served)
        stops = _strings({**served.manifest.parameters, **parameters}.get("stop"))
        choices = Choices(_count(value), stops, self._logprobs(value))
        if choices.logprobs is not None:
            details = {"details": True, "top_n_tokens": choices.logprobs}
            parameters = {**without_beams(parameters, served), **details}
        if boolean(value, "stream"):
            return self._streamed(value, prompts, parameters, choices, served, group)
        count, most = len(prompts) * choices.of_each, served.manifest.max_rows
        if count > most:
            message = f"the request asks for {count:,} texts; one request may have {most:,}; send several"
            raise InputTooLong(message, "prompt" if choices.of_each == 1 else "n")
        requests = [
            Request(fields, self._of_choice(parameters, served, i), group, where, continues=True)
            for fields, where in prompts
            for i in range(choices.of_each)
        ]
        return Body(requests, self._form(value, choices, served))

    def _streamed(
        self,
        value: Mapping[str, object],
        prompts: Sequence[Tuple[Mapping[str, object], str]],
        parameters: Mapping[str, object],
        choices: Choices,
        served: Served,
        group: int,
    ) -> Body:
        if len(prompts) > 1 or choices.of_each > 1:
            raise InvalidRequest("one text is streamed at a time: send one prompt, and n = 1", "n")
        if not served.task.has_parameter("stream"):
            raise InvalidRequest("this model's texts are not streamed; leave stream out", "stream")
        if boolean(value, "echo"):
            raise InvalidRequest('"echo" is not supported for streams', "echo")
        options = value.get("stream_options") or {}
        if not isinstance(options, dict):
            raise InvalidRequest(f'"stream_options" should be an object, not {kind_of(options)}', "stream_options")
        read_keys(options, {"include_usage": READ, "include_obfuscation": IGNORED}, "stream_options")
        [(fields, where)] = prompts
        request = Request(fields, {**parameters, "stream": True}, group, where, continues=True)
        frames = self._frames(choices, served, boolean(options, "include_usage"))
        return Body([request], self._form(value, choices, served), frames)

    @staticmethod
    def _of_choice(parameters: Mapping[str, Any], served: Served, number: int) -> Dict[str, Any]:
        """Give each choice its own seed."""
        seed = {**served.manifest.parameters, **parameters}.get("seed")
        # In a request that does not sample, the archive's seed would ask for it.
        if seed is None or not served.task.samples(parameters, served.manifest):
            return dict(parameters)
        return {**parameters, "seed": (seed + number) % 2**32}

    def _names(self, value: Mapping[str, object]) -> Dict[str, str]:
        own = {"details": "logprobs", "top_n_tokens": "top_logprobs", "num_beams": "n"}
        return {**foreign_names(self.keys, value), **own}

    def _parameters(self, value: Mapping[str, object], served: Served) -> Dict[str, object]:
        found = read_keys(value, self.keys)
        if served.task.has_parameter("return_full_text"):
            found["return_full_text"] = False
        return found

    def _prompts(self, value: Mapping[str, object], served: Served) -> List[Tuple[Mapping[str, object], str]]:
        raise NotImplementedError

    def _logprobs(self, value: Mapping[str, object]) -> Optional[int]:
        raise NotImplementedError

    def _form(self, value: Mapping[str, object], choices: Choices, served: Served) -> WrittenTexts:
        raise NotImplementedError

    def _frames(self, choices: Choices, served: Served, with_usage: bool) -> Chunks:
        raise NotImplementedError


class Completions(_Writing):
    """Completes prompts."""

    keys = _COMPLETIONS

    def _names(self, value: Mapping[str, object]) -> Dict[str, str]:
        return {**super()._names(value), "top_n_tokens": "logprobs"}

    def _parameters(self, value: Mapping[str, object], served: Served) -> Dict[str, object]:
        return {"max_new_tokens": _DEFAULT_TOKENS, **super()._parameters(value, served)}

    def _prompts(self, value: Mapping[str, object], served: Served) -> List[Tuple[Mapping[str, object], str]]:
        best = value.get("best_of")
        if best is not None and best != _count(value):
            raise InvalidRequest('"best_of" is not supported; leave it out', "best_of")
        texts = texts_of(require_key(value, "prompt"), "prompt", served)
        return [(checked_fields({"text": text}, served.task, where), where) for text, where in texts]

    def _logprobs(self, value: Mapping[str, object]) -> Optional[int]:
        wanted = value.get("logprobs")
        if wanted is None or wanted is False:
            return None
        if type(wanted) is not int or not 0 <= wanted <= _TOP_LOGPROBS:
            raise InvalidRequest(f'"logprobs" should be a whole number from 0 to {_TOP_LOGPROBS}', "logprobs")
        if boolean(value, "echo"):
            raise InvalidRequest('"echo" is not supported with "logprobs"', "echo")
        return wanted

    def _form(self, value: Mapping[str, object], choices: Choices, served: Served) -> WrittenTexts:
        echoed = [str(t) for t, _ in texts_of(value["prompt"], "prompt", served)] if boolean(value, "echo") else []
        return CompletionTexts({"text": "prompt"}, self._names(value), choices=choices, echoed=echoed)

    def _frames(self, choices: Choices, served: Served, with_usage: bool) -> Chunks:
        return CompletionChunks(choices, served, with_usage)


class Chat(_Writing):
    """Answers chats."""

    keys = _CHAT

    def _prompts(self, value: Mapping[str, object], served: Served) -> List[Tuple[Mapping[str, object], str]]:
        if not served.task.has_field("messages"):
            raise wrong_task(served, "chats are continued", "text_generation")
        messages = require_key(value, "messages")
        if not isinstance(messages, list):
            raise InvalidRequest(f'"messages" should be a list, not {kind_of(messages)}', "messages")
        own = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        return [(checked_fields({"messages": own}, served.task, ""), "")]

    def _logprobs(self, value: Mapping[str, object]) -> Optional[int]:
        most = value.get("top_logprobs")
        if most is not None and (type(most) is not int or not 0 <= most <= _TOP_LOGPROBS):
            raise InvalidRequest(f'"top_logprobs" should be a whole number from 0 to {_TOP_LOGPROBS}', "top_logprobs")
        if not boolean(value, "logprobs"):
            if most:
                raise InvalidRequest('"top_logprobs" needs "logprobs": true', "top_logprobs")
            return None
        return most or 0

    def _form(self, value: Mapping[str, object], choices: Choices, served: Served) -> WrittenTexts:
        return ChatTexts({}, self._names(value), choices=choices)

    def _frames(self, choices: Choices, served: Served, with_usage: bool) -> Chunks:
        return ChatChunks(choices, served, with_usage)


def _message(message: object, where: str) -> object:
    """Convert a message to ours, whose content is one text."""
    if not isinstance(message, dict):
        raise InvalidRequest('a message is an object like {"role": "user", "content": "..."}', where)
    read_keys(message, _MESSAGE, where)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    role = message.get("role")
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}


def _part(part: object, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise InvalidRequest('this model reads text: a part is an object like {"type": "text", "text": "..."}', where)
    return text


def _count(value: Mapping[str, object]) -> int:
    count = value.get("n")
    if count is None:
        return 1
    if type(count) is not int or not 1 <= count <= _MOST_CHOICES:
        raise InvalidRequest(f'"n" should be a whole number from 1 to {_MOST_CHOICES}', "n")
    return count


def _strings(value: object) -> List[str]:
    return value if isinstance(value, list) else [] if value is None else [str(value)]
