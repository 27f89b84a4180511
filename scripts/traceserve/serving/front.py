"""Options of a server's front: CORS, TLS, keys, and limits."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, Optional, Union

from traceserve_hosts.certificates import wrong_pair
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.texts.limits import RequestLimits

from traceserve.errors import ServerError

_LARGEST_ANSWER = 64  # MiB; a batch of token embeddings is larger than TorchServe's default of 6.5 MB


@dataclass(frozen=True)
class FrontendOptions:
    """The frontend options of `traceserve serve`."""

    cors_origin: Optional[str] = None  # allowed origin of browser requests, "*": any
    certificate: Optional[Path] = None  # PEM, with its chain
    key: Optional[Path] = None  # PEM, without a password; for TorchServe RSA
    queue: int = 1000  # queued requests per model; any more are answered with 503
    # MiB, per request or answer; None: of a request what one within the archives' limits has at most.
    largest_body: Optional[int] = None
    keys: bool = True  # beyond the loopback address; without them something before it decides who may ask
    metrics_port: Optional[int] = None  # at the host's address; None: a free loopback port

    def check(self, only_rsa: bool = True) -> None:
        """Raise ServerError for values that the engine would fail on or ignore; `only_rsa`: it reads no other private keys."""
        for option, file in (("--certificate", self.certificate), ("--key", self.key)):
            if file is not None and not file.is_file():
                raise ServerError(f"{option} {file} is no file")
        wrong = wrong_pair(self.certificate, self.key)
        if wrong is not None:
            raise ServerError(wrong)
        if (
            only_rsa
            and self.key is not None
            and "EC PRIVATE KEY" in self.key.read_text(encoding="utf-8", errors="replace")
        ):
            raise ServerError(
                f"--key {self.key} is of an elliptic curve, and TorchServe reads RSA alone: --engine ray reads both"
            )

    @property
    def scheme(self) -> str:
        """The scheme of its URLs."""
        return "https" if self.certificate else "http"

    def largest_request(self, manifests: Iterable[Manifest]) -> int:
        """Return the bytes that a request to these archives may have."""
        if self.largest_body is not None:
            return self.largest_body << 20
        return max(RequestLimits.of(each.max_length, each.max_rows).largest_body for each in manifests)

    def properties(self, manifests: Iterable[Manifest]) -> Dict[str, Union[str, int, Path]]:
        """Return the options in config.properties of a server of these archives."""
        found: Dict[str, Union[str, int, Path]] = {
            "max_request_size": self.largest_request(manifests),
            "max_response_size": (self.largest_body or _LARGEST_ANSWER) << 20,
            "job_queue_size": self.queue,
        }
        if self.cors_origin is not None:
            found.update(
                cors_allowed_origin=self.cors_origin,
                cors_allowed_methods="GET, POST, OPTIONS",
                cors_allowed_headers="content-type, authorization",
            )
        if self.certificate and self.key:
            found.update(certificate_file=self.certificate.resolve(), private_key_file=self.key.resolve())
        return found


def context(certificate: str, any_name: bool = True) -> ssl.SSLContext:
    """Make a context for our calls to a server: it trusts this certificate itself; of a server on this machine whatever name
    it is for, else by `any_name=False` only for its own."""
    own = ssl.create_default_context(cafile=certificate)
    own.check_hostname = not any_name
    own.verify_flags |= _PARTIAL_CHAIN
    return own


_PARTIAL_CHAIN = (
    0x80000  # ssl.VERIFY_X509_PARTIAL_CHAIN since Python 3.10: trusts a certificate itself, without its issuer
)
