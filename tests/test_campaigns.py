"""The campaigns' short forms: each of their aims, a few times."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, Sequence

import pytest
from campaigns import aims, builds, damaged, full_disk, hostile, killed, slow, soak
from campaigns.aims import Aim
from traceserve_runtime.manifest import sealed


def missed(found: Sequence[Aim]) -> Sequence[Aim]:
    """The aims that were missed; fails where there was none."""
    assert len(found) > 1
    return [aim for aim in found if not aim.met]


def test_damaged_archives(mar: Path, tmp_path: Path) -> None:
    """Each kind of damage several times."""
    assert missed(damaged.run(5 * len(damaged.DAMAGES), mar, tmp_path)) == []


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
            found += [
                aim for aim in soak.soak(instance, 1.5, 2, 3) if "p99" not in aim.what and "memory" not in aim.what
            ]
            if disk is not None:
                found += full_disk.on_a_full_disk(instance, disk, 20)
            found += killed.kill_server(instance, mar)
    assert missed(found) == []


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
