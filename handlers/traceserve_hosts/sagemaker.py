"""Amazon SageMaker's contract for a container that serves a model:

    docker run IMAGE serve     starts it; the model's files lie in /opt/ml/model
    GET  /ping                 200 within two seconds where it can answer
    POST /invocations          a request, in any content type that the archive reads
    GET  /execution-parameters what batch transform may send

on the port SAGEMAKER_BIND_TO_PORT (8080). Bodies are limited by the archive's own limits; SageMaker limits them by the kind of
endpoint (6 MB or 25 MB where it answers at once, 1 GB where it is asynchronous), and in a batch transform by
SAGEMAKER_MAX_PAYLOAD_IN_MB (0: not at all). /execution-parameters has the lower limit.
`Accept: application/jsonlines` gets a list of answers as one line for each, and `InvokeEndpointWithResponseStream`
a stream in pieces. All other protocols stand behind /invocations by the header that a client may choose:
`X-Amzn-SageMaker-Custom-Attributes: path=v1/embeddings`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from traceserve_hosts import web
from traceserve_hosts.asgi import (
    Application,
    Message,
    Receive,
    Refused,
    Scope,
    Send,
    guarded,
    headers_of,
    in_parts,
    path_of,
    replied,
)

MODEL = "/opt/ml/model"
_ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
_PATH = re.compile(r"(?:^|[,;\s])path=([\w./:-]+)(?=$|[,;\s])")  # of a protocol, within the custom attributes
_MEANT_AS_A_PATH = re.compile(r"""(?<![\w./-])path["']?\s*[=:]""", re.IGNORECASE)
_SECONDS_OF_PING = 1.5  # SageMaker waits two
_LARGEST = 1024  # MB, of an asynchronous endpoint's body
_ALL_PAYLOADS = 100  # MB, of all concurrent requests of a batch transform, by SageMaker's own limit
_LINES = "application/jsonlines"


class Container:
    """An ASGI application that answers as SageMaker asks, by an archive's own."""

    def __init__(self, application: Application, batch_size: int, megabytes: int) -> None:
        self._application = application
        self._batch_size = batch_size
        self._megabytes = megabytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await guarded(self._answer, scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope)
        if path == "/ping":
            problem = await self._application.broken(_SECONDS_OF_PING)
            await replied(send, 503 if problem else 200, {"status": problem or "Healthy"})
        elif path == "/execution-parameters":
            await replied(send, 200, self._parameters())
        elif path == "/invocations":
            headers = headers_of(scope)
            asked = _path(headers)
            send = InLines(send) if asked == "/" and _wants_lines(headers) else send
            await self._application({**scope, "root_path": "", "path": asked}, receive, send)
        else:
            raise Refused(
                404, "NotFound", "SageMaker asks /ping and /invocations; other paths go into a header, see the docs"
            )

    def _parameters(self) -> Dict[str, object]:
        payload = max(1, min(self._megabytes, self._application.largest_body >> 20, _ALL_PAYLOADS))
        return {
            "MaxConcurrentTransforms": max(1, min(self._batch_size, _ALL_PAYLOADS // payload)),
            "BatchStrategy": "SINGLE_RECORD",
            "MaxPayloadInMB": payload,
        }


class InLines:
    """Sends a list of answers as JSON lines: one line for each. Errors, other documents and streams stay as they are."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Optional[Message] = None  # held back until the whole body is known
        self._parts: List[bytes] = []

    async def __call__(self, message: Message) -> None:
        """Send one message of an answer."""
        if message["type"] == "http.response.start" and message["status"] == 200 and _may_be_a_list(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._parts.append(message["body"])
            if not message.get("more_body", False):
                start, body = _in_lines(self._start, b"".join(self._parts))
                await self._send(start)
                for part in in_parts(body):
                    await self._send(part)


def _may_be_a_list(start: Message) -> bool:
    """Whether an answer that starts so is a whole document of JSON: a stream has no length."""
    headers = dict(start["headers"])
    return b"content-length" in headers and headers.get(b"content-type") == b"application/json"


def _in_lines(start: Message, body: bytes) -> Tuple[Message, bytes]:
    """A whole answer, as JSON lines if it is a list."""
    answers = json.loads(body)
    if not isinstance(answers, list):
        return start, body
    body = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers).encode("utf-8")
    changed = {b"content-type": _LINES.encode(), b"content-length": str(len(body)).encode()}
    headers = [(name, changed.get(name, value)) for name, value in start["headers"]]
    return {**start, "headers": headers}, body


def _wants_lines(headers: Mapping[str, str]) -> bool:
    return headers.get("accept", "").partition(";")[0].strip().lower() == _LINES


def _path(headers: Mapping[str, str]) -> str:
    """Where the application has what is asked: the task itself, or a protocol; raises Refused for one that cannot be read."""
    attributes = headers.get(_ATTRIBUTES.lower(), "")
    found = _PATH.search(attributes)
    if found is None and _MEANT_AS_A_PATH.search(attributes):
        message = (
            f"the path in {_ATTRIBUTES} cannot be read: write path=v1/embeddings, without quotes and spaces, and with a comma, "
            "a semicolon or a space between it and other attributes"
        )
        raise Refused(400, "InvalidRequest", message)
    return f"/{found[1].strip('/')}" if found else "/"


def main(arguments: Sequence[str], model: str = MODEL, environment: Mapping[str, str] = os.environ) -> Optional[str]:
    """Serve the model's files; gives why they cannot be served, or None at the end."""
    web.end_at_sigterm()
    if list(arguments) != ["serve"]:
        return f"SageMaker calls this container with `serve`, not with {' '.join(arguments) or 'nothing'}"
    port = environment.get("SAGEMAKER_BIND_TO_PORT", "8080")
    megabytes = environment.get("SAGEMAKER_MAX_PAYLOAD_IN_MB", str(_LARGEST))
    for name, value, least in (("SAGEMAKER_BIND_TO_PORT", port, 1), ("SAGEMAKER_MAX_PAYLOAD_IN_MB", megabytes, 0)):
        if not value.isdecimal() or int(value) < least:
            return f"{name} should be a whole number of {least} or more, not {value!r}"
    try:
        archive = web.loaded(model)
        application = web.application(archive)
    except (RuntimeError, OSError) as error:  # a path may be refused
        return str(error)
    most = int(megabytes) or _LARGEST  # 0 is SageMaker's word for no limit
    web.serve_until_signal(Container(application, archive.batch_size, most), "0.0.0.0", int(port))
    return None


if __name__ == "__main__":
    sys.exit(
        main(sys.argv[1:], os.environ.get("TRACESERVE_MODEL", MODEL))
    )  # 1 for a text, which goes to standard error
