"""Random numbers that are the same in each build, without a trace in the caller's own."""

from __future__ import annotations

import contextlib
import random
from typing import Iterator


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Seed the generators of Python, numpy and torch's CPU, from which models draw; and give them back as they were."""
    import numpy as np
    import torch

    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # not torch.manual_seed, which reseeds GPUs too
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
