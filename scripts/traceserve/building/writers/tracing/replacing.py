"""Replaces parts of libraries for as long as a model is traced, converted or saved."""

from __future__ import annotations

import contextlib
from typing import Iterator


@contextlib.contextmanager
def replaced(owner: object, **attributes: object) -> Iterator[None]:
    """Replace attributes of a module, a class or an object; one that it only inherits is inherited again afterwards."""
    own = {name: value for name, value in vars(owner).items() if name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)
