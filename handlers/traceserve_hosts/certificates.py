"""The certificate of a server and its private key, which are given as files."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Optional, Union


def wrong_pair(certificate: Union[str, Path, None], key: Union[str, Path, None]) -> Optional[str]:
    """Why TLS cannot be had with the files given as --certificate and --key; None where it can, or none is asked for."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        return "--certificate and --key are given together, or not at all"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        return f"--certificate {certificate} and --key {key} make no pair: {error}"
    return None
