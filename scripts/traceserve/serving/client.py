"""A client of a running server's REST interface."""

from __future__ import annotations

import codecs
import contextlib
import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, Dict, Iterator, Optional, Tuple, cast

from traceserve.errors import ServerError, shortened
from traceserve.serving.front import context

# TorchServe's frontend answers 413 without a word, or ends the connection while the body is sent.
_ALWAYS_TAKEN = 2 << 20  # bytes
_LONGEST_URL = 300  # characters of another server's that are shown
_TOO_LARGE = "the body is larger than this server takes (traceserve serve --largest-body MIB)"


@dataclass(frozen=True)
class Address:
    """A server's URL, what it demands, and the file of its certificate, if it uses TLS.

    A certificate is accepted for any name, since servers on this machine are reached by address, or only for the names
    in it.
    """

    url: str
    key: Optional[str] = None
    certificate: Optional[str] = None
    any_name: bool = True


class NotYet(ServerError):
    """The server is unreachable, or no worker is ready."""


class RequestRefused(ServerError):
    """The server answered with an error: `status` is the HTTP status, `words` only its message, and `field` the field
    that it is about, if any."""

    def __init__(self, message: str, status: int, words: str = "", field: Optional[str] = None) -> None:
        super().__init__(message, field)
        self.status = status
        self.words = words or message


def predict(address: Address, name: str, body: object, timeout: float = 300.0, method: str = "predictions") -> Any:
    """POST `body` as JSON to /predictions/NAME, or to another method of the model, and return the parsed answer; raises
    NotYet, RequestRefused, or ServerError if it is not JSON."""
    with post(address, name, body, timeout, method) as response:
        return _document(response, address.url)


def stream(address: Address, name: str, body: object, timeout: float = 300.0) -> Iterator[str]:
    """POST `body`, which requests a stream, and yield the text's pieces; raises NotYet or RequestRefused."""
    with post(address, name, body, timeout) as response:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for piece in iter(lambda: response.read1(1 << 16), b""):
            yield decoder.decode(piece)


@contextlib.contextmanager
def post(
    address: Address, name: str, body: object, timeout: float = 300.0, method: str = "predictions"
) -> Iterator[http.client.HTTPResponse]:
    """POST `body` as JSON to /predictions/NAME, or to another method of the model, and return the unread response; raises
    NotYet or RequestRefused."""
    request = urllib.request.Request(
        f"{address.url}/{method}/{name}",
        data=json.dumps(body).encode("utf-8"),
        headers={"Content-Type": "application/json", **_authorization(address.key)},
    )
    with _opened(request, address, f"{address.url} has no worker for {name} ready", timeout) as response:
        yield response


def get_document(address: Address, path: str, timeout: float = 30.0) -> Any:
    """GET a JSON document from the server; raises NotYet, RequestRefused, or ServerError if it is not JSON."""
    url = f"{address.url}/{path}"
    request = urllib.request.Request(url, headers=_authorization(address.key))
    with _opened(request, address, f"{address.url} has no {path}", timeout) as response:
        return _document(response, url)


def exchange(address: Address, body: Any = None, timeout: float = 60.0) -> Tuple[int, Any]:
    """POST `body` as JSON to any URL, or GET it if there is none; returns the status, whatever it is, and the parsed
    answer, or its text if it is no JSON. Raises NotYet if nothing answers."""
    data = None if body is None else json.dumps(body).encode("utf-8")
    kind = {} if data is None else {"Content-Type": "application/json"}
    request = urllib.request.Request(address.url, data=data, headers={**kind, **_authorization(address.key)})
    with _open(request, address, timeout) as response:
        return response.status, parsed(response.read())


def parsed(content: bytes) -> Any:
    """Return the JSON in an answer, or its text if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content.decode("utf-8", "replace")


def error_words(answer: Any) -> str:
    """Return the message of a parsed error answer."""
    return _message(answer)[0]


def _authorization(key: Optional[str]) -> Dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


@contextlib.contextmanager
def _opened(
    request: urllib.request.Request, address: Address, missing: str, timeout: float
) -> Iterator[http.client.HTTPResponse]:
    """Return a 2xx response; raises RequestRefused for others, or NotYet, where `missing` says what a 404 or 503 means."""
    with _open(request, address, timeout) as response:
        if 200 <= response.status < 300:
            yield response
            return
        answer = parsed(response.read())
        words, field = (_TOO_LARGE, None) if (response.status, answer) == (413, "") else _message(answer)
        if response.status in (404, 503):
            raise NotYet(f"{missing}: {words}")
        raise RequestRefused(words + (f" (at {field})" if field else ""), response.status, words, field)


@contextlib.contextmanager
def _open(request: urllib.request.Request, address: Address, timeout: float) -> Iterator[http.client.HTTPResponse]:
    """Return the response, whatever its status; raises NotYet if there is none, or if its connection breaks."""
    try:
        with _response(request, address, timeout) as response:
            yield response
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        cut_off = isinstance(reason, ConnectionError) and len(request.data or b"") > _ALWAYS_TAKEN  # type: ignore[arg-type]
        raise NotYet(f"{address.url} does not answer: {reason}{f'; perhaps {_TOO_LARGE}' if cut_off else ''}") from None


def _response(request: urllib.request.Request, address: Address, timeout: float) -> http.client.HTTPResponse:
    direct = _opener_for(address.certificate, address.any_name) if address.certificate else opener
    try:
        found = direct.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        found = error  # a response, too
    return cast(http.client.HTTPResponse, found)


def _document(response: http.client.HTTPResponse, source: str) -> Any:
    """Return the JSON in a response; raises ServerError."""
    try:
        return json.loads(response.read())
    except (ValueError, RecursionError) as error:
        raise ServerError(f"{source} gave no JSON: {error}") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Raises ServerError for a redirect: urllib would make an empty GET of a POST, and send the key to the other address."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        fp.close()
        raise ServerError(f"{req.full_url} redirects to {shortened(newurl, _LONGEST_URL)}; give that URL")


# Traceserve's servers are contacted directly, regardless of proxy settings.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


@lru_cache(maxsize=8)
def _opener_for(certificate: str, any_name: bool) -> urllib.request.OpenerDirector:
    trusted = context(certificate, any_name)
    by_tls = urllib.request.HTTPSHandler(context=trusted)
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects, by_tls)


def _message(answer: Any) -> Tuple[str, Optional[str]]:
    """Return the message of a parsed error answer, ours, the frontend's or another server's, and its field."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict):
        return str(error.get("message", error)), error.get("field")
    if isinstance(error, str):
        return error, None
    words = answer.get("message", answer) if isinstance(answer, dict) else answer
    return str(words).strip() or "no reason given", None
