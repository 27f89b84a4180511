"""A running server's REST interface."""

from __future__ import annotations

import codecs
import contextlib
import http.client
import json
import urllib.error
import urllib.request
from functools import lru_cache
from typing import Any, Iterator, Optional

from traceserve.errors import ServerError
from traceserve.serving.front import context


class NotYet(ServerError):
    """The server cannot be reached, or has no worker ready."""


class Refused(ServerError):
    """The server answered with an error; `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def predict(
    url: str, name: str, body: Any, key: Optional[str] = None, timeout: float = 300.0, certificate: Optional[str] = None
) -> Any:
    """POST `body` as JSON to /predictions/NAME and give the parsed answer; raises NotYet or Refused.

    `certificate` is the file of the one that the server has, where it speaks TLS.
    """
    with _post(url, name, body, key, timeout, certificate) as response:
        try:
            return json.loads(response.read())
        except ValueError as error:
            raise ServerError(f"{url} gave no JSON: {error}") from None


def stream(
    url: str, name: str, body: Any, key: Optional[str] = None, timeout: float = 300.0, certificate: Optional[str] = None
) -> Iterator[str]:
    """POST `body`, which asks for a stream, and give the text's pieces as they come; raises NotYet or Refused."""
    with _post(url, name, body, key, timeout, certificate) as response:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for piece in iter(lambda: response.read1(1 << 16), b""):
            yield decoder.decode(piece)


@contextlib.contextmanager
def _post(
    url: str, name: str, body: Any, key: Optional[str], timeout: float, certificate: Optional[str]
) -> Iterator[http.client.HTTPResponse]:
    request = urllib.request.Request(
        f"{url}/predictions/{name}",
        data=json.dumps(body).encode("utf-8"),
        headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
    )
    try:
        with (_opener_for(certificate) if certificate else opener).open(request, timeout=timeout) as response:
            yield response
    except urllib.error.HTTPError as error:
        message = _message(error.read())
        if error.code in (404, 503):
            raise NotYet(f"{url} has no worker for {name} ready: {message}") from None
        raise Refused(message, error.code) from None
    except (OSError, http.client.HTTPException) as error:
        raise NotYet(f"{url} does not answer: {error}") from None


# Servers of traceserve are reached directly, whatever proxy the environment names.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@lru_cache(maxsize=8)
def _opener_for(certificate: str) -> urllib.request.OpenerDirector:
    handler = urllib.request.HTTPSHandler(context=context(certificate))
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), handler)


def _message(body: bytes) -> str:
    """What an error answer says, ours or the frontend's own."""
    try:
        content = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip() or "no reason given"
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, str):
        return error
    if isinstance(error, dict):
        return str(error["message"]) + (f" (at {error['field']})" if error.get("field") else "")
    return str(content.get("message", content)) if isinstance(content, dict) else str(content)
