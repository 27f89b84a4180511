"""KServe's protocols besides predictions: the served model, its inputs and outputs, and its readiness.

TorchServe has none of these paths but /v2/health; other hosts pass them on. After `/predictions/NAME/VERSION/` they
exist on TorchServe too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Dict, List, Mapping, Union

from traceserve_runtime import __version__
from traceserve_runtime.errors import NotFound, NotOffered
from traceserve_runtime.json_types import JsonObject
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Document, Served
from traceserve_runtime.protocols.explaining import ExplainedBodies
from traceserve_runtime.protocols.fields import check_served
from traceserve_runtime.protocols.open_inference import OUTPUT
from traceserve_runtime.protocols.requests import KServeErrors, Native
from traceserve_runtime.protocols.wording import short


class ServerMetadata(KServeErrors):
    """The server's name and version, in the Open Inference Protocol."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Document:
        """Return the server's name, version and extensions."""
        return Document({"name": "traceserve", "version": __version__, "extensions": ["binary_tensor_data"]})


class ReadyState(KServeErrors):
    """An answer means that the worker runs, with its model loaded."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Document:
        """Say yes."""
        return Document({self._name: True})


class ModelMetadata(KServeErrors):
    """Everything below /v2/models/NAME, with or without /versions/VERSION."""

    def __init__(self) -> None:
        self._native = Native()
        self._explanations = ExplainedBodies()

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Union[Body, Document]:
        """Return a prediction, an explanation, or a document; raises NotFound for another model, version or path."""
        name, _, rest = headers.path.strip("/").partition("models/")[2].partition("/")
        check_served(name, served)
        if rest.startswith("versions/"):
            version, _, rest = rest[len("versions/") :].partition("/")
            if version != served.version:
                raise NotFound(f"version {short(version)} is not served here; {served.version} is")
        if rest == "infer":
            return replace(self._native.read(parts, headers, served, group), errors=self)
        if rest == "explain":
            return replace(self._explanations.read(parts, headers, served, group), errors=self)
        if rest not in ("", "ready"):
            raise NotFound(
                f"nothing is served at /{short(headers.path)}; behind the model there are /infer, /explain and /ready"
            )
        return Document({"name": served.name, "ready": True} if rest else _described(served))


class Prediction(KServeErrors):
    """POST /v1/models/NAME:predict and :explain"""

    def __init__(self) -> None:
        self._verbs: Dict[str, Union[Native, ExplainedBodies]] = {"predict": Native(), "explain": ExplainedBodies()}

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Return what is asked; raises NotFound for another model, and NotOffered for another verb."""
        name, _, verb = headers.path.strip("/").partition("models/")[2].rpartition(":")
        check_served(name, served)
        if verb not in self._verbs:
            raise NotOffered(f"the verb {short(verb)} is not offered here; {' and '.join(self._verbs)} are")
        return replace(self._verbs[verb].read(parts, headers, served, group), errors=self)


def _described(served: Served) -> JsonObject:
    """Return a model's metadata: the fields that the task requires are its inputs, or its first one; an element per request."""
    required = [field for field in served.task.fields if field.required] or served.task.fields[:1]
    inputs: List[JsonObject] = [{"name": field.name, "datatype": "BYTES", "shape": [-1]} for field in required]
    vectors = served.task.reads_vectors and served.manifest.parameters.get("pooling", "none") != "none"
    output: JsonObject = {"datatype": "FP32", "shape": [-1, -1]} if vectors else {"datatype": "BYTES", "shape": [-1]}
    return {
        "name": served.name,
        "versions": [served.version],
        "platform": f"traceserve_{served.manifest.save_mode}",
        "inputs": inputs,
        "outputs": [{"name": OUTPUT, **output}],
        # V2's place for what it does not define; `traceserve verify` compares the contents.
        "parameters": {
            "task": served.manifest.task,
            "dtype": served.manifest.dtype,
            "contents": served.manifest.contents,
        },
    }
