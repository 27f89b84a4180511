"""The load generator's requests: libcurl sends them, and says why one failed."""

from __future__ import annotations

import errno
import io
import os
import ssl
from typing import TYPE_CHECKING, Dict, List, Mapping

from traceserve.errors import ServerError

if TYPE_CHECKING:
    import pycurl


def require_libcurl() -> None:
    """Raise ServerError unless libcurl is installed."""
    try:
        import pycurl  # noqa: F401
    except ImportError:
        raise ServerError(
            "sending load needs the package pycurl; install it with: pip install 'traceserve[bench]'"
        ) from None


class Transfer:
    """A client with at most one request in flight; libcurl keeps its connection open between them."""

    def __init__(
        self, url: str, headers: Mapping[str, str], content_type: str, timeout: float, kept: bool = False
    ) -> None:
        """`kept`: the answers' bodies are kept; otherwise they are read and dropped."""
        import pycurl

        self.due = 0.0  # due time of the request in flight
        self.body = b""
        self.attempts = 0  # to send this request
        self._kept = kept
        self._answer = io.BytesIO()
        self.handle = pycurl.Curl()
        for option, value in _options(url, headers, content_type, timeout).items():
            self.handle.setopt(option, value)

    def prepare(self, due: float, body: bytes) -> None:
        """Prepare the next request.

        A body that cannot be read twice is not sent twice: otherwise libcurl would retry a request whose connection
        ends without an answer, and the failure would not be counted.
        """
        self.due, self.body, self.attempts = due, body, 0
        self.repeat()

    def repeat(self) -> None:
        """Prepare the same request again."""
        import pycurl

        self.attempts += 1
        body = self.body
        if self._kept:
            self._answer = io.BytesIO()
            self.handle.setopt(pycurl.WRITEFUNCTION, self._answer.write)
        self.handle.setopt(pycurl.READFUNCTION, io.BytesIO(body).read)
        self.handle.setopt(pycurl.POSTFIELDSIZE, len(body))

    @property
    def answer(self) -> bytes:
        """The last answer's body, if it is kept."""
        return self._answer.getvalue()

    @property
    def status(self) -> int:
        """The last answer's status."""
        import pycurl

        status: int = self.handle.getinfo(pycurl.RESPONSE_CODE)
        return status


def _options(url: str, headers: Mapping[str, str], content_type: str, timeout: float) -> Dict[int, object]:
    """Return libcurl's options. Callbacks are C functions: a signal's exception in Python code called by libcurl would
    be lost."""
    import pycurl

    authorities = ssl.get_default_verify_paths()
    options = {
        pycurl.URL: url,
        pycurl.PATH_AS_IS: True,
        pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
        pycurl.PROXY: "",  # whatever the environment sets
        pycurl.NOSIGNAL: True,
        pycurl.TIMEOUT_MS: max(1, int(1000 * timeout)),
        pycurl.POST: True,
        pycurl.USERAGENT: "",
        pycurl.HTTPHEADER: _lines(headers, content_type),
        pycurl.WRITEFUNCTION: len,  # reads an answer and drops it
        pycurl.CAINFO: authorities.cafile,
        pycurl.CAPATH: authorities.capath,
    }
    return {option: value for option, value in options.items() if value is not None}


def _lines(headers: Mapping[str, str], content_type: str) -> List[bytes]:
    """Return libcurl's headers; it adds Host and Content-Length, and without a value here Expect for large bodies."""
    names = {name.lower() for name in headers}
    given = {name: value for name, value in (("Content-Type", content_type),) if name.lower() not in names}
    lines = [f"{name}: {value}" if value else f"{name};" for name, value in {**given, **headers}.items()]
    return [line.encode("latin-1") for line in [*lines, "Expect:"]]


def retriable(status: int) -> bool:
    """Return whether a status asks clients to try again; the usual client libraries do at these."""
    return status in (429, 502, 503, 504)


def never_connected(code: int) -> bool:
    """Return whether a failed transfer did not reach the server."""
    import pycurl

    return code in (pycurl.E_COULDNT_RESOLVE_HOST, pycurl.E_COULDNT_CONNECT, *_tls_errors())


def failure_reason(handle: pycurl.Curl, code: int, message: str) -> str:
    """Return a short reason, the same for the same cause: errors are counted by it."""
    import pycurl

    if code == pycurl.E_COULDNT_CONNECT:
        number = handle.getinfo(pycurl.OS_ERRNO)
        return "connection refused" if number == errno.ECONNREFUSED else os.strerror(number)
    words = {
        pycurl.E_COULDNT_RESOLVE_HOST: "the host's name is unknown",
        pycurl.E_GOT_NOTHING: "connection closed without an answer",
        pycurl.E_SEND_FAIL_REWIND: "connection closed without an answer",
        pycurl.E_PARTIAL_FILE: "connection closed without an answer",
        pycurl.E_SEND_ERROR: "connection reset",
        pycurl.E_RECV_ERROR: "connection reset",
        pycurl.E_UNSUPPORTED_PROTOCOL: "an answer that is not HTTP",
        pycurl.E_FTP_WEIRD_SERVER_REPLY: "an answer that is not HTTP",  # also for HTTP
        **dict.fromkeys(_tls_errors(), "TLS failed"),
    }
    return words.get(code, message)


def _tls_errors() -> List[int]:
    import pycurl

    return [pycurl.E_SSL_CONNECT_ERROR, pycurl.E_PEER_FAILED_VERIFICATION, pycurl.E_SSL_CACERT_BADFILE]
