"""Torch's modes while an archive runs, whatever the calling program has set: its own dtype, with gradients or without."""

from __future__ import annotations

import contextlib
from typing import ContextManager, Iterator, List


def own_dtype() -> ContextManager[object]:
    """Return a context in which the program's `torch.autocast` does not change what is computed; without one, entering it
    costs nothing."""
    kinds = _autocast()
    return _without_autocast(kinds) if kinds else contextlib.nullcontext()


def inference() -> ContextManager[object]:
    """Return the context of a run: no gradients, and our own dtype."""
    import torch

    return _inference_without_autocast() if _autocast() else torch.inference_mode()


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Compute with gradients in our own dtype; tensors made here may have some, also within the program's
    `torch.inference_mode`."""
    import torch

    with own_dtype(), torch.inference_mode(False), torch.enable_grad():
        yield


def _autocast() -> List[str]:
    """Return the types of devices with autocast in this thread."""
    import torch

    try:
        return [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    except TypeError:  # before torch 2.4
        found = {"cpu": torch.is_autocast_cpu_enabled(), "cuda": torch.is_autocast_enabled()}
        return [kind for kind, enabled in found.items() if enabled]


@contextlib.contextmanager
def _without_autocast(kinds: List[str]) -> Iterator[None]:
    import torch

    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def _inference_without_autocast() -> Iterator[None]:
    import torch

    with own_dtype(), torch.inference_mode():
        yield
