"""How OpenMP's waiting threads wait, in the command and in the workers; to be set before torch is imported.

By default they spin, and starve whatever shares the processor with them: with another busy process on two cores MiniLM
answered a tenth. Those that sleep at once are woken too late for the next operator. A short spin keeps most of both: the
figures are in docs/measurements.md. (GNU's OpenMP counts spins; others read the first line alone.)
"""

from __future__ import annotations

import os
from typing import Dict

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def environment() -> Dict[str, str]:
    """What is to be set, as far as the user has not set it."""
    return {key: os.environ.get(key, value) for key, value in WAITING.items()}
