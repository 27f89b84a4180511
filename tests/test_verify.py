"""The golden set in an archive, and `traceserve verify`, which asks a live server for it."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from conftest import run_export, served_over_http
from test_client import answering, secured
from test_instances import processes, remembered, state  # noqa: F401  (fixtures)
from traceserve import cli
from traceserve.archives.archive import pack_archive
from traceserve.archives.contents import unpack
from traceserve.building.gate import golden
from traceserve.building.gate.drift import score_difference
from traceserve.building.gate.golden import GOLDEN_FILE, GoldenSample, read_golden
from traceserve.checking import verifying
from traceserve.checking.dialects import DIALECTS, NATIVE, SpokenAt
from traceserve.checking.proof import Proof, proof_of
from traceserve.checking.verifying import AskedServer, Verification, VerifiedSample, verify_server
from traceserve.errors import ArchiveError, ServerError
from traceserve_hosts.asgi import Application, Limits
from traceserve_hosts.batcher import Batcher
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidManifest
from traceserve_runtime.manifest import Manifest, sha256
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.service import Call, Service

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve an unpacked archive behind a real HTTP server; yields its address."""
    manifest = Manifest.read(folder)
    service = Service(Engine.load(folder), manifest.name, manifest.version)
    application = Application(service, Batcher(service, 8, 0.0, lambda stats, replies, seconds: None), Limits())
    with served_over_http(application) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def unpacked(mar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked") / "tiny"
    unpack(mar, folder)
    return folder


@pytest.fixture(scope="module")
def url(unpacked: Path) -> Iterator[str]:
    with serving(unpacked) as url:
        yield url


def verified(url: str, archive: Path) -> Verification:
    return verify_server(AskedServer(url, url), archive)


# The golden set


def test_the_originals_answers_are_in_the_archive(artifact: Path, checkpoint: Callable[..., Path]) -> None:
    import transformers

    found = read_golden(artifact)
    assert found is not None and 20 < len(found.samples) <= golden.MOST
    assert found.largest_difference is not None and found.largest_difference < 1e-5
    pipeline = transformers.pipeline("text-classification", model=str(checkpoint("bert", **LABELS)), device="cpu")
    for sample in found.samples[::5]:
        if "text_pair" in sample.inputs:
            continue
        expected = pipeline(sample.inputs["text"], top_k=None, truncation=True, max_length=32)
        if len(pipeline.tokenizer(sample.inputs["text"])["input_ids"]) <= 32:  # longer ones are read in windows
            assert [item["label"] for item in sample.answer] == [item["label"] for item in expected]
            assert score_difference(sample.answer, expected) < 1e-5
    manifest = Manifest.read(artifact)
    assert GOLDEN_FILE in manifest.files  # under the digest
    told = manifest.receipt["golden"]
    assert told == {"samples": len(found.samples), "own_samples": 0, "bytes": (artifact / GOLDEN_FILE).stat().st_size}


@pytest.mark.parametrize("keep", [False, True])
def test_the_users_texts_stay_out_unless_kept(
    keep: bool, checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples.txt").write_text("a text with the marker xyzzy-7\nand a second one\n")
    config = {"model_name": str(checkpoint("distilbert")), "max_length": 16, "dtype": "float32"}
    (tmp_path / "c.json").write_text(json.dumps(config))
    options = ["--config", str(tmp_path / "c.json"), "--output", str(tmp_path / "m"), "--store", str(tmp_path)]
    own = ["--samples", str(tmp_path / "samples.txt"), *(["--keep-samples"] if keep else [])]
    assert cli.main(["build", *options, *own]) == 0
    with zipfile.ZipFile(tmp_path / "m.mar") as archive:
        holding = [name for name in archive.namelist() if b"xyzzy-7" in archive.read(name)]
    assert holding == ([GOLDEN_FILE] if keep else [])
    found = read_golden(tmp_path / "m")
    assert found is not None and [sample.own for sample in found.samples].count(True) == 2 * keep
    assert json.loads((tmp_path / "m.report.json").read_text())["golden_p50_ms"] > 0


def test_keeping_needs_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--keep-samples"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "--keep-samples keeps your own samples, and none are given; give --samples FILE, or leave both out" in told


def test_it_is_small(artifact: Path) -> None:
    engine = Engine.load(artifact)
    own = [GoldenSample({"text": "x" * 9000}, {}, i, True) for i in range(300)]
    built_in = [GoldenSample({"text": "x"}, {}, i) for i in range(99)]
    chosen = golden._within_limits(engine.task, [*own, *built_in])
    size = len(golden.GoldenSet(tuple(chosen)).to_json())
    assert size <= golden.MOST_BYTES < size + 12_000
    short = [GoldenSample({"text": "x"}, {}, i, True) for i in range(300)]
    assert [s.own for s in golden._within_limits(engine.task, [*short, *built_in])].count(True) == golden.MOST_OWN
    assert len(golden._within_limits(engine.task, built_in)) == golden.MOST


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / GOLDEN_FILE).write_text('{"format": 9, "samples": [], "largest_difference": null}')
    with pytest.raises(InvalidManifest, match="format 9.*should have format 1"):
        read_golden(tmp_path)


# Differences of scores


def ranking(**scores: float) -> List[Dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in scores.items()]


@pytest.mark.parametrize(
    ("answer", "expected", "apart"),
    [
        (ranking(a=0.6, b=0.4), ranking(a=0.5, b=0.5), 0.1),
        (ranking(b=0.51, a=0.49), ranking(a=0.505, b=0.495), 0.015),  # another order of near ties
        (ranking(a=0.6, c=0.31), ranking(a=0.6, b=0.3), 0.01),  # only one of them ranks c
        ({"labels": ["x", "y"], "scores": [0.7, 0.3]}, {"labels": ["y", "x"], "scores": [0.5, 0.5]}, 0.2),
        ([[1.0, 2.0], [3.0, 4.5]], [[1.0, 2.0], [3.0, 4.0]], 0.5 / 4),  # relative to the largest, above 1
        ({"score": 0.25, "start": 3, "answer": "x"}, {"score": 0.5, "start": 9, "answer": "y"}, 0.25),
        ([1.0], [1.0, 2.0], float("inf")),
        ([float("nan")], [1.0], float("inf")),
        ({"score": float("nan")}, {"score": 0.5}, float("inf")),
        ({"score": True}, {"score": 1.0}, float("inf")),
        (ranking(a=0.5, b=float("nan")), ranking(a=0.5, b=0.5), float("inf")),
        ({"labels": ["x"], "scores": [float("nan")]}, {"labels": ["x"], "scores": [1.0]}, float("inf")),
        ("text", ranking(a=1.0), float("inf")),
        ({"answer": "x"}, {"score": 0.5, "answer": "x"}, float("inf")),  # a score that is missing
        ({"score": 0.5}, {"score": 0.5, "answer": "x"}, 0.0),
        ({"generated_text": "x"}, {"generated_text": "y"}, 0.0),
    ],
)
def test_score_differences(answer: Any, expected: Any, apart: float) -> None:
    assert score_difference(answer, expected) == pytest.approx(apart)


# A live server


@pytest.mark.parametrize(
    "path", ["", "/predictions/tiny", "/predictions/tiny/1.0", "/v2/models/tiny", "/v2/models/tiny/infer"]
)
def test_the_right_server_is_verified(path: str, url: str, mar: Path) -> None:
    found = verified(url + path, mar)
    assert found.passed and not found.notes and not found.different and len(found.samples) == found.of > 20
    assert found.endpoint.dialect.name == ("v2" if "v2" in path else "native")
    assert found.largest_difference < 1e-5 and found.p50 > 0


def test_the_command(url: str, mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "tiny.mar"
    shutil.copyfile(mar, archive)
    (tmp_path / "tiny.report.json").write_text('{"golden_p50_ms": 12.5}')
    assert cli.main(["verify", url, "--archive", str(archive), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] and document["changed"] == 0 and document["asked"] == document["golden"]
    assert document["build_p50_ms"] == 12.5 and document["protocol"] == "native" and document["different"] == []
    assert cli.main(["verify", url, "--archive", str(archive)]) == 0
    said = capsys.readouterr().out
    assert "verified: it answers as the original does" in said and "the build, in its process: 12.5 ms" in said
    assert cli.main(["verify", url, "--archive", str(archive), "--seconds", "1e-9"]) == 0
    assert "samples were not asked: --seconds was over" in capsys.readouterr().out


def test_another_models_weights_are_seen(mar: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A model of the same labels, packed under the same name and version."""
    run_export(tmp_path / "tiny", {"model_name": str(checkpoint("distilbert", **LABELS)), "max_length": 32})
    with serving(tmp_path / "tiny") as url:
        found = verified(url, mar)
    assert not found.passed and len(found.different) > 5
    assert "it runs another archive than the golden set's" in found.problems[0]
    assert "answers differ from the original's (float32)" in found.problems[1]


def test_a_changed_label_is_seen(
    mar: Path, unpacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are those of the archive; its answers are not."""
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(unpacked, tmp_path / "tiny")
    replace(Manifest.read(tmp_path / "tiny"), labels=("red", "blue", "green")).write(tmp_path / "tiny")
    with serving(tmp_path / "tiny") as url:
        assert cli.main(["verify", url, "--archive", str(mar)]) == 1
        said = capsys.readouterr().out
    assert "answers differ from the original's (float32)" in said and '"label": "green"' in said and "changed" in said
    assert "another archive" not in said


def test_another_dtype_is_seen(mar: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The same model in bfloat16: its answers may well be the same, its scores are not."""
    content = {"model_name": str(checkpoint("bert", **LABELS)), "max_length": 32, "dtype": "bfloat16"}
    run_export(tmp_path / "tiny", content, allow_drift=True)
    with serving(tmp_path / "tiny") as url:
        found = verified(url, mar)
    assert not found.passed and any("scores of" in p and "limit 1.0e-04" in p for p in found.problems)
    assert found.largest_difference > 1e-4
    assert verified_itself(tmp_path / "tiny").passed  # by its own, wider rule


def verified_itself(folder: Path) -> Verification:
    with serving(folder) as url:
        return verified(url, folder)


def test_another_version_is_seen(url: str, artifact: Path, tmp_path: Path) -> None:
    newer = pack_archive(artifact, "tiny", tmp_path, version="2.0")
    found = verified(f"{url}/predictions/tiny/1.0", newer)
    assert "it serves version 1.0, and the golden set is that of version 2.0" in found.problems


def test_an_archive_without_a_golden_set_says_so(
    mar: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "old"
    unpack(mar, folder)
    (folder / GOLDEN_FILE).unlink()
    manifest = Manifest.read(folder, verify=False)
    files = {name: digest for name, digest in manifest.files.items() if name != GOLDEN_FILE}
    replace(manifest, files=files).write(folder)
    with pytest.raises(ArchiveError, match="carries no golden set.*pack it again"), proof_of(folder):
        pass
    assert cli.main(["verify", url, "--archive", str(folder)]) == 2
    assert "pack it again" in capsys.readouterr().err.replace("\n", " ")


def test_a_changed_golden_set_is_refused(unpacked: Path, tmp_path: Path) -> None:
    shutil.copytree(unpacked, tmp_path / "x")
    path = tmp_path / "x" / GOLDEN_FILE
    path.write_text(path.read_text().replace('"green"', '"blue"'))
    with pytest.raises(InvalidManifest, match="golden.json is not the one that was verified"), proof_of(tmp_path / "x"):
        pass


def test_what_cannot_be_asked_is_2(url: str, mar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, words in (
        ("http://127.0.0.1:9", "does not answer"),
        (f"{url}/nothing", "answers in no protocol that is known here"),
        ("nobody", "no server is running; `traceserve serve model_store/nobody.mar` starts one, and a URL"),
    ):
        assert cli.main(["verify", place, "--archive", str(mar)]) == 2
        assert words in capsys.readouterr().err.replace("\n", " ")
    assert cli.main(["verify", url]) == 2
    (tmp_path / "key").write_text("two words")
    assert cli.main(["verify", url, "--archive", str(mar), "--key-file", str(tmp_path / "key")]) == 2
    assert "should hold one key" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["tiny", "--key", "a"], "--key is for URLs, not for tiny"),
        (["tiny", "--key-file", "a"], "--key-file is for URLs, not for tiny"),
        (["tiny.mar", "--certificate", "a"], "--certificate is for URLs, not for tiny.mar"),
        (["http://127.0.0.1:9", "--archive", "a.mar", "--port", "80"], "--port is for a name; a URL has its own"),
    ],
)
def test_options_without_an_effect_are_refused(
    options: List[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_in_which_nothing_is_asked_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sample alone would be "verified"."""
    with pytest.raises(SystemExit):
        cli.main(["verify", "tiny", f"--seconds={seconds}"])
    assert "argument --seconds: should be " in capsys.readouterr().err


def test_the_time_to_ask_begins_with_the_first_sample(
    url: str, unpacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large archive takes long to unpack, and one sample would be judged alone."""

    @contextlib.contextmanager
    def slow(path: Path) -> Iterator[Proof]:
        time.sleep(0.6)
        with proof_of(path) as proof:
            yield proof

    monkeypatch.setattr(verifying, "proof_of", slow)
    assert len(verifying.verify_server(AskedServer("x", url), unpacked, 0.5).samples) > 1


def test_an_archive_of_another_task_is_no_golden_set_of_a_server(
    others: Dict[str, Path],
    unpacked: Path,
    processes: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    instance = remembered(processes)
    shutil.copytree(unpacked, Path(instance.folder, "store", "tiny"))
    other = others["feature_extraction"]
    assert cli.main(["verify", "tiny", "--archive", str(other)]) == 2
    assert (
        f"{other} is for the task feature_extraction, but tiny on port 18000 for sequence_classification"
        in " ".join(capsys.readouterr().err.split())
    )


@pytest.mark.parametrize(("command", "code"), [("verify", 2), ("update", 1)])
def test_an_archive_that_does_not_exist_is_named(
    command: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a server that would serve it."""
    missing = tmp_path / "nofile.mar"
    assert cli.main([command, str(missing)]) == code
    assert f"error: {missing} does not exist; `traceserve build` makes it" in capsys.readouterr().err


# Servers of others


@contextlib.contextmanager
def hugging_face(service: Service) -> Iterator[Tuple[str, List[str]]]:
    """A server as huggingface_hub's client expects it: it takes {"inputs", "parameters"} alone, and knows no metadata."""
    keys: List[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def do_POST(self) -> None:
            keys.append(self.headers.get("Authorization", ""))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if set(body) != {"inputs", "parameters"} or self.path != "/":
                self.send_error(422 if self.path == "/" else 404)
                return
            headers = Headers("application/json", path="hf")
            [reply] = service.answer([Call({"body": json.dumps(body).encode()}, headers)])
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", keys
    server.shutdown()
    server.server_close()


INFERENCE = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}


@pytest.fixture(scope="module")
def others(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    folder = tmp_path_factory.mktemp("others")
    made = {}
    for task, architecture, auto_model, options in (
        ("zero_shot_classification", "bert", "AutoModelForSequenceClassification", INFERENCE),
        ("text_generation", "llama", "AutoModelForCausalLM", {}),
        ("feature_extraction", "distilbert", "AutoModel", {}),
    ):
        source = checkpoint(architecture, auto_model, **options)
        run_export(folder / task, {"model_name": str(source), "task": task, "max_length": 48})
        made[task] = folder / task
    return made


@pytest.mark.parametrize("task", ["sequence_classification", "zero_shot_classification", "text_generation"])
def test_hugging_faces_protocol(task: str, others: Dict[str, Path], unpacked: Path) -> None:
    folder = others.get(task, unpacked)
    with hugging_face(Service(Engine.load(folder), "tiny", "1.0")) as (url, keys):
        found = verify_server(AskedServer(url, url, "the key"), folder)
    assert found.passed and found.endpoint.dialect.name == "huggingface" and len(found.samples) == found.of >= 4
    assert found.notes == ("the server describes no model as V2 does: version and hash were not compared",)
    assert set(keys) == {"Bearer the key"}


@pytest.mark.parametrize("task", ["zero_shot_classification", "text_generation", "feature_extraction"])
@pytest.mark.parametrize("path", ["", "/v2/models/{}"])
def test_other_tasks(task: str, path: str, others: Dict[str, Path]) -> None:
    with serving(others[task]) as url:
        found = verified(url + path.format(task), others[task])
    assert found.passed and found.endpoint.dialect.name == ("v2" if path else "native") and not found.notes


def test_written_texts_hold_no_sampled_one(others: Dict[str, Path]) -> None:
    found = read_golden(others["text_generation"])
    assert found is not None and 4 <= len(found.samples) <= golden.MOST_WRITTEN
    assert all(
        sample.parameters["do_sample"] is False and "stream" not in sample.parameters for sample in found.samples
    )


def test_vectors_of_v2() -> None:
    sample = GoldenSample({"text": "x"}, {}, [[0.5]])
    answer = {"outputs": [{"datatype": "FP32", "shape": [1, 2, 3], "data": [1, 2, 3, 4, 5, 6]}]}
    read = DIALECTS["v2"].read
    assert read(answer, sample, None) == [[1, 2, 3], [4, 5, 6]]  # type: ignore[arg-type]  # no task is needed
    answer["outputs"][0]["shape"] = [1, 7]
    with pytest.raises(ValueError, match="does not fill"):
        read(answer, sample, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sample_without_an_answer_is_no_near_tie(dtype: str, mar: Path) -> None:
    def sample(number: int, same: bool, error: str = "") -> VerifiedSample:
        return VerifiedSample(number, False, same, 0.0 if same else None, [], None, error, 1.0)

    with proof_of(mar) as proof:
        proof = proof._replace(manifest=replace(proof.manifest, dtype=dtype))
        good = [sample(number, True) for number in range(1000)]
        assert verifying._differences(good, proof, 1e-4) == []
        failed = [sample(1000, False, "500: broken"), sample(1001, False, "500: broken")]
        problems = verifying._differences([*good, *failed], proof, 1e-4)
        assert problems == ["2 of 1002 samples were not answered: 500: broken"]
        changed = [sample(1002, False)]
        assert len(verifying._differences([*changed, *failed], proof, 1e-4)) == 2


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (401, b"{}"),
        (403, b"{}"),
        (400, b'{"code": 400, "type": "InvalidKeyException", "message": "Token Authentication failed."}'),
    ],
)
def test_a_refused_key_is_said_to_be(status: int, content: bytes, mar: Path) -> None:
    with answering(status, content) as url, pytest.raises(
        ServerError, match=f"answers {status}: .*; give its key: --key"
    ):
        verified(url, mar)


def test_a_servers_certificate_has_to_be_for_its_name(mar: Path, tmp_path: Path) -> None:
    """Else the key and the texts go to whoever has any certificate of the same authority; our own are reached by address."""
    with secured(tmp_path, "example.org") as (url, certificate):
        with pytest.raises(ServerError, match="does not answer: .*certificate"):
            AskedServer(url, url, "the key", certificate).ask(url)
        assert AskedServer(url, url, "the key", certificate, ours=True).ask(url) == (200, {"key": "Bearer the key"})


@pytest.mark.parametrize(
    ("status", "document", "ours", "problems", "notes"),
    [
        (200, {"versions": ["1.0", "2.0"], "parameters": {"contents": "CONTENTS"}}, True, 0, 0),
        (200, {"versions": ["2.0"], "parameters": {"contents": "CONTENTS"}}, False, 1, 0),
        (200, {"versions": ["2.0"], "parameters": {}}, False, 1, 1),
        (200, {"versions": ["1.0"], "parameters": {"contents": "another"}}, False, 1, 0),
        (404, {"error": "no model"}, True, 1, 0),
        (404, {"error": "no model"}, False, 0, 1),
        (200, {"versions": "1.0"}, False, 0, 1),
    ],
)
def test_what_a_server_says_of_itself_is_compared(
    status: int, document: Dict[str, Any], ours: bool, problems: int, notes: int, mar: Path
) -> None:
    """What it does not say is a problem of a server of this machine alone."""
    with proof_of(mar) as proof:
        content = json.dumps(document).replace("CONTENTS", proof.manifest.contents).encode()
        with answering(status, content) as url:
            found = verifying._identity(AskedServer(url, url, ours=ours), SpokenAt(NATIVE, url), proof)
    assert [len(each) for each in found] == [problems, notes]


def test_scores_may_be_as_far_off_as_at_the_build(unpacked: Path, url: str, tmp_path: Path) -> None:
    """Where they were further off than the gate's limit, as with --allow-drift."""
    shutil.copytree(unpacked, tmp_path / "tiny")
    file = tmp_path / "tiny" / GOLDEN_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "largest_difference": 0.25}))
    manifest = Manifest.read(unpacked)
    replace(manifest, files={**manifest.files, GOLDEN_FILE: sha256(file)}).write(tmp_path / "tiny")
    assert verified(url, tmp_path / "tiny").limit == 0.25 and verified(url, unpacked).limit == 1e-4
