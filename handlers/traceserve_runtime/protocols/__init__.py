"""The protocols that clients speak: from what they sent to requests, and from answers to what they get."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Union

from traceserve_runtime.errors import NotFound, TraceserveError
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body, Document, Protocol, Served
from traceserve_runtime.protocols.requests import Native
from traceserve_runtime.protocols.wording import short

# By the path behind the model's name and version.
PROTOCOLS: Dict[str, Protocol] = {"": Native()}


class _Nothing:
    """A path at which nothing is served."""

    def read(self, parts: Mapping[str, Any], headers: Headers, served: Served, group: int) -> Union[Body, Document]:
        known = ", ".join(f"/{path}" for path in PROTOCOLS if path)
        raise NotFound(f"nothing is served at /{short(headers.path)}; behind the model's version there are: {known}")

    def error(self, error: TraceserveError, parts: Mapping[str, Any], headers: Headers, served: Served) -> Any:
        return error.to_json()


_NOTHING = _Nothing()


def protocol_of(headers: Headers) -> Protocol:
    """The protocol of a call."""
    return PROTOCOLS.get(headers.path.strip("/"), _NOTHING)
