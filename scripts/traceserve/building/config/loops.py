"""The ways to run models token by token."""

from __future__ import annotations

from typing import Dict, NamedTuple


class Loop(NamedTuple):
    """Whether new tokens follow the row, and count towards max_length with it."""

    writes_behind: bool


LOOPS: Dict[str, Loop] = {"decoder": Loop(True), "encoder_decoder": Loop(False)}
