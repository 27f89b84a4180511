"""Containers without a JVM: what SageMaker and KServe would start really runs here, and is asked as they ask."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import pytest
import yaml
from conftest import run_export
from test_deploying import bare_python, deployed, parsed, refused
from traceserve.archives.archive import pack_archive
from traceserve.archives.contents import unpack
from traceserve.deploying.described import describe
from traceserve.deploying.plan import Wishes
from traceserve.deploying.targets import sagemaker as sagemaker_target
from traceserve.serving.configuration import free_ports
from traceserve_hosts import sagemaker
from traceserve_runtime.manifest import sha256

BODY = {"text": "Yes."}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_python(tmp_path_factory.mktemp("bare") / "python")


class Container:
    """A program of an image, and the port on which it answers."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Tuple[int, Mapping[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        own = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
        try:
            connection.request(method, path, content, own)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def answer(self, path: str, body: Any, **headers: str) -> Any:
        status, _, answer = self.ask("POST", path, body, **headers)
        assert status == 200, answer
        return json.loads(answer)


@contextlib.contextmanager
def started(
    image: Path, python: Path, home: Path, words: Sequence[str], port: int, ready: str, **variables: str
) -> Iterator[Container]:
    """The image's program with these arguments, in its environment, until it is told to end."""
    found = parsed(image / "Dockerfile")
    environment = {
        **found["ENV"],
        "PYTHONPATH": str(image / "app"),
        "HOME": str(home),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        **variables,
    }
    entry = [f"{image}{word}" if word.startswith("/archives/") else word for word in found["ENTRYPOINT"]]
    command = [*entry, *words]
    process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    container = Container(process, port)
    try:
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                if container.ask("GET", ready)[0] == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.stdout.read()
            time.sleep(0.1)
        yield container
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


# --- SageMaker ---


@pytest.fixture(scope="module")
def model(mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuple[Path, Path]:
    """The image, and what SageMaker makes of model.tar.gz in /opt/ml/model."""
    folder = deployed("sagemaker", [mar], tmp_path_factory.mktemp("sagemaker") / "out")
    unpacked = folder.parent / "opt-ml-model"
    with tarfile.open(folder / "model.tar.gz", "r:gz") as tar:
        tar.extractall(unpacked)
    for path in [unpacked, *unpacked.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder / "image", unpacked


@pytest.fixture(scope="module")
def container(
    mar: Path, model: Tuple[Path, Path], python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    """Started as SageMaker starts it: with `serve`, and a port of its choice."""
    image, unpacked = model
    port, home = free_ports(1)[0], tmp_path_factory.mktemp("home")
    variables = {
        "TRACESERVE_MODEL": str(unpacked),
        "TRACESERVE_SHA256": sha256(mar),
        "SAGEMAKER_BIND_TO_PORT": str(port),
        "SAGEMAKER_MAX_PAYLOAD_IN_MB": "1",
    }
    with started(image, python, home, parsed(image / "Dockerfile")["CMD"], port, "/ping", **variables) as running:
        yield running


def test_the_model_is_the_archive(mar: Path, model: Tuple[Path, Path], tmp_path: Path) -> None:
    other = deployed("sagemaker", [mar], tmp_path / "again") / "model.tar.gz"
    assert other.read_bytes() == (model[0].parent / "model.tar.gz").read_bytes()  # of equal archives equal bytes
    with gzip.open(other) as content:
        assert content.read(1)
    [packed] = model[1].iterdir()
    assert packed.name == mar.name and packed.read_bytes() == mar.read_bytes()


def test_only_the_archive_that_was_deployed_is_served(
    mar: Path, model: Tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [described] = describe([mar])
    told = " ".join(sagemaker_target.plan([described], Wishes("uvicorn")).commands)
    assert f"Environment={{TRACESERVE_SHA256={sha256(mar)}}}" in told
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRACESERVE_SHA256", "0" * 64)
    assert "it is another one, or damaged" in str(sagemaker.main(["serve"], str(model[1]), {}))
    unpack(mar, tmp_path / "unpacked")  # as earlier versions put it into model.tar.gz
    assert "is an unpacked archive" in str(sagemaker.main(["serve"], str(tmp_path / "unpacked"), {}))
    for name in ("one.mar", "two.mar"):  # of several archives in a folder none is taken
        shutil.copy(mar, tmp_path / "unpacked" / name)
    assert "is an unpacked archive" in str(sagemaker.main(["serve"], str(tmp_path / "unpacked"), {}))
    (tmp_path / "unpacked" / "traceserve.json").unlink()
    assert "there is no archive" in str(sagemaker.main(["serve"], str(tmp_path / "unpacked"), {}))


def test_ping_and_invocations(container: Container) -> None:
    status, _, body = container.ask("GET", "/ping")
    assert (status, json.loads(body)) == (200, {"status": "Healthy"})
    status, headers, body = container.ask("POST", "/invocations", BODY)
    assert status == 200 and headers["content-type"] == "application/json"
    assert set(json.loads(body)) == {"label", "score"}
    assert container.answer("/invocations", b"Yes.", Content_Type="text/plain") == json.loads(body)
    assert len(container.answer("/invocations", b"text\nYes.\nNo.\n", Content_Type="text/csv")) == 2
    assert container.answer("/invocations", {"instances": ["Yes."]}, Accept="application/json")["predictions"]


def test_what_is_wrong_with_a_body_is_told(container: Container) -> None:
    for body, kind, expected in (
        (b'{"txt": 1}', "application/json", 400),
        (b"\x00\xff", "image/png", 400),
        (b'"' + b"x" * (2 << 20) + b'"', "application/json", 413),
    ):
        status, _, answer = container.ask("POST", "/invocations", body, Content_Type=kind)
        assert status == expected and json.loads(answer)["error"]["message"]
    assert container.ask("GET", "/other")[0] == 404
    assert container.ask("GET", "/ping")[0] == 200


def test_other_protocols_are_chosen_by_a_header(container: Container) -> None:
    path = {"X_Amzn_SageMaker_Custom_Attributes": "trace=1,path=v1/classify"}
    assert container.answer("/invocations", {"input": ["Yes."]}, **path)["data"][0]["label"] in ("red", "green", "blue")
    path = {"X_Amzn_SageMaker_Custom_Attributes": "path=v1/models/tiny:predict"}
    [label] = container.answer("/invocations", {"instances": ["Yes."]}, **path)["predictions"]
    assert label["label"] in ("red", "green", "blue")


def test_batch_transform_is_told_what_it_may_send(container: Container) -> None:
    told = json.loads(container.ask("GET", "/execution-parameters")[2])
    assert told == {"MaxConcurrentTransforms": 64, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 1}


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["train"], {}, "with `serve`, not with train"),
        ([], {}, "not with nothing"),
        (["serve"], {"SAGEMAKER_BIND_TO_PORT": "http"}, "SAGEMAKER_BIND_TO_PORT should be a whole number"),
        (["serve"], {"SAGEMAKER_MAX_PAYLOAD_IN_MB": "-1"}, "SAGEMAKER_MAX_PAYLOAD_IN_MB should be"),
        # 0 is SageMaker's word for no limit: the next thing is told.
        (["serve"], {"SAGEMAKER_MAX_PAYLOAD_IN_MB": "0"}, "there is no archive at"),
    ],
)
def test_a_wrong_call_is_told(arguments: List[str], environment: Dict[str, str], told: str) -> None:
    assert told in str(sagemaker.main(arguments, environment=environment))


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    assert "there is no archive at" in str(sagemaker.main(["serve"], str(tmp_path), {}))


def test_one_archive_for_one_model(mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.mar"
    other.write_bytes(mar.read_bytes())
    out = ["--output", str(tmp_path / "out")]
    assert "serves one archive, and 2 are given" in refused(capsys, "sagemaker", str(mar), str(other), *out)
    assert "serves one archive" in refused(capsys, "docker", str(mar), str(other), *out, "--engine", "uvicorn")


# --- KServe: the image, with what its storage initializer fetched ---


@pytest.fixture(scope="module")
def kserve(mar: Path, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    folder = deployed("kserve", [mar], tmp_path_factory.mktemp("kserve") / "out", "--url", "s3://bucket")
    models, home, port = folder / "mnt-models", tmp_path_factory.mktemp("home"), free_ports(1)[0]
    models.mkdir()
    (models / "tiny.mar").write_bytes(mar.read_bytes())
    [runtime] = yaml.safe_load_all((folder / "serving_runtime.yaml").read_text())
    own = {"/mnt/models": str(models), "--name={{.Name}}": "--name=served", "--port=8080": f"--port={port}"}
    words = [own.get(word, word) for word in runtime["spec"]["containers"][0]["args"]]
    assert set(own) <= set(runtime["spec"]["containers"][0]["args"])
    digest = json.loads((folder / "traceserve-deploy.json").read_text())["archives"][0]["sha256"]
    with started(folder / "image", python, home, words, port, "/health", TRACESERVE_SHA256=digest) as running:
        yield running


def test_kserves_first_protocol(kserve: Container) -> None:
    answer = kserve.answer("/v1/models/served:predict", {"instances": ["Yes.", "No."]})
    assert [set(each) for each in answer["predictions"]] == [{"label", "score"}] * 2
    assert kserve.ask("GET", "/v1/models/served")[0] == 200
    assert kserve.ask("POST", "/v1/models/other:predict", {"instances": ["Yes."]})[0] == 404


def test_kserves_second_protocol(kserve: Container) -> None:
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["Yes."]}
    answer = kserve.answer("/v2/models/served/infer", {"inputs": [tensor]})
    assert answer["model_name"] == "served" and answer["outputs"][0]["datatype"] == "BYTES"
    for path in ("/live", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/served", "/v2/models/served/ready"):
        assert kserve.ask("GET", path)[0] == 200, path
    assert kserve.ask("GET", "/v2/models/other")[0] == 404


def test_another_archive_than_the_one_that_was_deployed_is_not_served(
    mar: Path,
    python: Path,
    tmp_path: Path,
) -> None:
    folder = deployed("docker", [mar], tmp_path / "out", "--engine", "uvicorn")
    with pytest.raises(AssertionError, match="not 0000"):
        words = [str(folder / "archives/tiny.mar")]
        with started(folder, python, tmp_path, words, 1, "/health", TRACESERVE_SHA256="0" * 64):
            pass


def test_a_key_and_a_stream(checkpoint: Any, python: Path, tmp_path: Path) -> None:
    source = str(checkpoint("gpt2", "AutoModelForCausalLM"))
    run_export(tmp_path / "writer", {"model_name": source, "task": "text_generation", "max_length": 64})
    packed = pack_archive(tmp_path / "writer", "writer", tmp_path)
    folder = deployed("docker", [packed], tmp_path / "out", "--engine", "uvicorn")
    port = free_ports(1)[0]
    words = [str(folder / "archives/writer.mar"), "--name", "writer", "--port", str(port)]
    with started(folder, python, tmp_path, words, port, "/health", TRACESERVE_KEY="secret") as running:
        asked = {"text": "The train", "parameters": {"max_new_tokens": 8, "stream": True}}
        assert running.ask("POST", "/predictions/writer", asked)[0] == 401
        status, headers, body = running.ask("POST", "/predictions/writer", asked, Authorization="Bearer secret")
        assert status == 200 and headers.get("transfer-encoding") == "chunked" and body
