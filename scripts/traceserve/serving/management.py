"""TorchServe's API for registering models, switching versions and removing them, and who reaches it.

Who may register a model runs code as this user. So the API listens on a Unix socket in the server's own folder, which
nobody else may enter. TorchServe also offers it over gRPC, which cannot be turned off and knows only TCP: that is bound
to the loopback network's broadcast address, to which Linux connects nobody. Where either is impossible, the API listens
on the loopback address as before, without what registers and removes.
"""

from __future__ import annotations

import errno
import http.client
import os
import platform
import socket
import sys
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict

from traceserve.serving import client
from traceserve.serving.instances import Instance

SOCKET = "management.sock"  # in a server's folder
NOBODY = "127.255.255.255"
_NATIVE = (
    "x86_64",
    "aarch64",
)  # processors for which TorchServe brings Netty's native transport, which Unix sockets need
_SECONDS_TO_ANSWER = 30.0
_SECONDS_TO_REMOVE = 150.0  # more than TorchServe waits for a worker's end


@dataclass(frozen=True)
class Registered:
    """A version of a model, as TorchServe describes it."""

    version: str
    folder: str  # below the server's store
    workers: int  # wanted
    ready: int  # that have loaded it
    waiting: int  # requests in its queue
    response_timeout: int  # seconds
    continuous: bool  # texts join and leave a running batch


def is_private(folder: Path) -> bool:
    """Return whether the API of a server in this folder can be kept to this user."""
    if sys.platform != "linux" or platform.machine() not in _NATIVE:
        return False
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:  # Netty unpacks its native code there
        return False
    return folder.stat().st_mode & 0o077 == 0 and _is_unreachable(NOBODY)


def _is_unreachable(address: str) -> bool:
    """Return whether a listener at this address can be had, and nobody can connect to it."""
    with socket.socket() as listener, socket.socket() as caller:
        try:
            listener.bind((address, 0))
            listener.listen()
        except OSError:
            return False
        caller.settimeout(1)
        return caller.connect_ex(listener.getsockname()) == errno.ENETUNREACH


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def call(instance: Instance, method: str, path: str, timeout: float = _SECONDS_TO_ANSWER) -> Any:
    """Send a request without a body to the API, and return the parsed answer; raises NotYet or RequestRefused."""
    connection: http.client.HTTPConnection = (
        _SocketConnection(instance.management_socket, timeout)
        if instance.management_socket
        else http.client.HTTPConnection("127.0.0.1", instance.management_port, timeout=timeout)
    )
    headers = {"Authorization": f"Bearer {instance.management_key}"} if instance.management_key else {}
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        status, content = response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise client.NotYet(f"TorchServe's management API does not answer: {error}") from None
    finally:
        connection.close()
    answer = client.parsed(content)
    if status >= 300:
        words = client.error_words(answer)
        raise client.RequestRefused(words, status, words)
    return answer


def registered(instance: Instance, name: str, timeout: float = _SECONDS_TO_ANSWER) -> Dict[str, Registered]:
    """Return the versions of a model; raises ServerError."""
    return {each.version: each for each in map(_registered, call(instance, "GET", f"/models/{name}/all", timeout))}


def default(instance: Instance, name: str, timeout: float = _SECONDS_TO_ANSWER) -> Registered:
    """Return the version that answers where a request names none; raises ServerError."""
    [described] = call(instance, "GET", f"/models/{name}", timeout)
    return _registered(described)


def _registered(described: Dict[str, Any]) -> Registered:
    workers = described["workers"]
    return Registered(
        described["modelVersion"],
        described["modelUrl"],
        described["minWorkers"],
        sum(worker["status"] == "READY" for worker in workers),
        described["jobQueueStatus"]["pendingRequests"],
        described["responseTimeout"],
        bool(described.get("continuousBatching")),
    )


def register_version(instance: Instance, name: str, folder: str, workers: int) -> None:
    """Register the version in this folder of the store, and start its workers.

    It does not wait for them: meanwhile TorchServe would leave requests on some connections unread.
    """
    values = {"url": folder, "model_name": name, "initial_workers": workers, "synchronous": "false"}
    query = urllib.parse.urlencode(values)
    call(instance, "POST", f"/models?{query}", _SECONDS_TO_REMOVE)


def set_default(instance: Instance, name: str, version: str) -> None:
    """Let this version answer where a request names none."""
    call(instance, "PUT", f"/models/{name}/{version}/set-default")


def unregister(instance: Instance, name: str, version: str) -> None:
    """Remove a version and end its workers, whatever they do."""
    call(instance, "DELETE", f"/models/{name}/{version}", _SECONDS_TO_REMOVE)
