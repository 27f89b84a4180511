"""The requests in a table of pandas, of numpy or of plain Python: a row is a request, its columns are the task's fields."""

from __future__ import annotations

from typing import Dict, List, Mapping

_EMPTY_KINDS = ("NAType", "NaTType")  # of pandas.NA and pandas.NaT, without importing pandas


def rows_of(given: object) -> List[object]:
    """Return the requests in a table, a dictionary of columns, or a list; raises ValueError for columns of unequal length."""
    if hasattr(given, "to_dict"):  # of pandas
        return [_present(row) for row in given.to_dict("records")]
    if isinstance(given, Mapping):
        columns = {name: _listed(values) for name, values in given.items()}
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f'"{name}" {length:,}' for name, length in lengths.items())
            raise ValueError(f"the columns have different numbers of values ({counts}); a row is a request")
        return [_present(dict(zip(columns, row))) for row in zip(*columns.values())]
    return _listed(given)


def _present(row: Mapping[object, object]) -> object:
    """Return a row without what its table leaves empty; of a table without names, its only value."""
    found: Dict[str, object] = {str(name): _plain(value) for name, value in row.items() if not _is_empty(value)}
    return found["0"] if list(found) == ["0"] else found


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ in _EMPTY_KINDS


def _plain(value: object) -> object:
    """Return numpy's values as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _listed(values: object) -> List[object]:
    plain = _plain(values)
    return plain if isinstance(plain, list) else [plain]
