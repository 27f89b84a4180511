"""An HTTP answer, for tests that ask real servers."""

from __future__ import annotations

import json
from typing import Any, Dict, NamedTuple


class Reply(NamedTuple):
    """An HTTP answer, its headers by lower-case names."""

    status: int
    headers: Dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)
