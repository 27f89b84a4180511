"""Whose answer a reply is, TorchServe's frontend's or the worker's, and whether it may be as it is."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Dict, Mapping, NamedTuple, Optional, Sequence

from traceserve_runtime.tasks import TASKS

FORM, MULTIPART = "application/x-www-form-urlencoded", "multipart/form-data"
_UNREADABLE = "ErrorDataDecoderException"


class Known(NamedTuple):
    """A 5xx of TorchServe's own frontend, see docs/frontend.md: for which requests, and the whole message."""

    content: str  # how the request's content type begins
    status: int
    type: str
    message: str  # a pattern


KNOWN: Sequence[Known] = (
    Known(FORM, 500, _UNREADABLE, r"Bad string: '.*'"),
    Known(FORM, 500, _UNREADABLE, r"Invalid hex byte at index '\d+' in string: '.*'"),
    Known(FORM, 500, _UNREADABLE, r"java\.lang\.IllegalArgumentException: empty name"),
    Known(FORM, 500, _UNREADABLE, r"Bad end of line"),
    Known(MULTIPART, 500, _UNREADABLE, r'java\.lang\.NullPointerException: .*"nameAttribute" is null'),
    Known(MULTIPART, 500, _UNREADABLE, r"java\.lang\.IllegalArgumentException: empty name"),
    Known(MULTIPART, 500, _UNREADABLE, r"TransferEncoding Unknown: .*"),
    Known(MULTIPART, 500, _UNREADABLE, r"java\.nio\.charset\.\w+CharsetException: .*"),
    Known(MULTIPART, 500, "ArrayIndexOutOfBoundsException", r"Index \d+ out of bounds for length \d+"),
)
_EXPLAINED = re.compile(r"/explanations/.*|/v1/models/[^/]+:explain|/v2/models/[^/]+/explain")


class Reply(NamedTuple):
    """An answer over HTTP, and what of its request decides whether it may be so."""

    path: str
    content_type: str
    status: int
    body: bytes

    @property
    def whose(self) -> str:
        """Who wrote it; an exception that the worker's handler let through has the frontend's form."""
        return "worker" if self._frontends() is None else "frontend"

    def is_failure(self, task: str) -> bool:
        """Whether it is a 5xx that an archive of this task must not be answered with."""
        if self.status < 500:
            return False
        answer = self._frontends()
        if answer is not None:
            return not any(self._is(known, answer) for known in KNOWN)
        if not _EXPLAINED.fullmatch(self.path):
            return True
        if TASKS[task].explains is None:
            return self.status != 501
        return (self.status, self._type()) != (503, "OutOfTime")  # the fifth at a time, or out of its seconds

    def _is(self, known: Known, answer: Mapping[str, object]) -> bool:
        return (
            self.content_type.startswith(known.content)
            and (self.status, answer["code"], answer["type"]) == (known.status, known.status, known.type)
            and re.fullmatch(known.message, str(answer["message"]), re.DOTALL) is not None
        )

    def _frontends(self) -> Optional[Dict[str, object]]:
        """TorchServe's own document; None for any other."""
        with contextlib.suppress(ValueError):
            answer = json.loads(self.body)
            if isinstance(answer, dict) and set(answer) == {"code", "type", "message"}:
                return answer
        return None

    def _type(self) -> object:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return json.loads(self.body)["error"]["type"]
        return None
