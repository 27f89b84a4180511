"""uvicorn as a host: one archive, one process, no JVM; the server of small containers.

    python -m traceserve_hosts.web ARCHIVE [--host H] [--port P] [--require-signature PUBLIC_KEY]

Where TRACESERVE_KEY is set every request but /ping and /health needs it, as `Authorization: Bearer KEY`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

from traceserve_hosts.asgi import Application, Asgi, Limits, key_from_environment
from traceserve_hosts.batcher import Batcher, Report
from traceserve_hosts.loading import load_archive

if TYPE_CHECKING:
    from traceserve_hosts.loading import Loaded

DIGEST_VARIABLE = "TRACESERVE_SHA256"  # of the archive that is meant
SIGNER_VARIABLE = (
    "TRACESERVE_REQUIRE_SIGNATURE"  # the file of the public key, or of certificates, that must have signed it
)
_GRACE = 30  # seconds in which a server that is told to end may finish what it was asked
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


def application(archive: Loaded, largest_body: int, report: Optional[Report] = None) -> Application:
    """The archive as an ASGI application; `largest_body` in bytes."""
    limits = Limits(key_from_environment(), largest_body, timeout=archive.timeout)
    return Application(
        archive.service, Batcher(archive.service, archive.batch_size, archive.batch_delay, report), limits
    )


def serve_until_signal(served: Asgi, host: str, port: int) -> None:
    """Serve until a signal comes."""
    import uvicorn

    uvicorn.run(
        served,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
    )


def main(arguments: Optional[Sequence[str]] = None) -> Optional[str]:
    """Serve; gives why it cannot, or None at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("archive", help="a .mar, the folder of one, or a URL of one")
    parser.add_argument("--name", help="under which it is served [the archive's own]")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--largest-body", type=int, default=64, metavar="MIB")
    parser.add_argument(
        "--require-signature", metavar="PUBLIC_KEY", help="or certificates: the archive has to be signed by it"
    )
    options = parser.parse_args(arguments)
    try:
        archive = loaded(options.archive, options.name, options.require_signature)
    except RuntimeError as error:
        return str(error)
    serve_until_signal(application(archive, options.largest_body << 20), options.host, options.port)
    return None


if __name__ == "__main__":
    sys.exit(main())  # 1 for a text, which goes to standard error
