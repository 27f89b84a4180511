"""Amazon SageMaker's contract for a container that serves a model:

    docker run IMAGE serve     starts it; the model's files lie in /opt/ml/model
    GET  /ping                 200 within two seconds where it can answer
    POST /invocations          a request, in any content type that the archive reads
    GET  /execution-parameters what batch transform may send

on the port SAGEMAKER_BIND_TO_PORT (8080). Bodies are limited by the archive's own limits; SageMaker limits them by the kind of
endpoint (6 MB or 25 MB where it answers at once, 1 GB where it is asynchronous), and in a batch transform by
SAGEMAKER_MAX_PAYLOAD_IN_MB, which /execution-parameters repeats. `InvokeEndpointWithResponseStream`
gets a stream in pieces. All other protocols stand behind /invocations by the header that a client may choose:
`X-Amzn-SageMaker-Custom-Attributes: path=v1/embeddings`.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Dict, Mapping, Optional, Sequence

from traceserve_hosts import web
from traceserve_hosts.asgi import Application, Receive, Refused, Scope, Send, guarded, headers_of, path_of, replied

MODEL = "/opt/ml/model"
_PATH = re.compile(r"(?:^|[,;\s])path=([\w./:-]+)")  # of a protocol, within the custom attributes
_SECONDS_OF_PING = 1.5  # SageMaker waits two
_LARGEST = 1024  # MB, of an asynchronous endpoint's body


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
            await self._application({**scope, "root_path": "", "path": _path(headers_of(scope))}, receive, send)
        else:
            raise Refused(
                404, "NotFound", "SageMaker asks /ping and /invocations; other paths go into a header, see the docs"
            )

    def _parameters(self) -> Dict[str, object]:
        return {
            "MaxConcurrentTransforms": self._batch_size,
            "BatchStrategy": "SINGLE_RECORD",
            "MaxPayloadInMB": min(self._megabytes, 100),
        }


def _path(headers: Mapping[str, str]) -> str:
    """Where the application has what is asked: the task itself, or a protocol."""
    found = _PATH.search(headers.get("x-amzn-sagemaker-custom-attributes", ""))
    return f"/{found[1].strip('/')}" if found else "/"


def main(arguments: Sequence[str], model: str = MODEL, environment: Mapping[str, str] = os.environ) -> Optional[str]:
    """Serve the model's files; gives why they cannot be served, or None at the end."""
    if list(arguments) != ["serve"]:
        return f"SageMaker calls this container with `serve`, not with {' '.join(arguments) or 'nothing'}"
    port = environment.get("SAGEMAKER_BIND_TO_PORT", "8080")
    megabytes = environment.get("SAGEMAKER_MAX_PAYLOAD_IN_MB", str(_LARGEST))
    for name, value in (("SAGEMAKER_BIND_TO_PORT", port), ("SAGEMAKER_MAX_PAYLOAD_IN_MB", megabytes)):
        if not value.isdecimal() or int(value) < 1:
            return f"{name} should be a whole number of 1 or more, not {value!r}"
    try:
        archive = web.loaded(model)
        application = web.application(archive)
    except (RuntimeError, OSError) as error:  # a path may be refused
        return str(error)
    web.serve_until_signal(Container(application, archive.batch_size, int(megabytes)), "0.0.0.0", int(port))
    return None


if __name__ == "__main__":
    sys.exit(
        main(sys.argv[1:], os.environ.get("TRACESERVE_MODEL", MODEL))
    )  # 1 for a text, which goes to standard error
