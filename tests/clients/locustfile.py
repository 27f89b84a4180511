"""For locust: asks each archive of the file CASES for its body's answer, and fails what is answered otherwise."""

import json
import os
from pathlib import Path
from typing import Any

from locust import FastHttpUser, task

CASES = json.loads(Path(os.environ["CASES"]).read_text(encoding="utf-8"))
TOLERANCE = 1e-4  # of numbers: their last digits depend on the batch


def alike(got: Any, expected: Any) -> bool:
    """Whether two answers are the same but for the last digits of numbers."""
    if isinstance(expected, dict):
        return isinstance(got, dict) and got.keys() == expected.keys() and all(alike(got[k], expected[k]) for k in got)
    if isinstance(expected, list):
        return isinstance(got, list) and len(got) == len(expected) and all(map(alike, got, expected))
    if isinstance(expected, float):
        return isinstance(got, (int, float)) and abs(got - expected) <= TOLERANCE * max(1.0, abs(expected))
    return bool(got == expected)


class Asker(FastHttpUser):
    """Asks one archive after the other, without a pause."""

    @task
    def ask(self) -> None:
        for name, case in CASES.items():
            with self.client.post(
                f"/predictions/{name}", json=case["body"], name=name, catch_response=True
            ) as response:
                if response.status_code != 200:
                    response.failure(f"status {response.status_code}")
                elif not alike(response.json(), case["answer"]):
                    response.failure("another answer than alone")
