"""MLflow as a host: an archive as a pyfunc model, for `mlflow models serve`, batch jobs and whatever else reads such models.

A row of the input is a request: its columns are the task's fields, or a list is one of texts. The answers are a list, in order.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List, Mapping

import mlflow
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException

from traceserve_hosts.loading import load_archive

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

        body: object = _rows(model_input)
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


def _rows(given: object) -> List[object]:
    """The requests in what MLflow hands over: a table, a dictionary of columns, or a list."""
    if hasattr(given, "to_dict"):  # of pandas
        return [_present(row) for row in given.to_dict("records")]
    if isinstance(given, Mapping):
        columns = {name: _listed(values) for name, values in given.items()}
        return [_present(dict(zip(columns, row))) for row in zip(*columns.values())]
    return _listed(given)


def _present(row: Mapping[object, object]) -> object:
    """A row without what its table leaves empty; of a table without names its only value."""
    found: Dict[str, object] = {str(name): _plain(value) for name, value in row.items() if not _is_empty(value)}
    return found["0"] if list(found) == ["0"] else found


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _plain(value: object) -> object:
    """numpy's values as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _listed(values: object) -> List[object]:
    plain = _plain(values)
    return plain if isinstance(plain, list) else [plain]
