"""The campaigns' short forms: each of their aims, a few times."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any, Sequence

import pytest
from campaigns import aims, damaged
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
