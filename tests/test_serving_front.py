"""TorchServe's frontend as configured by `traceserve serve`: TLS, CORS, sizes and queues; over real HTTP."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterator, Tuple

import pytest
import trustme
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.errors import ServerError
from traceserve.measuring import activity
from traceserve.serving import configuration, instances, management, server
from traceserve.serving.client import RequestRefused
from traceserve.serving.front import FrontendOptions
from traceserve.serving.instances import Instance

HOST = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


def pair(folder: Path, kind: trustme.KeyType = trustme.KeyType.RSA) -> Tuple[Path, Path]:
    """A certificate for example.org, with its chain, and its key."""
    issued = trustme.CA().issue_cert("example.org", key_type=kind)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    return certificate, key


@pytest.fixture(scope="module")
def served(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """At an address of its own, with its metrics; Java reads its files' names in Latin-1."""
    folder = tmp_path_factory.mktemp("front") / "jörg 日本 𝄞"
    folder.mkdir()
    certificate, key = pair(folder)
    port, metrics = configuration.free_ports(2)
    front = FrontendOptions("https://example.org", certificate, key, queue=2, largest_body=1, metrics_port=metrics)
    packed = pack_archive(artifact, "tiny", folder)
    instance = server.start([packed], HOST, port, timeout=180, front=front)
    pair(folder)  # renewed: the server goes on with the earlier ones
    yield instance
    instances.stop(instance)


def ask(served: Instance, method: str, body: Any = None, **headers: str) -> Tuple[int, Any, bytes]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection(HOST, served.port, timeout=60, context=context)
    try:
        sent = {"Content-Type": "application/json", **headers}
        connection.request(method, "/predictions/tiny", None if body is None else json.dumps(body), sent)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def test_it_speaks_tls_and_our_own_commands_do(served: Instance, capsys: pytest.CaptureFixture[str]) -> None:
    assert served.url.startswith("https://")
    assert ask(served, "POST", "Yes.")[0] == 200
    assert cli.main(["predict", "tiny", "--port", str(served.port), "Yes."]) == 0
    assert "label" in json.loads(capsys.readouterr().out)


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such locks")
def test_its_folder_is_locked_as_long_as_it_runs(served: Instance) -> None:
    """So systemd-tmpfiles, which removes what has lain in /tmp for ten days, skips it and all below it."""
    import fcntl

    descriptor = os.open(served.folder, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
    assert served.locked


def test_its_metrics_are_read_where_they_are(served: Instance) -> None:
    before = activity.sample(served, "tiny").counters["ts_inference_requests_total"]
    assert ask(served, "POST", "Yes.")[0] == 200
    assert activity.sample(served, "tiny").counters["ts_inference_requests_total"] == before + 1


def test_pages_of_the_origin_may_ask(served: Instance) -> None:
    for method in ("POST", "OPTIONS"):
        status, headers, _ = ask(served, method, "Yes." if method == "POST" else None, Origin="https://example.org")
        assert status == 200 and headers["access-control-allow-origin"] == "https://example.org"
        assert "authorization" in headers["access-control-allow-headers"]


def test_what_is_larger_than_allowed_is_refused(served: Instance) -> None:
    assert ask(served, "POST", "a" * (2 << 20))[0] == 413
    assert ask(served, "POST", "Yes.")[0] == 200


def test_more_than_the_queue_holds_is_refused_at_once(served: Instance) -> None:
    """While the others are answered."""
    long = ["word " * 20] * 32
    with ThreadPoolExecutor(24) as pool:
        statuses = list(pool.map(lambda _: ask(served, "POST", long)[0], range(48)))
    assert set(statuses) == {200, 503}
    assert ask(served, "POST", "Yes.")[0] == 200


@pytest.mark.parametrize("missing", ["certificate", "key"])
def test_half_a_pair_is_refused(tmp_path: Path, missing: str) -> None:
    certificate, key = pair(tmp_path)
    front = FrontendOptions(
        certificate=None if missing == "certificate" else certificate, key=None if missing == "key" else key
    )
    with pytest.raises(ServerError, match="together"):
        front.check()


def test_files_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    certificate, key = pair(tmp_path)
    _, other = pair(tmp_path / "other")
    FrontendOptions(certificate=certificate, key=key).check()
    with pytest.raises(ServerError, match="make no pair"):
        FrontendOptions(certificate=certificate, key=other).check()
    with pytest.raises(ServerError, match="is no file"):
        FrontendOptions(certificate=certificate, key=tmp_path / "none.pem").check()


def test_a_key_that_torchserve_cannot_read_is_refused(tmp_path: Path) -> None:
    certificate, key = pair(tmp_path, trustme.KeyType.ECDSA)
    with pytest.raises(ServerError, match="RSA alone"):
        FrontendOptions(certificate=certificate, key=key).check()


def test_keys_and_the_metrics_place_are_chosen(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a container, before which a proxy or a network's rules decide who may ask.

    And on a system whose management API cannot be kept to one user: there it registers and removes nothing.
    """
    monkeypatch.setattr(management, "is_private", lambda folder: False)
    packed = pack_archive(artifact, "tiny", tmp_path)
    port, metrics = configuration.free_ports(2)
    front = FrontendOptions(keys=False, metrics_port=metrics)
    with pytest.raises(ServerError, match=rf"port {port} .*; choose another with --metrics-port"):
        with socket.socket() as taken:
            taken.bind(("0.0.0.0", port))
            taken.listen()
            server.start([packed], "0.0.0.0", metrics, front=FrontendOptions(keys=False, metrics_port=port))
    instance = server.start([packed], "0.0.0.0", port, timeout=180, front=front)
    try:
        assert instance.key is None and instance.metrics_port == metrics
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/predictions/tiny", b'"Yes."', {"Content-Type": "application/json"})
        assert connection.getresponse().status == 200
        connection.close()
        properties = Path(instance.folder, "config.properties").read_text()
        assert f"metrics_address=http://0.0.0.0:{metrics}\n" in properties
        assert "management_address=http://127.0.0.1:" in properties and instance.management_socket is None
        for method, path in (("POST", "/models?url=file:///etc/passwd"), ("DELETE", "/models/tiny")):
            with pytest.raises(RequestRefused) as refused:
                management.call(instance, method, path)
            assert refused.value.status == 405
        assert management.default(instance, "tiny").version == "1.0"
    finally:
        instances.stop(instance)
