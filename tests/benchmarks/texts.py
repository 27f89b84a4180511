"""The benchmarks' texts: sentences of a CSV file, and longer ones joined from these."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import List, Sequence, Tuple


def read(path: Path, column: str = "text") -> List[str]:
    """Read one text per line of a CSV file with a header."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [row[column] for row in csv.DictReader(stream)]


def joined(texts: Sequence[str], words: int, random_state: random.Random) -> str:
    """Join sentences in random order and cut to exactly this many words."""
    found: List[str] = []
    while len(found) < words:
        found += random_state.choice(texts).split()
    return " ".join(found[:words])


def mixed(texts: Sequence[str], words: Tuple[int, int] = (100, 400), every: int = 10, seed: int = 0) -> List[str]:
    """Return the sentences; one in `every` has a number of words drawn uniformly from `words`."""
    random_state = random.Random(seed)
    return [
        joined(texts, random_state.randint(*words), random_state) if i % every == 0 else text
        for i, text in enumerate(texts)
    ]
