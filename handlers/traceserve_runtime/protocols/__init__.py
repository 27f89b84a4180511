"""The protocols that clients speak: they turn what clients send into requests, and answers into responses."""

from __future__ import annotations

import re
from typing import Dict, Mapping, Pattern, Tuple, Union

from traceserve_runtime.errors import NotFound, TraceserveError
from traceserve_runtime.protocols import explaining, huggingface, metadata, openai, openapi, ranking, tei
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Document, Protocol, Refusal, Served
from traceserve_runtime.protocols.requests import KServeErrors, Native, NativeErrors
from traceserve_runtime.protocols.wording import short

# Keyed by the path behind the model's name and version.
PROTOCOLS: Dict[str, Protocol] = {
    "": Native(),
    "v1/models": openai.Models(),
    "v1/embeddings": openai.Embeddings(),
    "v1/completions": openai.Completions(),
    "v1/chat/completions": openai.Chat(),
    "v1/rerank": ranking.Rerank(),
    "v2/rerank": ranking.Rerank(),
    "v1/score": ranking.Score(),
    "v1/classify": ranking.Classify(),
    "rerank": ranking.Rerank(),  # also TEI's
    "score": ranking.Score(),
    "classify": ranking.Classify(),
    "embed": tei.Embed(),
    "embed_all": tei.Embed(all_tokens=True),
    "predict": tei.Predict(),
    "similarity": tei.Similarity(),
    "info": tei.Info(),
    "health": tei.Health(),
    "hf": huggingface.HuggingFace(),
    "openapi.json": openapi.OpenApi(),
    "docs": openapi.Page(),
    "v2": metadata.ServerMetadata(),
    "v2/health/live": metadata.ReadyState("live"),
    "v2/health/ready": metadata.ReadyState("ready"),
}
# By prefix, for paths that name a model; the first match counts.
_OF_MODELS: Tuple[Tuple[Pattern[str], Protocol], ...] = (
    (re.compile("v2/models/."), metadata.ModelMetadata()),
    (re.compile("(v1/)?models/.*:[^/]*$"), metadata.Prediction()),
    (re.compile("(v1/)?models/."), openai.Models(single=True)),
)


class _Nothing:
    """A path that serves nothing; tritonclient asks at some, as for a repository's index."""

    def read(self, parts: Mapping[str, object], headers: Headers, served: Served, group: int) -> Union[Body, Document]:
        known = ", ".join(f"/{path}" for path in sorted(PROTOCOLS) if path)
        raise NotFound(f"nothing is served at /{short(headers.path)}; behind the model's version there are: {known}")

    def error(self, error: TraceserveError, parts: Mapping[str, object], headers: Headers, served: Served) -> Refusal:
        """Return the error in the format of the path's clients."""
        of_kserve = headers.path.strip("/").startswith("v2/")
        return (KServeErrors() if of_kserve else NativeErrors()).error(error, parts, headers, served)


_NOTHING = _Nothing()
_EXPLANATIONS = explaining.ExplanationsPath()


def protocol_of(headers: Headers) -> Protocol:
    """Return the protocol of a call."""
    if headers.explain:
        return _EXPLANATIONS
    path = headers.path.strip("/")
    for begins, protocol in _OF_MODELS:
        if begins.match(path):
            return protocol
    if not path and huggingface.CLIENT in headers.client:
        path = "hf"
    # A version called v1 makes /predictions/NAME/v1 the base URL of OpenAI's clients.
    return PROTOCOLS.get(path) or PROTOCOLS.get(f"v1/{path}", _NOTHING)
