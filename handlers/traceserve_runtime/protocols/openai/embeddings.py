"""Models and embeddings."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Dict, Mapping, Sequence

import numpy as np

from traceserve_runtime.errors import InvalidRequest
from traceserve_runtime.json_types import Json, JsonObject
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Document, Served
from traceserve_runtime.protocols.fields import (
    IGNORED,
    READ,
    FieldPaths,
    Key,
    check_reads_vectors,
    check_served,
    check_values,
    foreign_names,
    json_body,
    pooled,
    read_keys,
    require_key,
    text_requests,
)
from traceserve_runtime.protocols.openai.shared import OpenAiErrors, texts_of, usage
from traceserve_runtime.tasks.contract import Answer

_EMBEDDINGS: Dict[str, Key] = {
    "input": READ,
    "model": IGNORED,
    "encoding_format": READ,
    "dimensions": Key("dimensions"),
    "user": IGNORED,
}


class Models(OpenAiErrors):
    """The list of models, which is the served one; or, at its own path, that model.

    KServe's first protocol has both paths too: its clients' keys are next to OpenAI's.
    """

    def __init__(self, single: bool = False) -> None:
        self._single = single

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Document:
        """Ignore the body; raises NotFound for a model other than this one."""
        if self._single:
            check_served(headers.path.strip("/").partition("models/")[2], served)
        model: JsonObject = {
            "id": served.name,
            "object": "model",
            "created": 0,
            "owned_by": "traceserve",
            "max_model_len": served.manifest.max_length,
        }
        if self._single:
            return Document({**model, "name": served.name, "ready": True})
        return Document({"object": "list", "data": [model], "models": [served.name]})


class Embeddings(OpenAiErrors):
    """Embeds texts with a feature extraction model."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Body:
        """Read the requests in `input`: a text, a list of texts, a list of token ids, or a list of such lists."""
        check_reads_vectors(served, "embeddings are made")
        value = json_body(parts, headers, served)
        parameters = check_values(read_keys(value, _EMBEDDINGS), served, foreign_names(_EMBEDDINGS))
        form = value.get("encoding_format") or "float"
        if form not in ("float", "base64"):
            raise InvalidRequest('"encoding_format" should be "float" or "base64"', "encoding_format")
        parameters = {**pooled(served), **parameters}
        requests = text_requests(texts_of(require_key(value, "input"), "input", served), parameters, served, group)
        return Body(requests, _Vectors({"text": "input"}, foreign_names(_EMBEDDINGS), encode=form == "base64"))


@dataclass(frozen=True)
class _Vectors(FieldPaths):
    encode: bool = False

    def reply(self, answers: Sequence[Answer], served: Served) -> Json:
        """Return the vectors in order; base64 holds little-endian float32."""
        data = [
            {"object": "embedding", "index": i, "embedding": self._written(answer.value)}
            for i, answer in enumerate(answers)
        ]
        return {"object": "list", "data": data, "model": served.name, "usage": usage(answers)}

    def _written(self, vector: Json) -> Json:
        if not self.encode:
            return vector
        return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode("ascii")
