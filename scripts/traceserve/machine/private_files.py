"""Files that this user alone may read, written whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from traceserve.machine import space


def write_private(file: Path, text: str, chosen: bool = False) -> None:
    """Write a file of mode 0600 in place of an earlier one; others see the one or the other, whole. Raises NoSpace, with
    another advice if the user chose the file's name.

    Each writer has a temporary file of its own beside it: of several at once the last one's text stays.
    """
    with space.named_file(file, chosen):
        _write_beside(file, text)


def _write_beside(file: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".new", dir=file.parent)  # 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
