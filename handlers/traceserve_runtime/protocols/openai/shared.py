"""Parts common to all paths of OpenAI's API: errors, usage, response heads, and input texts."""

from __future__ import annotations

import time
import uuid
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from traceserve_runtime.errors import InputTooLong, InvalidRequest, TraceserveError
from traceserve_runtime.json_types import Json, JsonObject
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Refusal, Served
from traceserve_runtime.protocols.wording import kind_of
from traceserve_runtime.tasks.contract import Answer

_ERRORS = {404: "not_found_error", 500: "server_error", 501: "server_error"}


class OpenAiErrors:
    """The error format of all of them."""

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return the error in OpenAI's format."""
        return refusal_of(error)


def refusal_of(error: TraceserveError, **more: Json) -> Refusal:
    """Return an error with `more` keys, and OpenAI's status: 400 for a text that is longer than the model reads."""
    document = {**error_document(error), **more}
    if _exceeds_context(error):
        return Refusal(document, InvalidRequest.status, InvalidRequest.phrase)
    return Refusal.of(document, error)


def error_document(error: TraceserveError) -> JsonObject:
    """Return an error as OpenAI's clients expect it."""
    kind = _ERRORS.get(error.status, "invalid_request_error")
    code = "context_length_exceeded" if _exceeds_context(error) else type(error).__name__
    return {"error": {"message": plain_message(error), "type": kind, "param": error.field, "code": code}}


def plain_message(error: TraceserveError) -> str:
    """Return an error's message without advice of our own parameters, which OpenAI's bodies cannot have."""
    return error.bare if isinstance(error, InputTooLong) else error.message


def _exceeds_context(error: TraceserveError) -> bool:
    return isinstance(error, InputTooLong) and error.exceeds_context


def usage(answers: Sequence[Answer], completion: Optional[int] = None) -> Dict[str, int]:
    """Return the number of tokens read, and of those written if any."""
    read = sum(answer.tokens for answer in answers)
    if completion is None:
        return {"prompt_tokens": read, "total_tokens": read}
    return {"prompt_tokens": read, "completion_tokens": completion, "total_tokens": read + completion}


def texts_of(value: object, name: str, served: Served) -> List[Tuple[object, str]]:
    """Return the texts of a prompt or input, each with its path. Token ids are decoded to text."""
    if isinstance(value, str):
        return [(value, name)]
    if not isinstance(value, list):
        raise InvalidRequest(f'"{name}" should be a string or a list of strings, not {kind_of(value)}', name)
    if not value:
        raise InvalidRequest(f'"{name}" is an empty list: it asks nothing', name)
    if _are_ids(value):
        return [(_text_of(value, name, served), name)]
    named = [(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value[0], list):
        return named
    for item, where in named:
        if not isinstance(item, list) or not _are_ids(item):
            raise InvalidRequest(f'"{name}" begins with a list, so each item should be a list of token ids', where)
    return [(_text_of(item, where, served), where) for item, where in named]


def _text_of(ids: Sequence[int], where: str, served: Served) -> str:
    try:
        return served.text_of(ids)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, f"{where}{error.field}") from None


def _are_ids(value: Sequence[object]) -> bool:
    return bool(value) and all(type(item) is int for item in value)


def head(prefix: str, kind: str, served: Served) -> JsonObject:
    """Return the common head of a response."""
    return {"id": prefix + uuid.uuid4().hex, "object": kind, "created": int(time.time()), "model": served.name}
