"""Progress reports of a long run."""

from __future__ import annotations

from typing import Callable

Progress = Callable[[str, int, int], None]  # the current step's name, the finished steps, all steps
