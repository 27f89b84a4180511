"""A share of the live requests, asked of the new version too: clients get the old one's answers, and theirs are compared.

The old version's workers show what they answered on a socket in the server's own folder (`traceserve_runtime.mirror`); the
texts stay in this process's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Optional, Set, Tuple, Union

from traceserve_runtime.tasks.contract import Request, Task

from traceserve.building.gate.drift import score_difference
from traceserve.building.gate.golden import GoldenSample
from traceserve.checking.comparing import AnswerChange, same_meaning
from traceserve.checking.verifying import AskedServer
from traceserve.machine.private_files import write_private
from traceserve.rollout.replaying import asked, what_is_asked
from traceserve.serving.configuration import MIRROR_FILE
from traceserve.serving.instances import Instance

_SOCKET = "mirror.sock"  # in the server's folder
_LONGEST = 1 << 20  # bytes of a datagram
_POLL = 0.2  # seconds


@dataclass(frozen=True)
class ShadowOptions:
    """The share of the old version's requests, above 0 up to 1, and for how many seconds."""

    share: float
    seconds: float = 30.0


@dataclass(frozen=True)
class Shadowed:
    """`shown` requests of the old version's arrived here, `compared` different ones of them were asked of both; `moved`:
    those that the new version answers otherwise; `drift`: the largest difference of the scores of equal answers."""

    shown: int
    compared: int
    moved: Tuple[AnswerChange, ...]
    drift: float


@contextlib.contextmanager
def _listening(instance: Instance, share: float) -> Iterator[socket.socket]:
    """Ask the server's workers for a share of their requests, until the end of the block."""
    document, path = Path(instance.folder, MIRROR_FILE), Path(instance.folder, _SOCKET)
    for left in (document, path):  # by an update that was killed
        left.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(_POLL)
        write_private(document, json.dumps({"share": share, "socket": str(path)}))
        try:
            yield listener
        finally:
            for made in (document, path):
                made.unlink(missing_ok=True)  # the server may have ended


def shadow(
    instance: Instance, old: AskedServer, new: AskedServer, task: Task, served: Tuple[str, str], options: ShadowOptions
) -> Shadowed:
    """Compare for the given time; `served` is the old version's name and version. Raises ServerError if one does not answer at
    all.

    Sampled and streamed texts have no answer to compare. A request that comes again is not asked again.
    """
    known: Set[bytes] = set()
    moved: List[AnswerChange] = []
    shown, drift = 0, 0.0
    end = time.monotonic() + options.seconds
    with _listening(instance, options.share) as listener:
        while time.monotonic() < end:
            sample = _received(listener, served)
            if sample is None:
                continue
            shown += 1
            request = Request(sample.inputs, sample.parameters)
            key = hashlib.sha256(what_is_asked(sample).encode()).digest()
            if key in known or task.streams(request) or not task.repeatable(request):
                continue
            known.add(key)
            change = _changed(old, new, task, sample, len(known))
            if isinstance(change, AnswerChange):
                moved.append(change)
            else:
                drift = max(drift, change)
    return Shadowed(shown, len(known), tuple(moved), drift)


def _received(listener: socket.socket, served: Tuple[str, str]) -> Optional[GoldenSample]:
    """Return the next request that this version answered, with its answer; None if none came, or another version's."""
    try:
        document: Mapping[str, Any] = json.loads(listener.recv(_LONGEST))
    except (socket.timeout, ValueError):
        return None
    if (document.get("name"), document.get("version")) != served:
        return None
    return GoldenSample(document["inputs"], document["parameters"], document["answer"])


def _changed(
    old: AskedServer, new: AskedServer, task: Task, sample: GoldenSample, number: int
) -> Union[AnswerChange, float]:
    """Return the change, or the difference of the scores of an equal answer."""
    after, failed = asked(new, task, sample)
    if failed:
        before, also_failed = asked(old, task, sample)  # what another protocol allows may be refused here
        return 0.0 if also_failed else AnswerChange(number, sample.inputs, before, after)
    if not same_meaning(task, after, sample.answer):
        return AnswerChange(number, sample.inputs, sample.answer, after)
    return score_difference(after, sample.answer)
