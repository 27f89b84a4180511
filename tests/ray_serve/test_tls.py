"""TLS before Ray Serve, with a key of an elliptic curve; at all addresses, so that a key is needed as well."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.request
from pathlib import Path
from typing import Iterator, List, Tuple

import psutil
import pytest
import trustme
from traceserve import cli
from traceserve.serving import configuration, instances, server
from traceserve.serving.engines import RAY
from traceserve.serving.front import FrontendOptions
from traceserve.serving.instances import Instance

from ray_serve.cluster import Cluster, kill, wait_until
from ray_serve.test_ray import listening

BODY = {"text": "Where is my parcel?"}


@pytest.fixture(scope="module")
def secured(
    archives: List[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tuple[Instance, ssl.SSLContext]]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    front = FrontendOptions(certificate=certificate, key=key)
    port = configuration.free_ports(1)[0]
    instance = server.start(archives[:1], "0.0.0.0", port, timeout=180, engine=RAY, front=front)
    key.unlink()  # a copy is the server's own
    certificate.unlink()
    strict = ssl.create_default_context()
    authority.configure_trust(strict)
    yield instance, strict
    instances.stop(instance)


def ask(instance: Instance, context: ssl.SSLContext) -> int:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {instance.key}"}
    request = urllib.request.Request(f"{instance.url}/predictions/intents", json.dumps(BODY).encode(), headers)
    with urllib.request.urlopen(request, timeout=60, context=context) as response:
        return int(response.status)


def test_a_strict_client_is_answered_and_a_plain_one_is_not(secured: Tuple[Instance, ssl.SSLContext]) -> None:
    instance, strict = secured
    assert instance.url == f"https://127.0.0.1:{instance.port}"
    assert ask(instance, strict) == 200
    connection = http.client.HTTPConnection("127.0.0.1", instance.port, timeout=20)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        connection.request("GET", "/health")
        connection.getresponse()


def test_only_its_own_port_is_reachable(secured: Tuple[Instance, ssl.SSLContext]) -> None:
    instance, _ = secured
    beyond = {
        address.port for _, address in listening(instance) if not address.ip.removeprefix("::ffff:").startswith("127.")
    }
    assert beyond == {instance.port}


def test_its_key_is_in_a_private_file_alone(secured: Tuple[Instance, ssl.SSLContext]) -> None:
    instance, _ = secured
    files = [path for path in Path(instance.folder).rglob("*") if path.is_file()]
    holders = [path for path in files if b"PRIVATE KEY" in path.read_bytes()]
    assert [path.name for path in holders] == ["tls.pem"] and holders[0].stat().st_mode & 0o077 == 0


def test_the_commands_know_it(
    secured: Tuple[Instance, ssl.SSLContext], archives: List[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """An update too, with a key and over TLS."""
    instance, strict = secured
    port = ["--port", str(instance.port)]
    assert cli.main(["predict", "intents", BODY["text"], *port]) == 0
    assert cli.main(["verify", "intents", *port]) == 0
    capsys.readouterr()
    assert cli.main(["update", str(archives[1]), "--json", *port]) == 0
    assert json.loads(capsys.readouterr().out)["new"] == "2.0"
    assert ask(instance, strict) == 200


def test_another_haproxy_speaks_tls_as_well(secured: Tuple[Instance, ssl.SSLContext]) -> None:
    """The one that answers while Ray starts its own again."""
    instance, strict = secured
    cluster = Cluster(instance)
    proxies = cluster.proxies()
    kill(proxies)
    psutil.wait_procs(proxies, timeout=10)

    def answered() -> bool:
        try:
            return ask(instance, strict) == 200
        except OSError:
            return False

    assert wait_until(answered, 4) < 4
    wait_until(lambda: len(cluster.proxies()) == 1 and cluster.proxies()[0] not in proxies, 60)
    assert wait_until(answered, 4) < 4
