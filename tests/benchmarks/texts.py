"""The texts that the benchmarks send: sentences of a CSV file, and longer ones made by joining these."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import List, Sequence, Tuple


def read(path: Path, column: str = "text") -> List[str]:
    """One text for each line of a CSV file with a header."""
    with path.open(encoding="utf-8", newline="") as stream:
        return [row[column] for row in csv.DictReader(stream)]


def joined(texts: Sequence[str], words: int, random_state: random.Random) -> str:
    """Sentences in a random order, joined and cut to exactly so many words."""
    found: List[str] = []
    while len(found) < words:
        found += random_state.choice(texts).split()
    return " ".join(found[:words])


def mixed(texts: Sequence[str], words: Tuple[int, int] = (100, 400), every: int = 10, seed: int = 0) -> List[str]:
    """The sentences, but one in `every` is as many words long as lie in `words`, each length as likely."""
    random_state = random.Random(seed)
    return [
        joined(texts, random_state.randint(*words), random_state) if i % every == 0 else text
        for i, text in enumerate(texts)
    ]
