"""The page's own small server: who may reach it, and that nothing of it leaves this machine."""

from __future__ import annotations

import socket
import threading
from typing import Any, Awaitable, Callable, Dict, List, MutableMapping, Sequence

from traceserve_hosts.addresses import is_only_local

from traceserve.errors import ServerError
from traceserve.playground import interface
from traceserve.playground.models import Model

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, object]], Awaitable[None]]

Application = Callable[[Scope, object, Send], Awaitable[None]]

# What a browser that shows the page may load: nothing of any other host.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'self'; "
    "frame-ancestors 'none'; object-src 'none'"
)
_HEADERS = ((b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"no-referrer"))
# The paths of Gradio's that the page itself asks for; uploads, files, proxies, histories and the like are none of them.
_FILES = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/")
_PATHS = {
    *("", "/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json"),
    *(
        f"/gradio_api/{name}"
        for name in ("info", "queue/join", "queue/data", "cancel", "reset", "startup-events", "theme.css")
    ),
}
_SEEN_FROM_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # addresses that stand for all
_WAIT = 10.0  # seconds for the server to begin or to end


class Guarded:
    """An ASGI application of which only the page is there, and which tells browsers to load nothing from elsewhere."""

    def __init__(self, application: Application) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: object, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if path not in _PATHS and not path.startswith(_FILES):
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        await self._application(scope, receive, send_guarded)


class Server:
    """The page, served while this is entered; `url` is where."""

    def __init__(self, boards: Sequence[Sequence[Model]], host: str, port: int) -> None:
        self._host = host
        self._application = interface.playground_application(boards)
        self._socket = _listening(host, port)
        own = _SEEN_FROM_HERE.get(host, host)
        self.url = f"http://{f'[{own}]' if ':' in own else own}:{port}"

    def __enter__(self) -> Server:
        import uvicorn
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        # A page of another site, whose name was made to lead here, names itself in the header Host.
        hosts: List[str] = ["localhost", "127.0.0.1", "[::1]", "::1"] if is_only_local(self._host) else ["*"]
        application = TrustedHostMiddleware(Guarded(self._application), allowed_hosts=hosts)
        settings: Dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
        self._server = uvicorn.Server(uvicorn.Config(application, timeout_graceful_shutdown=1, **settings))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._thread.join(_WAIT)
        self._socket.close()

    def wait(self) -> None:
        """Return when the server has ended; an interrupt is met at once."""
        while self._thread.is_alive():
            self._thread.join(0.5)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; raises ServerError where that cannot be."""
    try:
        [(family, *_), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        own = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _not_there(host, port, error) from None
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind((host, port))
        own.listen(128)
    except OSError as error:
        own.close()
        raise _not_there(host, port, error) from None
    return own


def _not_there(host: str, port: int, error: OSError) -> ServerError:
    return ServerError(
        f"the page cannot be at {host}, port {port}: {error.strerror or error}; choose another with --host or --port"
    )
