"""MLflow as a host: an archive as a pyfunc model, for `mlflow models serve`, batch jobs and whatever else reads such models.

A row of the input is a request: its columns are the task's fields, or a list is one of texts. The answers are a list, in order.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException

from traceserve_hosts.loading import load_archive
from traceserve_hosts.tables import rows_of

ARTIFACT = "archive"  # the name of the archive's folder among the model's artifacts
_OK, _SERVER_ERROR = 200, 500


class ArchiveModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # mlflow has types for its users, not for mypy
    """One archive."""

    def load_context(self, context: Any) -> None:
        """Load the archive; MLflow calls it once. A service is for one thread, and MLflow's server answers in many."""
        self._thread = ThreadPoolExecutor(1, "traceserve")
        self._service = self._thread.submit(load_archive, context.artifacts[ARTIFACT]).result().service

    # Without types: MLflow reads them as a schema of the rows, and takes few.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """One answer for each row; raises MlflowException, which the scoring server answers with 400 where a row is wrong."""
        from traceserve_runtime.protocols.bodies import Headers
        from traceserve_runtime.service import Call

        try:
            body: object = rows_of(model_input)
        except ValueError as refusal:
            raise MlflowException(str(refusal), error_code=INVALID_PARAMETER_VALUE) from None
        if params:
            body = {"inputs": body, "parameters": dict(params)}
        encoded = json.dumps(body, ensure_ascii=False).encode("utf-8")
        call = Call({"body": encoded}, Headers("application/json", len(encoded)))
        [reply] = self._thread.submit(self._service.answer, [call]).result()
        content = json.loads(reply.body)
        if reply.status == _OK:
            return list(content)
        error = content["error"]
        message = error["message"] + (f" (at {error['field']})" if error.get("field") else "")
        if reply.status >= _SERVER_ERROR:
            raise MlflowException(message)
        raise MlflowException(message, error_code=INVALID_PARAMETER_VALUE)
