"""Replaces parts of libraries for as long as a model is traced, converted or saved."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from typing import Any, Callable, Iterator


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


@contextlib.contextmanager
def replaced_here(owner: object, **functions: object) -> Iterator[None]:
    """Replace functions, methods or class methods in this thread alone: other threads of the program, which may train a model,
    call the original ones.

    For torch's own, which any thread calls. Dynamo's strict exports cannot trace it, since they cannot ask for the thread.
    """
    thread = threading.get_ident()

    def of_thread(ours: Callable[..., object], own: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(ours)
        def either(*arguments: Any, **named: Any) -> object:
            return (ours if threading.get_ident() == thread else own)(*arguments, **named)

        return either

    def replacement(name: str, ours: Any) -> object:
        own: Any = inspect.getattr_static(owner, name)
        if isinstance(ours, classmethod):
            # Torch 1.13's is one of C, without a __func__.
            def bound(cls: Any, *arguments: Any, **named: Any) -> object:
                return own.__get__(None, cls)(*arguments, **named)

            return classmethod(of_thread(ours.__func__, bound))
        return of_thread(ours, own)

    with replaced(owner, **{name: replacement(name, ours) for name, ours in functions.items()}):
        yield
