"""The words of other libraries' errors."""

from __future__ import annotations

import json

import pytest
from traceserve.errors import first_line, json_reason
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


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            "Validation error for field 'hidden_size':\n    TypeError: Field expected int\nmore",
            "Validation error for field 'hidden_size': TypeError: Field expected int",
        ),
        ("Couldn't be made from one of: \n(1) a file, \n(2) a slow one", "Couldn't be made from one of: (1) a file,"),
        ("one\ntwo", "one"),
        ("only this:", "only this:"),
    ],
)
def test_the_line_that_a_colon_announces(message: str, told: str) -> None:
    assert first_line(ValueError(message)) == f"ValueError: {told}"
    assert first_line(ValueError("\n")) == "ValueError"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('{"a": 1, // one\n "b": 2}', True),
        ('{"a": 1 /* one */}', True),
        ('# first\n{"a": 1}', True),
        ('{"a": 1,\n}', True),
        ("[1, 2, ]", True),
        ('{"a": 1 "b": 2}', False),
        ('{"a": }', False),
        ("{", False),
    ],
)
def test_what_json_lacks_is_told(text: str, hint: bool) -> None:
    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads(text)
    assert json_reason(raised.value).endswith("; JSON has no comments, and no comma before } or ]") is hint
