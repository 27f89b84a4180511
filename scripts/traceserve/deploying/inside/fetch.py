"""Fetch an archive and check its SHA-256; nothing lies under its name until it is whole and the right one.

    python -m traceserve.deploying.inside.fetch https://example.org/NAME.mar /archives/NAME.mar --sha256 HEX

http and https need nothing else; any other address (s3://, gs://, ...) is read by fsspec and its package for that kind (s3fs,
gcsfs).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import os
import sys
import urllib.request
from pathlib import Path
from typing import IO, Any, ContextManager, Optional, Sequence


def main(arguments: Optional[Sequence[str]] = None) -> Optional[str]:
    """Gives why the file is not there, or None where it is, and is the one that was meant."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("target", type=Path)
    parser.add_argument("--sha256", required=True)
    options = parser.parse_args(arguments)
    partial = options.target.with_name(f".{options.target.name}.{os.getpid()}")
    try:
        found = _copy(options.url, partial)
        if found != options.sha256.lower():
            raise ValueError(f"its SHA-256 is {found}, and should be {options.sha256}")
        os.replace(partial, options.target)
    except (OSError, ValueError, ImportError, http.client.HTTPException) as error:
        return f"{options.url} was not fetched: {error}"
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return None


def _copy(url: str, target: Path) -> str:
    """The SHA-256 of what was written."""
    digest = hashlib.sha256()
    with _opened(url) as source, target.open("wb") as sink:
        for part in iter(lambda: source.read(1 << 20), b""):
            digest.update(part)
            sink.write(part)
    return digest.hexdigest()


def _opened(url: str) -> ContextManager[IO[bytes]]:
    if url.startswith(("http://", "https://")):
        response: Any = urllib.request.urlopen(url, timeout=60)
        return response  # type: ignore[no-any-return]
    import fsspec  # comes with torch

    opened: Any = fsspec.open(url, "rb")
    return opened  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())  # 1 for a text, which goes to standard error
