"""Explains an archive's answers in this process, as a worker would."""

from __future__ import annotations

import json
from pathlib import Path

from traceserve_runtime.engine import Engine
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.service import Call, Service

from traceserve.archives import contents
from traceserve.archives.staging import scratch
from traceserve.errors import ServerError


def explain_archive(path: Path, body: object) -> object:
    """Return the explanation, or the list of explanations, of what a body asks an archive; raises ServerError."""
    with scratch() as folder:
        contents.unpack(path, folder)
        engine = Engine.load(folder)
        service = Service(engine, engine.manifest.name, engine.manifest.version)
        call = Call({"body": json.dumps(body).encode("utf-8")}, Headers("application/json", explain=True))
        [reply] = service.answer([call])
    answer = json.loads(reply.body)
    if reply.status != 200:
        error = answer["error"]
        raise ServerError(error["message"] + (f" (at {error['field']})" if error["field"] else ""))
    return answer
