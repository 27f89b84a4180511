"""The campaigns' short forms: each of their aims, a few times."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple, Sequence, cast

import psutil
import pytest
from campaigns import aims, builds, damaged, full_disk, hostile, killed, slow, soak
from campaigns.aims import Aim
from campaigns.replies import FORM, Reply
from traceserve_runtime.manifest import sealed
from workers import worker_pids


def missed(found: Sequence[Aim]) -> Sequence[Aim]:
    """The aims that were missed; fails where there was none."""
    assert len(found) > 1
    return [aim for aim in found if not aim.met]


def test_damaged_archives(mar: Path, tmp_path: Path) -> None:
    """Each kind of damage several times."""
    found = damaged.run(5 * len(damaged.DAMAGES), mar, tmp_path)
    assert missed([aim for aim in found if not aim.of_machine]) == []


def relabelled(whole: damaged.Whole, noise: random.Random) -> bytes:
    """Other labels under a right digest, as someone makes who knows how: only a signature sees it."""
    document = json.loads(whole.files["traceserve.json"])
    content = json.dumps(sealed({**document, "labels": document["labels"][::-1]})).encode()
    return damaged.zipped({**whole.files, "traceserve.json": content})


def test_a_campaign_sees_another_answer(mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damaged, "DAMAGES", {"other labels": relabelled})
    assert [aim.what for aim in missed(damaged.run(1, mar, tmp_path))] == ["another answer", "refused"]


def test_a_campaign_fails_if_an_aim_is_missed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["campaign", "--markdown"])
    for met in (True, False):
        found = [Aim("a thing", "0", "1 of 2", met), aims.none_of("another", 0, 2)]
        assert aims.main_of(lambda options, folder: found, None, lambda parser: None) == int(not met)  # noqa: B023
        assert f"| a thing | 0 | 1 of 2 | {'yes' if met else 'NO'} |" in capsys.readouterr().out


def test_a_server_under_attack(mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server, on a small disk where one may be mounted: hostile and rude clients, kills, load, a full disk."""
    with full_disk.small_disk(tmp_path / "disk", "96m") as disk:
        if disk is not None:
            monkeypatch.setattr(tempfile, "tempdir", str(disk))
        with aims.serving(mar) as instance:
            found = [*hostile.attack(instance, 400, 4, 0), *slow.bother(instance, 6, 0.5)]
            found += killed.kill_workers(instance, 1, 4)
            found += soak.soak(instance, 1.5, 2, 3)
            if disk is not None:
                found += full_disk.on_a_full_disk(instance, disk, 20)
            found += killed.kill_server(instance, mar)
    assert missed([aim for aim in found if not aim.of_machine]) == []
    assert {aim.what for aim in found if aim.of_machine} == {
        "its longest wait",
        "its memory after a tenth more",
        "answers again after",
        "growth of the worker's memory",
        "drift of p99",
    }


def test_a_soak_compares_its_end_with_its_beginning() -> None:
    steady = [soak.Window(100, 0, 0.01, 1000)] * 15
    assert missed(soak.aims_of(steady, True)) == []
    growing = [window._replace(memory=1000 + 3 * i) for i, window in enumerate(steady)]
    assert [aim.what for aim in missed(soak.aims_of(growing, True))] == ["growth of the worker's memory"]
    slowing = [window._replace(p99=0.01 * 1.02**i) for i, window in enumerate(steady)]
    assert [aim.what for aim in missed(soak.aims_of(slowing, True))] == ["drift of p99"]
    assert len(missed(soak.aims_of([steady[0]._replace(failed=1)] * 3, False))) == 2


def test_two_builds_of_one_name_of_which_one_is_killed(tmp_path: Path) -> None:
    assert missed(builds.pair_of_which_one_is_killed(builds.Place(tmp_path), 2.0, tmp_path)) == []


class Child(NamedTuple):
    """A process, which may have ended after it was listed."""

    pid: int
    ended: bool

    def cmdline(self) -> Sequence[str]:
        if self.ended:
            raise psutil.NoSuchProcess(self.pid)
        return ["python", "model_service_worker.py"]

    def children(self, recursive: bool) -> Sequence[Child]:
        return [Child(1, True), Child(2, False), Child(3, True)]


class Served(NamedTuple):
    """A server's record with its process."""

    process: Child


def test_a_child_that_has_ended_is_no_worker_and_hides_none() -> None:
    assert worker_pids(cast(Any, Served(Child(0, False)))) == [2]


def test_a_signatures_time_depends_on_the_size() -> None:
    assert damaged.seconds_to_check(92) == pytest.approx(0.3)
    assert damaged.seconds_to_check(1) < 0.06 < 0.9 < damaged.seconds_to_check(400)


@pytest.mark.parametrize(
    "signal, status, output, legal",
    [
        ("SIGINT", 130, "", True),
        ("SIGINT", -2, "", True),
        ("SIGINT", 1, "error: no such file", False),
        ("SIGINT", 1, "Fatal Python error: init_import_site: Failed to import the site module", True),
        ("SIGINT", -9, "", False),
        ("SIGKILL", -9, "", True),
        ("SIGKILL", 130, "", False),
    ],
)
def test_a_build_that_fails_was_not_interrupted(signal: str, status: int, output: str, legal: bool) -> None:
    assert builds.legal([builds.ended(Signals[signal], status, output)]) == legal


def of_frontend(code: int, kind: str, message: str) -> bytes:
    return json.dumps({"code": code, "type": kind, "message": message}, indent=2).encode()


def of_worker(kind: str) -> bytes:
    return json.dumps({"error": {"type": kind, "message": "m", "field": None}}).encode()


_ESCAPE = of_frontend(500, "ErrorDataDecoderException", "Bad string: 'a%zz'")
_CAUGHT_BY_TORCHSERVE = of_frontend(503, "InternalServerException", "Prediction failed")


@pytest.mark.parametrize(
    "path, content_type, status, body, whose, failure",
    [
        ("/predictions/x", FORM, 500, _ESCAPE, "frontend", False),
        ("/predictions/x", "application/json", 500, _ESCAPE, "frontend", True),
        ("/predictions/x", FORM, 503, _CAUGHT_BY_TORCHSERVE, "frontend", True),
        ("/explanations/x", FORM, 503, _CAUGHT_BY_TORCHSERVE, "frontend", True),
        ("/predictions/x", "", 507, of_frontend(507, "InternalServerException", "Out of resources"), "frontend", True),
        ("/predictions/x", FORM, 500, of_frontend(500, "InternalServerException", "Worker died."), "frontend", True),
        ("/predictions/x", FORM, 500, of_frontend(500, "ErrorDataDecoderException", "another"), "frontend", True),
        ("/predictions/x", "", 503, of_frontend(503, "ServiceUnavailableException", "no worker"), "frontend", True),
        ("/predictions/x", FORM, 400, of_frontend(400, "InvalidKeyException", "m"), "frontend", False),
        ("/predictions/x", "", 500, of_worker("ModelFailure"), "worker", True),
        ("/predictions/x", "", 501, of_worker("NotOffered"), "worker", True),
        ("/predictions/x", "", 500, b"", "worker", True),
        ("/explanations/x", "", 501, of_worker("NotOffered"), "worker", True),  # this task has them
        ("/explanations/x", "", 503, of_worker("OutOfTime"), "worker", False),
        ("/v1/models/x:explain", "", 503, of_worker("OutOfTime"), "worker", False),
        ("/explanations/x", "", 503, of_worker("ModelFailure"), "worker", True),
        ("/predictions/x", "", 503, of_worker("OutOfTime"), "worker", True),
        ("/predictions/x", "", 422, of_worker("InvalidRequest"), "worker", False),
    ],
)
def test_a_failure_is_none_of_the_frontends_own(
    path: str, content_type: str, status: int, body: bytes, whose: str, failure: bool
) -> None:
    """An exception that the handler lets through has the frontend's form, too."""
    reply = Reply(path, content_type, status, body)
    assert (reply.whose, reply.is_failure("sequence_classification")) == (whose, failure)


def test_a_task_without_explanations_says_so() -> None:
    reply = Reply("/explanations/x", "", 501, of_worker("NotOffered"))
    assert not reply.is_failure("feature_extraction") and reply._replace(status=500).is_failure("feature_extraction")
    assert reply._replace(path="/predictions/x").is_failure("feature_extraction")


@pytest.mark.skipif(sys.platform == "win32", reason="each architecture is tried in a fork")
def test_architectures(tmp_path: Path) -> None:
    """One with keys and values, one with states of a fixed size beside them, and one that is refused."""
    names = ("llama", "lfm2", "bert")
    command = [sys.executable, "-m", "campaigns.architectures", "--task", "text_generation"]
    run = subprocess.run(
        [*command, "--only", *names, "--page", str(tmp_path / "page.md")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    page = (tmp_path / "page.md").read_text()
    assert "Built (2): `lfm2`, `llama`." in page and "Not tried" not in page
    assert re.search(r"\nRefused, the model does not write .* rereads its whole text \(1\): `bert`\.\n", page)
