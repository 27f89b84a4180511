"""Requests for explanations: bodies as for predictions, with more parameters; each answer explains a prediction.

TorchServe marks what comes by `/explanations/NAME`, `/v1/models/NAME:explain` and `/v2/models/NAME/explain`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, List, Mapping, Sequence

from traceserve_runtime.errors import InvalidRequest, NotFound, TraceserveError
from traceserve_runtime.json_types import Json
from traceserve_runtime.protocols import bodies
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Refusal, Served
from traceserve_runtime.protocols.fields import classifies
from traceserve_runtime.protocols.kserve import Instances
from traceserve_runtime.protocols.requests import Native, errors_of, parse_value
from traceserve_runtime.protocols.wording import short
from traceserve_runtime.tasks.explained import explained


@dataclass(frozen=True)
class ExplainedInstances(Instances):
    """KServe V1's: the predictions beside their explanations."""

    def document(self, answers: Sequence[Json], served: Served) -> Json:
        predictions: List[Json] = [each["answer"] for each in answers if isinstance(each, dict)]
        return {"predictions": predictions, "explanations": list(answers)}


class ExplainedBodies:
    """Our own protocol and KServe's two, which are recognized by the body."""

    def __init__(self) -> None:
        self._native = Native()

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Read a call; raises NotOffered if the model's task has no explanations."""
        task = explained(served.task)
        value = bodies.read_body(parts, headers, task, served.manifest.max_rows)
        body = parse_value(value, task, group, served.manifest.max_rows, headers.infer)
        form = ExplainedInstances() if isinstance(body.protocol, Instances) else body.protocol
        chosen = _label_of_target(value, served)
        requests = [
            replace(request, explain=True, parameters={**chosen, **request.parameters}) for request in body.requests
        ]
        return Body(requests, form, errors=errors_of(body, headers))

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return the error in the format of its protocol."""
        return self._native.error(error, parts, headers, served)


def _label_of_target(value: object, served: Served) -> Dict[str, str]:
    """Return the label that `"target"` numbers in a body of the pytorch/serve example's clients; none for tasks whose
    target it is not. (For token classification they send a tuple, which was dropped before.)"""
    number = value.get("target") if isinstance(value, dict) else None
    labels = served.manifest.labels
    if type(number) is not int or not classifies(served) or not labels:
        return {}
    if not 0 <= number < len(labels):
        raise InvalidRequest(f"there are {len(labels):,} labels, numbered from 0", "target")
    return {"label": labels[number]}


class ExplanationsPath(ExplainedBodies):
    """What comes by a path for explanations."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Read a call; raises NotFound for a path behind the model's own."""
        if headers.path.strip("/"):
            raise NotFound(f"nothing is explained at /{short(headers.path)}; ask at /explanations/NAME itself")
        return super().read(parts, headers, served, group)
