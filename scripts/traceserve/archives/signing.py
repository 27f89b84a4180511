"""Signatures of archives, by sigstore's model-signing: made and checked offline, with a key or a certificate.

What is checked is what is loaded. An archive and its signature are copied into a folder that this user alone may enter,
the copy is checked, and everything that follows reads the copy: whoever may write the original cannot exchange it in
between.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, Union

from traceserve.archives import staging
from traceserve.archives.contents import read_manifest
from traceserve.errors import SignatureError, first_line
from traceserve.machine import space

SUFFIX = ".sig"  # behind the archive's whole name
_LARGEST = 1 << 20  # bytes, of a signature or a key
_NO_KEY = (ValueError, TypeError, AttributeError, OSError)  # model-signing's for keys that it does not take
_STALE = "Signature mismatch"  # how model-signing begins, if the signature is good and the file another one


def signature_file(archive: Path) -> Path:
    """Return where the signature of an archive lies: beside it, as NAME.mar.sig."""
    return archive.with_name(archive.name + SUFFIX)


def sign_archive(archive: Path, key: Path, certificate: Optional[Path] = None, chain: Sequence[Path] = ()) -> Path:
    """Sign an archive with a private key, write the signature beside it, and return its file; raises SignatureError.

    With a certificate of that key, those who check it only need to know the authority; `chain` has the ones between.
    """
    signing, _ = _model_signing()
    manifest = read_manifest(archive)  # it is ours, and not damaged
    if archive.stem != manifest.name:
        raise SignatureError(_of_another_name(archive, manifest.name))
    if b"PRIVATE KEY" not in _pem(key):
        raise SignatureError(
            f"{key} is no private key (PEM); make one: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "
            "NEW.pem"
        )
    target = signature_file(archive)
    with staging.staged(target) as folder:
        try:
            config = signing.Config()
            if certificate is None:
                config.use_elliptic_key_signer(private_key=key)
            else:
                between = chain or [certificate]  # model-signing 1.1 takes no empty chain
                config.use_certificate_signer(
                    private_key=key, signing_certificate=certificate, certificate_chain=between
                )
            config.sign(archive, folder / target.name)
        except _NO_KEY as error:  # also of an encrypted one, and of a certificate of another key
            raise SignatureError(
                f"{key} cannot sign {archive.name}: {first_line(error)}; a key of an elliptic curve (P-256, P-384, P-521) is "
                "needed, as PEM, without a password"
            ) from None
    return target


@dataclass(frozen=True)
class Trusted:
    """A public key or certificates (PEM) as they were read once, whatever becomes of their file."""

    file: Path
    content: bytes


def read_trusted(file: Path) -> Trusted:
    """Read a PEM file by which signatures are checked; raises SignatureError."""
    content = _pem(file)
    if b"PRIVATE KEY" in content:
        raise SignatureError(
            f"{file} is a private key, which only signs; the public one is made from it by: openssl pkey -in {file} "
            "-pubout -out public.pem"
        )
    return Trusted(file, content)


@contextlib.contextmanager
def verified(archives: Sequence[Path], trusted: Union[Path, Trusted, None]) -> Iterator[List[Path]]:
    """Yield private copies of archives whose signatures were checked; raises SignatureError.

    `trusted` is a PEM file, or what was read from one: the signer's public key, or certificates of authorities. Without
    it, the archives themselves are yielded, unchecked.
    """
    if trusted is None:
        yield list(archives)
        return
    check = signature_check(trusted)
    with staging.scratch() as scratch:
        copies = []
        for number, archive in enumerate(archives):
            folder = scratch / str(number)
            folder.mkdir()
            copies.append(copy_verified(archive, signature_file(archive), folder / archive.name, check))
        yield copies


SignatureCheck = Callable[[Path, Path], None]


def copy_verified(archive: Path, signature: Path, copy: Path, check: SignatureCheck) -> Path:
    """Copy an archive into a private folder, check the copy, and return it; raises SignatureError, NoSpace."""
    if archive.is_dir():
        raise SignatureError(
            f"{archive} is a folder, and only an archive (.mar) is signed; `traceserve build` makes one"
        )
    if not archive.is_file():
        raise SignatureError(f"{archive} does not exist; `traceserve build` makes it")
    if not signature.is_file():
        raise SignatureError(
            f"{archive} is not signed: there is no {signature.name} beside it; `traceserve sign {archive} --key KEY.pem` "
            "writes it"
        )
    size = archive.stat().st_size + _LARGEST
    space.require_space(copy.parent, size, f"a private copy of {archive.name}")
    with space.Needed(copy.parent, size, f"a private copy of {archive.name}"):
        shutil.copyfile(archive, copy)
        copied = signature_file(copy)
        if signature.stat().st_size > _LARGEST:
            raise SignatureError(f"{signature} has {signature.stat().st_size:,} bytes: it is no signature")
        shutil.copyfile(signature, copied)
    try:
        check(copy, copied)
    except SignatureError as error:
        raise SignatureError(f"{archive}: {error.message}") from None
    name = read_manifest(copy).name
    if archive.stem != name:
        raise SignatureError(_of_another_name(archive, name))
    return copy


def signature_check(trusted: Union[Path, Trusted]) -> SignatureCheck:
    """Return what checks an archive's signature against a PEM file; raises SignatureError for one that is none."""
    _, verifying = _model_signing()
    if isinstance(trusted, Path):
        trusted = read_trusted(trusted)
    file = trusted.file
    with staging.scratch() as scratch:
        own = scratch / "trusted.pem"  # model-signing takes no bytes, and reads it now
        own.write_bytes(trusted.content)
        try:
            if b"BEGIN CERTIFICATE" in trusted.content:
                config = verifying.Config().use_certificate_verifier(certificate_chain=[own])
                signer = "a certificate of"
            else:
                config = verifying.Config().use_elliptic_key_verifier(public_key=own)
                signer = "the key of"
        except _NO_KEY as error:
            raise SignatureError(
                f"{file} is no public key of an elliptic curve and no certificate (PEM): {first_line(error)}"
            ) from None

    def check(archive: Path, signature: Path) -> None:
        try:
            config.verify(archive, signature)
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and space.is_full(error):
                raise
            raise SignatureError(f"its signature cannot be checked on this machine: {first_line(error)}") from None
        except Exception as error:  # a signature is a stranger's document, and its parsers raise whatever they like
            if str(error).startswith(_STALE):
                raise SignatureError(
                    "it is not the file that was signed: it was changed, damaged or exchanged afterwards; if the change is "
                    "yours, sign it again"
                ) from None
            raise SignatureError(
                f"{signature.name} is damaged, or was not made with {signer} {file}; take the archive and its signature "
                "from whoever signed it"
            ) from None

    return check


def _of_another_name(archive: Path, name: str) -> str:
    """Say that one signed archive must not stand for another: the file's name is where it answers."""
    return f"{archive} is the archive {name}, and a signed one keeps its name; call it {name}.mar"


def _pem(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise SignatureError(f"{file} cannot be read: {error.strerror}") from None
    if b"-----BEGIN " not in content:
        raise SignatureError(f"{file} is no PEM file, which begins with -----BEGIN")
    if len(content) > _LARGEST:
        raise SignatureError(f"{file} has more than {_LARGEST:,} bytes: it is no file of keys or certificates")
    return content


def _model_signing() -> Tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        older = " (this is an older Python)" if sys.version_info < (3, 10) else ""
        raise SignatureError(
            f"signatures need the package model-signing, and Python 3.10 or newer{older}: {error}; install it with: pip install "
            "'traceserve[sign]'"
        ) from None
    return signing, verifying
