"""uvicorn as a host: one archive, one process, no JVM; the server of small containers.

    python -m traceserve_hosts.web ARCHIVE [--host H] [--port P] [--require-signature PUBLIC_KEY]

Where TRACESERVE_KEY is set, or a file with a key in TRACESERVE_KEY_FILE, every request but those about health needs it, as
`Authorization: Bearer KEY`. Beyond the loopback address one has to be set, or --without-keys given.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

from traceserve_hosts import KEY_FILE_VARIABLE, KEY_VARIABLE, earlier_runtimes
from traceserve_hosts.addresses import is_only_local
from traceserve_hosts.asgi import Application, Asgi, Limits, key_from_environment
from traceserve_hosts.batcher import Batcher
from traceserve_hosts.certificates import wrong_pair
from traceserve_hosts.loading import load_archive

if TYPE_CHECKING:
    from traceserve_hosts.loading import Loaded

DIGEST_VARIABLE = "TRACESERVE_SHA256"  # of the archive that is meant
# The file of the public key, or of certificates, that must have signed it.
SIGNER_VARIABLE = "TRACESERVE_REQUIRE_SIGNATURE"
_GRACE = 30  # seconds in which a server that is told to end may finish what it was asked
# Seconds that a connection may idle: longer than proxies reuse one (nginx 60, AWS and Envoy 60, Knative 90), which would
# otherwise send a request just as it is closed.
_KEPT_ALIVE = 95
_DRIVER = Path("/dev/nvidiactl")  # is there where a GPU can be used


def loaded(address: str, name: Optional[str] = None, trusted: Optional[str] = None) -> Loaded:
    """The archive at an address, on a GPU where it is for one and there is one; raises RuntimeError.

    A folder may hold an archive as a file, as those into which KServe fetches. `trusted` is the file of a public key.
    """
    trusted = trusted or os.environ.get(SIGNER_VARIABLE) or None
    try:
        pem = Path(trusted).read_text(encoding="utf-8") if trusted else None
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the public key {trusted} cannot be read: {error}") from None
    packed = sorted(Path(address).glob("*.mar")) if Path(address).is_dir() else []
    if len(packed) == 1:
        address = str(packed[0])
    return load_archive(address, os.environ.get(DIGEST_VARIABLE) or None, name, gpu=_DRIVER.exists(), trusted=pem)


def application(archive: Loaded, largest_body: Optional[int] = None) -> Application:
    """The archive as an ASGI application; `largest_body` in bytes, by default what a request within its limits has at most."""
    from traceserve_runtime.texts.limits import RequestLimits

    if largest_body is None:
        manifest = archive.service.served.manifest
        allowed = RequestLimits.of(manifest.max_length, manifest.max_rows)
        largest_body = earlier_runtimes.body_limit(allowed, Limits.largest_body)
    limits = Limits(key_from_environment(), largest_body, timeout=archive.timeout)
    return Application(archive.service, Batcher(archive.service, archive.batch_size, archive.batch_delay), limits)


def end_at_sigterm() -> None:
    """Let SIGTERM end this process until uvicorn takes its place: by default a container's first process ignores it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def serve_until_signal(
    served: Asgi, host: str, port: int, certificate: Optional[str] = None, private_key: Optional[str] = None
) -> None:
    """Serve until a signal comes."""
    import uvicorn

    uvicorn.run(
        served,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEPT_ALIVE,
        timeout_graceful_shutdown=_GRACE,
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
    )


def main(arguments: Optional[Sequence[str]] = None) -> Optional[str]:
    """Serve; gives why it cannot, or None at the end."""
    end_at_sigterm()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("archive", help="a .mar, the folder of one, or a URL of one")
    parser.add_argument("--name", help="under which it is served [the archive's own]")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument(
        "--largest-body", type=int, metavar="MIB", help="[that of a request within the archive's limits]"
    )
    parser.add_argument(
        "--require-signature", metavar="PUBLIC_KEY", help="or certificates: the archive has to be signed by it"
    )
    parser.add_argument("--certificate", metavar="FILE", help="use TLS, with this certificate and its chain (PEM)")
    parser.add_argument("--key", metavar="FILE", help="its private key (PEM)")
    parser.add_argument("--without-keys", action="store_true", help="need none beyond the loopback address either")
    options = parser.parse_args(arguments)
    try:
        refused = _refusal(options)
        if refused is not None:
            return refused
        archive = loaded(options.archive, options.name, options.require_signature)
        served = application(archive, None if options.largest_body is None else options.largest_body << 20)
    except (RuntimeError, OSError) as error:  # a path may be refused
        return str(error)
    serve_until_signal(served, options.host, options.port, options.certificate, options.key)
    return None


def _refusal(options: argparse.Namespace) -> Optional[str]:
    """Why it must not, or cannot, serve like this; None where it may."""
    wrong = wrong_pair(options.certificate, options.key)
    if wrong is not None:
        return wrong
    key = key_from_environment()
    if options.without_keys or key is not None or is_only_local(options.host):
        return None
    return (
        f"at {options.host} others can ask too, so a key is needed: set {KEY_VARIABLE} or {KEY_FILE_VARIABLE}, or, where a proxy "
        "or a network's rules decide who may ask, give --without-keys"
    )


if __name__ == "__main__":
    sys.exit(main())  # 1 for a text, which goes to standard error
