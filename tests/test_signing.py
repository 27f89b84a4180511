"""Signatures of archives: made, demanded by every host, and never of another file than the one that is loaded."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List, NamedTuple, Tuple

import pytest

if sys.version_info < (3, 10):
    pytest.skip("model-signing needs Python 3.10", allow_module_level=True)

import traceserve
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from traceserve import cli
from traceserve.archives import signing
from traceserve.archives.archive import pack_archive
from traceserve.archives.contents import configure_archive, read_manifest, read_serving
from traceserve.errors import SignatureError
from traceserve.rollout.updating import UpdateOptions, update_server
from traceserve.serving import client, configuration, instances, server
from traceserve.serving.instances import Instance
from traceserve_hosts import fetching, ray_config, web
from traceserve_hosts.loading import load_archive
from traceserve_runtime.manifest import sha256


class Pair(NamedTuple):
    """The files of a private key and of its public one."""

    private: Path
    public: Path


def written(folder: Path, name: str, key: ec.EllipticCurvePrivateKey) -> Pair:
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.public.pem")
    pair.private.write_bytes(private_bytes(key))
    own = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    pair.public.write_bytes(own)
    return pair


def private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Tuple[Pair, Pair]:
    """Ours and a stranger's."""
    folder = tmp_path_factory.mktemp("keys")
    ours, other = (written(folder, name, ec.generate_private_key(ec.SECP256R1())) for name in ("ours", "other"))
    return ours, other


@pytest.fixture
def archive(mar: Path, tmp_path: Path) -> Path:
    """A copy of tiny.mar."""
    return Path(shutil.copy(mar, tmp_path / "tiny.mar"))


@pytest.fixture
def signed(archive: Path, keys: Tuple[Pair, Pair]) -> Path:
    signing.sign_archive(archive, keys[0].private)
    return archive


def refusal(archive: Path, trusted: Path) -> str:
    """The message of the refusal, of one line."""
    with pytest.raises(SignatureError) as caught, signing.verified([archive], trusted):
        pass
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_signed_archive_is_a_private_copy(signed: Path, keys: Tuple[Pair, Pair]) -> None:
    with signing.verified([signed], keys[0].public) as [copy]:
        assert copy != signed and sha256(copy) == sha256(signed)
        assert copy.parents[1].stat().st_mode & 0o077 == 0
    assert not copy.exists()


def test_what_is_checked_is_what_is_loaded(signed: Path, tmp_path: Path, keys: Tuple[Pair, Pair]) -> None:
    """The archive is exchanged while its signature is checked, and again right afterwards."""
    before, check = sha256(signed), signing.signature_check(keys[0].public)

    def exchanging(copy: Path, signature: Path) -> None:
        signed.write_bytes(b"another file, at the same address")  # the same inode
        check(copy, signature)

    folder = tmp_path / "private"
    folder.mkdir()
    copy = signing.copy_verified(signed, signing.signature_file(signed), folder / "tiny.mar", exchanging)
    assert sha256(copy) == before and copy.stat().st_ino != signed.stat().st_ino


def test_what_is_not_signed_is_refused(archive: Path, keys: Tuple[Pair, Pair]) -> None:
    assert f"{archive} is not signed: there is no tiny.mar.sig" in refusal(archive, keys[0].public)


def test_a_strangers_signature_is_refused(signed: Path, keys: Tuple[Pair, Pair]) -> None:
    assert "tiny.mar.sig is damaged, or was not made with the key of" in refusal(signed, keys[1].public)


def test_a_stale_signature_is_refused(signed: Path, keys: Tuple[Pair, Pair]) -> None:
    """`tune` changes the archive."""
    serving = read_serving(signed)
    configure_archive(signed, serving.__class__(**{**serving.__dict__, "workers": 7}))
    assert "it is not the file that was signed: it was changed" in refusal(signed, keys[0].public)
    signing.sign_archive(signed, keys[0].private)
    with signing.verified([signed], keys[0].public) as [copy]:
        assert read_serving(copy).workers == 7


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"verificationMaterial": 3}', b"x" * (2 << 20)]
)
def test_any_other_file_is_no_signature(signed: Path, keys: Tuple[Pair, Pair], content: bytes) -> None:
    signing.signature_file(signed).write_bytes(content)
    message = refusal(signed, keys[0].public)
    assert "is damaged, or was not made with" in message or "it is no signature" in message


def test_no_changed_byte_of_a_signature_is_accepted_for_another_file(signed: Path, keys: Tuple[Pair, Pair]) -> None:
    """It is refused, or its bundle says the same."""
    file = signing.signature_file(signed)
    content, changed = file.read_bytes(), signed.with_name("other")
    check = signing.signature_check(keys[0].public)
    changed.write_bytes(signed.read_bytes()[:-1] + b"!")
    for position in range(0, len(content), 23):
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(SignatureError):
            check(changed, file)


def test_a_signed_archive_does_not_stand_for_another(signed: Path, keys: Tuple[Pair, Pair]) -> None:
    """Both are ours: someone who may only rename must not exchange them."""
    renamed = signed.with_name("other.mar")
    shutil.copy(signed, renamed)
    shutil.copy(signing.signature_file(signed), signing.signature_file(renamed))
    assert "is the archive tiny, and a signed one keeps its name; call it tiny.mar" in refusal(renamed, keys[0].public)
    with pytest.raises(SignatureError, match="keeps its name"):
        signing.sign_archive(renamed, keys[0].private)


def test_files_that_are_no_keys(archive: Path, tmp_path: Path, keys: Tuple[Pair, Pair]) -> None:
    ours = keys[0]
    of_rsa = tmp_path / "rsa.pem"
    numbers = rsa.generate_private_key(65537, 2048)
    of_rsa.write_bytes(numbers.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()))
    locked = tmp_path / "locked.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    locked.write_bytes(
        key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.BestAvailableEncryption(b"secret"))
    )
    for file, words in (
        (of_rsa, "rsa.pem cannot sign tiny.mar.*elliptic curve"),
        (locked, "locked.pem cannot sign tiny.mar.*without a password"),
        (ours.public, "is no private key.* -out NEW.pem$"),  # not over the public one
        (archive, "is no PEM file"),
        (tmp_path / "none.pem", "none.pem cannot be read: No such file"),
    ):
        with pytest.raises(SignatureError, match=words):
            signing.sign_archive(archive, file)
        assert not signing.signature_file(archive).exists()
    assert "is a private key, which only signs" in refusal(archive, ours.private)
    assert "is no PEM file" in refusal(archive, archive)
    public = numbers.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    of_rsa.write_bytes(public)
    assert "rsa.pem is no public key of an elliptic curve" in refusal(archive, of_rsa)


def authority(folder: Path) -> Tuple[Path, Path, Path]:
    """An authority's certificate, and the certificate and key of a signer."""

    def issue(name: str, key: ec.EllipticCurvePrivateKey, by: str, signer: ec.EllipticCurvePrivateKey) -> Path:
        start = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
        names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, each)]) for each in (name, by)]
        builder = x509.CertificateBuilder().subject_name(names[0]).issuer_name(names[1]).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start)
        builder = builder.not_valid_after(start + datetime.timedelta(days=3650))
        builder = builder.add_extension(x509.BasicConstraints(name == by, None), True)
        usage = x509.KeyUsage(True, False, False, False, False, name == by, name == by, False, False)
        made = builder.add_extension(usage, True).sign(signer, hashes.SHA256())
        file = folder / f"{name}.certificate.pem"
        file.write_bytes(made.public_bytes(pem.Encoding.PEM))
        return file

    of_authority, of_signer = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    key = folder / "signer.pem"
    key.write_bytes(private_bytes(of_signer))
    root = issue("authority", of_authority, "authority", of_authority)
    return root, issue("signer", of_signer, "authority", of_authority), key


def test_a_certificate_of_a_trusted_authority(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    root, certificate, key = authority(tmp_path)
    another, *_ = authority(tmp_path / "other")
    signing.sign_archive(archive, key, certificate)
    with signing.verified([archive], root):
        pass
    assert "was not made with a certificate of" in refusal(archive, another)
    archive.write_bytes(archive.read_bytes()[:-1])
    assert "it is not the file that was signed" in refusal(archive, root)


def test_the_command_says_how_to_go_on(
    archive: Path, keys: Tuple[Pair, Pair], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sign", str(archive), "--key", str(keys[0].private)]) == 0
    assert f"traceserve serve {archive} --require-signature public.pem" in capsys.readouterr().out
    (archive.parent / "a [b]").mkdir()
    spaced = archive.rename(archive.parent / "a [b]" / archive.name)
    assert cli.main(["sign", str(spaced), "--key", str(keys[0].private)]) == 0
    assert f"traceserve serve '{spaced}' --require-signature public.pem" in capsys.readouterr().out
    assert cli.main(["sign", str(archive), "--key", str(keys[0].private), "--chain", "x.pem"]) == 1
    assert cli.main(["sign", str(archive.with_name("none.mar")), "--key", str(keys[0].private)]) == 1


def test_inspect_says_whether_a_signature_lies_beside_it(
    archive: Path, keys: Tuple[Pair, Pair], capsys: pytest.CaptureFixture[str]
) -> None:
    def document(*options: str) -> object:
        assert cli.main(["inspect", str(archive), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["signature"]

    assert document() == {"file": None, "checked_by": None}
    assert cli.main(["inspect", str(archive), "--require-signature", str(keys[0].public)]) == 2
    signing.sign_archive(archive, keys[0].private)
    assert document() == {"file": "tiny.mar.sig", "checked_by": None}
    trusted = str(keys[0].public)
    assert document("--require-signature", trusted) == {"file": "tiny.mar.sig", "checked_by": trusted}
    assert cli.main(["inspect", str(archive), "--require-signature", trusted]) == 0
    assert f"tiny.mar.sig beside it, made with the key of {trusted}" in " ".join(capsys.readouterr().out.split())


def test_serve_refuses_in_one_line(archive: Path, keys: Tuple[Pair, Pair]) -> None:
    command = [sys.executable, "-m", "traceserve", "serve", str(archive), "--require-signature", str(keys[0].public)]
    result = subprocess.run(command, capture_output=True, text=True)
    [line] = result.stderr.splitlines()
    assert result.returncode == 1 and line.startswith(f"error: {archive} is not signed")


def test_without_the_package_it_says_what_to_install(
    archive: Path, keys: Tuple[Pair, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert r"pip install 'traceserve[sign]'" in refusal(archive, keys[0].public)


def test_what_a_cluster_or_a_container_fetches(
    signed: Path, tmp_path: Path, keys: Tuple[Pair, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a path, by an address, and where it was fetched before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours, other = (pair.public.read_text() for pair in keys)
    expected = sha256(signed)
    for address in (str(signed), f"file://{signed}"):
        assert fetching.fetch_archive(address, expected, ours).name == expected
        with pytest.raises(RuntimeError, match="was not made with the key of"):
            fetching.fetch_archive(address, expected, other)
    with pytest.raises(RuntimeError, match="was not made with the key of"):  # in a process of its own
        load_archive(str(signed), trusted=other)
    with pytest.raises(RuntimeError, match="only a packed one"):
        load_archive(str(fetching.fetch_archive(str(signed))), trusted=ours)
    signing.signature_file(signed).unlink()
    with pytest.raises(RuntimeError, match="there is no signature at file://"):
        fetching.fetch_archive(f"file://{signed}", expected, ours)
    monkeypatch.setenv(web.SIGNER_VARIABLE, str(keys[0].public))
    with pytest.raises(RuntimeError, match="is not signed"):
        web.loaded(str(signed))
    assert "is not signed" in (web.main([str(signed), "--require-signature", str(keys[0].public)]) or "")


HOSTED = """
import sys
from pathlib import Path
from traceserve_hosts.loading import load_archive
load_archive(sys.argv[1], name=sys.argv[3], version="1.0", trusted=Path(sys.argv[2]).read_text())
"""


def test_a_host_serves_a_signed_archive_under_its_own_name(signed: Path, keys: Tuple[Pair, Pair]) -> None:
    """Every host loads as this process does."""
    for name, code, words in (("tiny", 0, ""), ("other", 1, "tiny 1.0, and a signed one is not served as other 1.0")):
        command = [sys.executable, "-c", HOSTED, str(signed), str(keys[0].public), name]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == code and words in result.stderr, result.stderr


def test_a_program_loads_only_what_is_signed(signed: Path, artifact: Path, keys: Tuple[Pair, Pair]) -> None:
    ours, other = (pair.public for pair in keys)
    assert traceserve.load(signed, require_signature=ours)("Yes.")["label"]
    for archive, key, words in ((signed, other, "was not made with"), (artifact, ours, "is a folder")):
        with pytest.raises(SignatureError, match=words):
            traceserve.load(archive, require_signature=key)


def test_a_cluster_knows_the_key_and_not_only_its_file(keys: Tuple[Pair, Pair]) -> None:
    text = keys[0].public.read_text()
    [found] = ray_config.applications([ray_config.Hosted("s3://archives/tiny.mar", "tiny", "1.0", trusted=text)])
    assert isinstance(found["args"], dict) and found["args"]["trusted"] == text
    [found] = ray_config.applications([ray_config.Hosted("s3://archives/tiny.mar", "tiny", "1.0")])
    assert isinstance(found["args"], dict) and "trusted" not in found["args"]  # which older images do not know


def test_a_server_that_demands_signatures_takes_no_other_update(
    signed: Path, artifact: Path, tmp_path: Path, keys: Tuple[Pair, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the key's file, from the first moment on; over the real TorchServe."""
    key = Path(shutil.copy(keys[0].public, tmp_path / "key.pem"))
    (tmp_path / "new").mkdir()
    newer = pack_archive(artifact, "tiny", tmp_path / "new", version="2.0")
    port = configuration.free_ports(1)[0]
    told: List[str] = []
    remembered, remember = [], instances.remember

    def noting(instance: Instance) -> None:
        remembered.append(instance.trusted)
        remember(instance)

    def while_it_starts(step: str) -> None:
        """The key's file becomes another one, and somebody updates."""
        shutil.copy(keys[1].public, key)
        with pytest.raises(SignatureError, match="is not signed"):
            update_server(newer, port, UpdateOptions())
        told.append(step)

    monkeypatch.setattr(instances, "remember", noting)
    instance = server.start([signed], port=port, timeout=180, trusted=key, progress=while_it_starts)
    try:
        assert told == ["waiting for tiny to answer"] and set(remembered) == {instance.trusted} != {None}
        with pytest.raises(SignatureError, match="is not signed"):
            update_server(newer, port, UpdateOptions())
        signing.sign_archive(newer, keys[1].private)
        with pytest.raises(SignatureError, match="was not made with"):
            update_server(newer, port, UpdateOptions())
        signing.sign_archive(newer, keys[0].private)
        assert update_server(newer, port, UpdateOptions()).new == "2.0"
        assert client.predict(instance.address, "tiny", {"text": "Yes."}, 60.0)
    finally:
        instances.stop(instances.find_instance(port))
    assert read_manifest(signed).version == "1.0" and not os.path.exists(instance.folder)


def test_a_key_is_read_once(signed: Path, tmp_path: Path, keys: Tuple[Pair, Pair]) -> None:
    """Whoever may write its file cannot exchange it between the check and what is remembered."""
    file = Path(shutil.copy(keys[0].public, tmp_path / "key.pem"))
    pem = signing.read_trusted(file)
    shutil.copy(keys[1].public, file)
    with signing.verified([signed], pem):
        pass
    assert pem.content == keys[0].public.read_bytes()
    assert f"was not made with the key of {file}" in refusal(signed, file)
    with pytest.raises(SignatureError, match="has more than 1,048,576 bytes"):
        file.write_bytes(keys[0].public.read_bytes() + bytes(1 << 20))
        signing.read_trusted(file)


def test_only_an_archive_is_signed(artifact: Path, keys: Tuple[Pair, Pair], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(artifact), "--require-signature", str(keys[0].public)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "is a folder, and only an archive (.mar) is signed" in said and "does not exist" not in said


@pytest.mark.parametrize("trouble", [MemoryError(), OSError(5, "Input/output error")])
def test_a_machines_trouble_is_no_bad_signature(
    trouble: Exception, signed: Path, keys: Tuple[Pair, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_signing import hashing

    def failing(*arguments: object, **options: object) -> None:
        raise trouble

    monkeypatch.setattr(hashing.Config, "hash", failing)
    message = refusal(signed, keys[0].public)
    assert f"{signed}: its signature cannot be checked on this machine: {type(trouble).__name__}" in message
    assert "damaged" not in message
