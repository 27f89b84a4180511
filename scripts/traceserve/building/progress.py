"""How a long run says where it is."""

from __future__ import annotations

from typing import Callable

Progress = Callable[[str, int, int], None]  # what is being done, how many steps of how many are done
