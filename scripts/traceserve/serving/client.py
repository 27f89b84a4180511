"""A client of a running server's REST interface."""

from __future__ import annotations

import codecs
import contextlib
import http.client
import json
import urllib.error
import urllib.request
from functools import lru_cache
from typing import Any, Dict, Iterator, Optional, Tuple

from traceserve.errors import ServerError
from traceserve.serving.front import context


class NotYet(ServerError):
    """The server is unreachable, or no worker is ready."""


class RequestRefused(ServerError):
    """The server answered with an error: `status` is the HTTP status, `words` only its message, and `field` the field
    that it is about, if any."""

    def __init__(self, message: str, status: int, words: str = "", field: Optional[str] = None) -> None:
        super().__init__(message, field)
        self.status = status
        self.words = words or message


def predict(
    url: str,
    name: str,
    body: object,
    key: Optional[str] = None,
    timeout: float = 300.0,
    certificate: Optional[str] = None,
    door: str = "predictions",
) -> Any:
    """POST `body` as JSON to /predictions/NAME, or through another door, and return the parsed answer; raises NotYet or
    Refused.

    `certificate` is the file of the server's certificate, if it uses TLS.
    """
    with post(url, name, body, key, timeout, certificate, door=door) as response:
        try:
            return json.loads(response.read())
        except ValueError as error:
            raise ServerError(f"{url} gave no JSON: {error}") from None


def stream(
    url: str,
    name: str,
    body: object,
    key: Optional[str] = None,
    timeout: float = 300.0,
    certificate: Optional[str] = None,
) -> Iterator[str]:
    """POST `body`, which requests a stream, and yield the text's pieces; raises NotYet or Refused."""
    with post(url, name, body, key, timeout, certificate) as response:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for piece in iter(lambda: response.read1(1 << 16), b""):
            yield decoder.decode(piece)


@contextlib.contextmanager
def post(
    url: str,
    name: str,
    body: object,
    key: Optional[str] = None,
    timeout: float = 300.0,
    certificate: Optional[str] = None,
    any_name: bool = True,
    door: str = "predictions",
) -> Iterator[http.client.HTTPResponse]:
    """POST `body` as JSON to /predictions/NAME, or another door, and return the unread response; raises NotYet or Refused.

    A certificate is accepted for any name, since servers on this machine are reached by address, or only for the names
    in it.
    """
    request = urllib.request.Request(
        f"{url}/{door}/{name}",
        data=json.dumps(body).encode("utf-8"),
        headers={"Content-Type": "application/json", **_authorization(key)},
    )
    with _opened(request, f"{url} has no worker for {name} ready", url, timeout, certificate, any_name) as response:
        yield response


def get_document(
    url: str,
    path: str,
    key: Optional[str] = None,
    timeout: float = 30.0,
    certificate: Optional[str] = None,
    any_name: bool = True,
) -> Any:
    """GET a JSON document from the server; raises NotYet or Refused, or ServerError if it is not JSON."""
    request = urllib.request.Request(f"{url}/{path}", headers=_authorization(key))
    with _opened(request, f"{url} has no {path}", url, timeout, certificate, any_name) as response:
        try:
            return json.loads(response.read())
        except ValueError as error:
            raise ServerError(f"{url}/{path} is no JSON: {error}") from None


def exchange(
    url: str,
    body: Any = None,
    key: Optional[str] = None,
    timeout: float = 60.0,
    certificate: Optional[str] = None,
    any_name: bool = True,
) -> Tuple[int, Any]:
    """POST `body` as JSON to any URL, or GET it if there is none; returns the status, whatever it is, and the parsed
    answer, or its text if it is no JSON. Raises NotYet if nothing answers."""
    data = None if body is None else json.dumps(body).encode("utf-8")
    kind = {} if data is None else {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=data, headers={**kind, **_authorization(key)})
    try:
        with (_opener_for(certificate, any_name) if certificate else opener).open(request, timeout=timeout) as response:
            return response.status, parsed(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, parsed(error.read())
    except (OSError, http.client.HTTPException) as error:
        raise NotYet(f"{url} does not answer: {getattr(error, 'reason', error)}") from None


def parsed(content: bytes) -> Any:
    """Return the JSON in an answer, or its text if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content.decode("utf-8", "replace")


def error_words(answer: Any) -> str:
    """Return the message of a parsed error answer."""
    return _message(json.dumps(answer).encode() if not isinstance(answer, str) else answer.encode())[0]


def _authorization(key: Optional[str]) -> Dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextlib.contextmanager
def _opened(
    request: urllib.request.Request,
    missing: str,
    url: str,
    timeout: float,
    certificate: Optional[str],
    any_name: bool,
) -> Iterator[http.client.HTTPResponse]:
    """Return the response, with its errors as ours; `missing` says what a 404 or 503 means."""
    try:
        with (_opener_for(certificate, any_name) if certificate else opener).open(request, timeout=timeout) as response:
            yield response
    except urllib.error.HTTPError as error:
        words, field = _message(error.read())
        if error.code in (404, 503):
            raise NotYet(f"{missing}: {words}") from None
        raise RequestRefused(words + (f" (at {field})" if field else ""), error.code, words, field) from None
    except (OSError, http.client.HTTPException) as error:
        raise NotYet(f"{url} does not answer: {error}") from None


# Traceserve's servers are contacted directly, regardless of proxy settings.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@lru_cache(maxsize=8)
def _opener_for(certificate: str, any_name: bool) -> urllib.request.OpenerDirector:
    trusted = context(certificate, any_name)
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted))


def _message(body: bytes) -> Tuple[str, Optional[str]]:
    """Return the message of an error response, ours or the frontend's, and its field."""
    try:
        content = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace").strip() or "no reason given", None
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, str):
        return error, None
    if isinstance(error, dict):
        return str(error["message"]), error.get("field")
    return str(content.get("message", content)) if isinstance(content, dict) else str(content), None
