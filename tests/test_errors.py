"""The words of other libraries' errors."""

from __future__ import annotations

import pytest
from traceserve_runtime.errors import last_reason, reason


@pytest.mark.parametrize(
    ("error", "first", "last"),
    [
        (ValueError("one"), "one", "one"),
        (RuntimeError("\n  first: \n\nat a line\n last\n "), "first:", "last"),
        (ValueError(), "ValueError", "ValueError"),
        (RuntimeError(" \n"), "RuntimeError", "RuntimeError"),
    ],
)
def test_the_line_with_the_reason(error: Exception, first: str, last: str) -> None:
    assert (reason(error), last_reason(error)) == (first, last)
