"""The key that a process is given."""

from __future__ import annotations

import os
from typing import Optional

from traceserve_hosts import KEY_VARIABLE


def given_key() -> Optional[str]:
    """The key in the environment, if any; raises ValueError for a blank one.

    A secret that was made of a file often ends with its line break, which no header can hold.
    """
    given = os.environ.get(KEY_VARIABLE)
    if given and not given.strip():
        raise ValueError(f"{KEY_VARIABLE} is blank: set it to a key, or leave it out")
    return given.strip() if given else None
