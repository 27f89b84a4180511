"""What the runtime of an earlier archive lacks, and what stands in for it.

An archive is answered by the runtime that it was packed with; each function names the last version without what it asks for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Dict, Mapping

if TYPE_CHECKING:
    from traceserve_runtime.manifest import Manifest
    from traceserve_runtime.protocols.contract import Served
    from traceserve_runtime.service import Session
    from traceserve_runtime.texts.limits import RequestLimits


def canary_body(served: Served) -> Mapping[str, object]:
    """A request that the archive answers; of 0.2.0 its task's sample, which a short `max_length` may refuse."""
    if hasattr(served.task, "canary_body"):
        return served.task.canary_body(served.manifest)
    return served.task.sample_body(served.manifest.facts)


def on_gpu(manifest: Manifest) -> bool:
    """Whether an archive was built for GPUs; manifests of 0.2.0 have the name of their hardware alone."""
    found: bool = getattr(manifest, "on_gpu", manifest.hardware == "gpu")
    return found


def body_limit(limits: RequestLimits, otherwise: int) -> int:
    """The bytes of the largest body within an archive's limits; 0.2.0 does not know them."""
    found: int = getattr(limits, "largest_body", otherwise)
    return found


def rest_of(session: Session) -> float:
    """For how many seconds a turn would do nothing, unless others join; 0.2.0, which explains nothing, has no such turns."""
    found: float = getattr(session, "rest", 0.0)
    return found


def mirror() -> Dict[str, Any]:
    """Where this process shows what it answered while a new version is compared, if it was told so, as an argument of a
    service; 0.2.0 shows nothing."""
    try:
        from traceserve_runtime.mirror import VARIABLE, Mirror
    except ImportError:
        return {}
    return {"mirror": Mirror(os.environ[VARIABLE])} if VARIABLE in os.environ else {}
