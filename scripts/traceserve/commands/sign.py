"""sign: an archive's signature, by which others know who made it."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from traceserve_runtime.errors import TraceserveError

from traceserve.commands.contract import Command
from traceserve.commands.printing import print_line


def _add_sign(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "archives", nargs="+", type=Path, metavar="ARCHIVE", help="each gets its signature beside it, as NAME.mar.sig"
    )
    parser.add_argument(
        "--key",
        type=Path,
        required=True,
        metavar="KEY.pem",
        help="your private key, of an elliptic curve, without a password",
    )
    parser.add_argument(
        "--certificate",
        type=Path,
        metavar="CERT.pem",
        help="the key's certificate, for signatures: others then only need the authority's",
    )
    parser.add_argument(
        "--chain",
        type=Path,
        action="append",
        default=[],
        metavar="CERT.pem",
        help="a certificate between yours and the authority's; may be repeated",
    )


def _sign(options: argparse.Namespace) -> int:
    from traceserve.archives.signing import sign_archive

    if options.chain and not options.certificate:
        raise TraceserveError("sign: --chain needs --certificate, which it begins with")
    for archive in options.archives:
        signature = sign_archive(archive, options.key, options.certificate, options.chain)
        print_line(f"signed {archive}: {signature}")
    wanted = "AUTHORITY.pem" if options.certificate else "public.pem"
    files = " ".join(shlex.quote(str(archive)) for archive in options.archives)
    print_line(f"\n  traceserve serve {files} --require-signature {wanted}")
    return 0


COMMANDS = (
    Command(
        "sign",
        "Sign an archive, so that a server can know that it is yours.\n\nThe signature is of the whole file, by sigstore's "
        "model-signing, and needs no network; it is stale as soon as the archive\nis built, tuned or packed again. Where "
        "archives are served, --require-signature refuses every other one before any of\nit runs: a wrong, missing or stale "
        "signature is one line and exit code 1. A key is made once, and the private half\nstays where you sign:\n\n"
        "  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem\n"
        "  openssl pkey -in key.pem -pubout -out public.pem\n\n"
        "  traceserve sign model_store/NAME.mar --key key.pem\n"
        "  traceserve serve model_store/NAME.mar --require-signature public.pem\n\n"
        "It needs: pip install 'traceserve[sign]'",
        _add_sign,
        _sign,
    ),
)
