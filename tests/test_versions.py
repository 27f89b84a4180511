"""Versions are compared by the numbers that they begin with."""

from __future__ import annotations

from typing import Tuple

import pytest
from traceserve_runtime.versions import release_of


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("3.1.6", (3, 1, 6)),
        ("3.2.0rc1", (3, 2, 0)),
        ("3.2rc1", (3, 2)),
        ("5.0.0.dev0", (5, 0, 0)),
        ("2.6.0+cpu", (2, 6, 0)),
        ("2.7.0a0+git1234", (2, 7, 0)),
        ("4.10", (4, 10)),
        ("unknown", ()),
    ],
)
def test_the_numbers_that_a_version_begins_with(version: str, release: Tuple[int, ...]) -> None:
    assert release_of(version) == release


def test_shorter_and_longer_ones_compare() -> None:
    assert release_of("4.9.1") < (4, 10) <= release_of("4.10") < (4, 10, 1) <= release_of("5.0rc1")
    assert release_of("unknown") < (0,)
