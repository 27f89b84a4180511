"""Tables as MLflow hands them over: each row is one request, and none is lost."""

from __future__ import annotations

from typing import Any, Dict, List

import numpy as np
import pytest
from traceserve_hosts.tables import rows_of


class NAType:
    """As pandas.NA, which is equal to nothing and neither true nor false; pandas itself is tried by `nox -s hosts`."""

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    def __eq__(self, other: object) -> Any:
        return self


class Table:
    """A pandas.DataFrame, as far as it is used."""

    def __init__(self, records: List[Dict[Any, Any]]) -> None:
        self._records = records

    def to_dict(self, orient: str) -> List[Dict[Any, Any]]:
        assert orient == "records"
        return self._records


PAIRS = [{"text": "a", "text_pair": "c"}, {"text": "b", "text_pair": "d"}]


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({"text": ["a", "b"], "text_pair": ["c", "d"]}, PAIRS),
        ({"text": np.array(["a", "b"]), "text_pair": ["c", "d"]}, PAIRS),
        ({"text": "a", "text_pair": "c"}, PAIRS[:1]),
        ({"text": np.array("a"), "text_pair": ["c"]}, PAIRS[:1]),
        (Table(PAIRS), PAIRS),
        (Table([{0: "a"}, {0: "b"}]), ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        ("a", ["a"]),
        ({}, []),
    ],
)
def test_a_row_is_a_request(given: object, rows: List[object]) -> None:
    assert rows_of(given) == rows


@pytest.mark.parametrize("empty", [None, float("nan"), np.float64("nan"), NAType()])
def test_what_a_table_leaves_empty_was_not_sent(empty: object) -> None:
    assert rows_of(Table([{"text": "a", "text_pair": empty}])) == [{"text": "a"}]
    assert rows_of({"text": ["a", "b"], "text_pair": ["c", empty]}) == [PAIRS[0], {"text": "b"}]


@pytest.mark.parametrize(
    ("columns", "counts"),
    [
        ({"text": ["a", "b"], "text_pair": ["c"]}, '"text" 2, "text_pair" 1'),
        ({"text": np.array(["a", "b"]), "text_pair": np.array(["c", "d", "e"])}, '"text" 2, "text_pair" 3'),
        ({"text": ["a", "b"], "text_pair": "c"}, '"text" 2, "text_pair" 1'),
        ({"text": [], "text_pair": "c"}, '"text" 0, "text_pair" 1'),
    ],
)
def test_columns_of_unequal_length_are_refused(columns: Dict[str, object], counts: str) -> None:
    """They were cut to the shortest one, so that requests had no answer."""
    with pytest.raises(ValueError, match=counts):
        rows_of(columns)
