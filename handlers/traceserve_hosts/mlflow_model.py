"""MLflow as a host: an archive as a pyfunc model, for `mlflow models serve`, batch jobs and whatever else reads such models.

A row of the input is a request: its columns are the task's fields, or a list is one of texts. The answers are a list, in order.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence

import mlflow
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException

from traceserve_hosts.loading import load_archive
from traceserve_hosts.tables import rows_of

if TYPE_CHECKING:
    from traceserve_runtime.service import Call, Reply, Service

ARTIFACT = "archive"  # the name of the archive's folder among the model's artifacts
_OK, _SERVER_ERROR = 200, 500


class ArchiveModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # mlflow has types for its users, not for mypy
    """One archive. A copy, also one in another process, loads it again."""

    _archive: Optional[str] = None  # its folder, once loaded

    def load_context(self, context: Any) -> None:
        """Load the archive; MLflow calls it once."""
        self._load(context.artifacts[ARTIFACT])

    def _load(self, archive: str) -> None:
        self._start_thread()
        self._archive = archive
        self._most = self._thread.submit(self._loaded).result().served.manifest.max_rows
        if hasattr(os, "register_at_fork"):
            own = weakref.WeakMethod(self._start_thread)
            os.register_at_fork(after_in_child=lambda: (own() or (lambda: None))())

    def _start_thread(self) -> None:
        """A service is for one thread, and MLflow's server answers in many. A forked process has none of its parent's."""
        self._thread = ThreadPoolExecutor(1, "traceserve")
        self._service: Optional[Service] = None  # torch's own threads are not there either, and it would wait for them

    def _loaded(self) -> Service:
        """Return the service, in the thread."""
        if self._service is None:
            self._service = load_archive(str(self._archive), own_process=False).service
        return self._service

    def _replies(self, calls: Sequence[Call]) -> List[Reply]:
        return self._loaded().answer(calls)

    def __getstate__(self) -> Dict[str, object]:
        return {"_archive": self._archive}

    def __setstate__(self, state: Mapping[str, Optional[str]]) -> None:
        if state["_archive"] is not None:
            self._load(state["_archive"])

    # Without types: MLflow reads them as a schema of the rows, and takes few.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """One answer for each row; raises MlflowException, which the scoring server answers with 400 where a row is wrong."""
        try:
            rows = rows_of(model_input)
        except ValueError as refusal:
            raise MlflowException(str(refusal), error_code=INVALID_PARAMETER_VALUE) from None
        # MLflow fills in the signature's defaults, which stand for parameters that are not set.
        parameters = {name: value for name, value in (params or {}).items() if value is not None and value != []}
        most = self._most
        answers: List[object] = []
        for start in range(0, len(rows), most):
            calls = [_call(row, parameters) for row in rows[start : start + most]]
            replies = self._thread.submit(self._replies, calls).result()
            answers += [_answer(reply, number) for number, reply in enumerate(replies, start)]
        return answers


def _call(row: object, parameters: Mapping[str, object]) -> Call:
    """Return the request of one row: each has the limits of a request to itself. In a list, so that none is streamed."""
    from traceserve_runtime.protocols.bodies import Headers
    from traceserve_runtime.service import Call

    body = {"inputs": [row], "parameters": parameters} if parameters else [row]
    encoded = json.dumps(body).encode("ascii")
    return Call({"body": encoded}, Headers("application/json", len(encoded)))


def _answer(reply: Reply, number: int) -> object:
    """Return the answer to a row; raises MlflowException, whose message names the row by its number in the table."""
    content = json.loads(reply.body)
    if reply.status == _OK:
        return content[0]
    error = content["error"]
    path = re.sub(r"^(inputs)?\[0\]", rf"\g<1>[{number}]", error.get("field") or "")
    message = error["message"] + (f" (at {path})" if path else "")
    if reply.status >= _SERVER_ERROR:
        raise MlflowException(message)
    raise MlflowException(message, error_code=INVALID_PARAMETER_VALUE)
