"""Real clients against a real server: builds a tiny archive of every task, serves them, and calls everything.

    python tests/clients/run.py --python PYTHON [--python PYTHON ...] [--part PART] [--write docs/clients.md]

Each PYTHON has clients installed in its environment (see `nox -s clients`). Prints a table, and exits with 1 if a
call failed. With one part alone, only the rows of its clients are written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import load  # noqa: E402
import models  # noqa: E402
from conftest import run_export  # noqa: E402
from traceserve.archives.archive import pack_archive  # noqa: E402
from traceserve.serving import configuration, instances, server  # noqa: E402
from traceserve_runtime.tasks import TASKS  # noqa: E402

CHECKPOINTS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "zero_shot_classification": ("bert", {"id2label": {0: "contradiction", 1: "neutral", 2: "entailment"}}),
    "text_ranking": ("bert", {"num_labels": 1}),
    "text_generation": ("llama", {}),
    "text2text_generation": ("t5", {}),
}
_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
_BEGIN, _END = "<!-- calls -->\n", "<!-- end of calls -->\n"


def build(folder: Path) -> List[Path]:
    """Build a tiny archive of every task."""
    archives = []
    for name, task in TASKS.items():
        architecture, options = CHECKPOINTS.get(name, ("bert", {}))
        source = models.make(folder / "checkpoints" / name, architecture, task.auto_model, **options)
        if task.loop == "decoder":
            (source / "chat_template.jinja").write_text(_TEMPLATE)
        run_export(folder / name, {"model_name": str(source), "task": name, "max_length": 64, "max_batch_delay": 5})
        archives.append(pack_archive(folder / name, name, folder))
    return archives


def call(pythons: List[str], url: str) -> List[Dict[str, str]]:
    """Return every call's result."""
    rows = []
    for python in pythons:
        command = [python, str(Path(__file__).with_name("calls.py")), url]
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        rows += [json.loads(line) for line in done.stdout.splitlines()]
    return rows


def generate(pythons: List[str], url: str) -> List[Dict[str, str]]:
    """Send schemathesis's requests for each archive's own description, if it is installed.

    Rules beyond the schema (a question must not be empty) are no failures, nor that TorchServe accepts any method.
    """
    rows = []
    for program in (Path(python).with_name("schemathesis") for python in pythons):
        for name in TASKS if program.is_file() else ():
            base = f"{url}/predictions/{name}/1.0"
            # A URL on the command line holds for all paths; that of explanations is not below the others'.
            rows.append(_generated(program, name, base, "generated requests", "--exclude-path-regex", _EXPLANATIONS))
            if TASKS[name].explains is not None:
                what = "generated requests for explanations"
                rows.append(_generated(program, name, url, what, "--include-path-regex", _EXPLANATIONS))
    return rows


_EXPLANATIONS = "^/explanations/"


def _generated(program: Path, name: str, base: str, what: str, *paths: str) -> Dict[str, str]:
    described = base if base.endswith("/1.0") else f"{base}/predictions/{name}/1.0"
    settings = ["--config-file", str(Path(__file__).with_name("explanations.toml"))] if base != described else []
    command = [str(program), *settings, "run", f"{described}/openapi.json", "--url", base]
    # Some ask for thousands of tokens, which take more than its ten seconds on a busy machine.
    command += ["--max-examples", "25", "--request-timeout", "60", "--no-color", *paths]
    excluded = ["--exclude-checks", "unsupported_method,positive_data_acceptance"]
    done = subprocess.run([*command, *excluded], stdout=subprocess.PIPE, text=True)
    [counted] = re.findall(r"([\d,]+) generated", done.stdout) or ["0"]
    row = {"client": "schemathesis", "archive": name, "call": f"{counted} {what}"}
    return {**row, "result": "ok" if done.returncode == 0 else f"failed:\n{done.stdout}"}


def table(rows: List[Dict[str, str]]) -> str:
    """Format the results as Markdown."""
    lines = ["| client | archive | call | result |", "|---|---|---|---|"]
    lines += [f"| {row['client']} | `{row['archive']}` | `{row['call']}` | {row['result']} |" for row in rows]
    return "\n".join(lines) + "\n"


def sample_bodies(instance: instances.Instance) -> Dict[str, Any]:
    """Return the sample of each archive's task."""
    return {name: TASKS[name].sample_body(instance.manifest(name).facts) for name in instance.names}


def write(file: Path, rows: List[Dict[str, str]]) -> None:
    """Put the rows between the marks of a file; those of other clients stay."""
    before, rest = file.read_text(encoding="utf-8").split(_BEGIN)
    old, after = rest.split(_END)
    clients = {row["client"] for row in rows}
    kept = [line for line in old.splitlines()[2:] if line.split("|")[1].strip() not in clients]
    lines = table(rows).splitlines()
    file.write_text(
        before + _BEGIN + "\n".join([*lines[:2], *kept, *lines[2:]]) + "\n" + _END + after, encoding="utf-8"
    )


def main() -> int:
    """Build, serve, call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", required=True, metavar="PYTHON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks of this file")
    parser.add_argument("--part", choices=("calls", "generated", "load"), help="only these [all]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"] = scratch
        instance = server.start(build(Path(scratch)), port=configuration.free_ports(1)[0], timeout=180)
        try:
            url = f"http://127.0.0.1:{instance.port}"
            parts: Dict[str, Callable[[], List[Dict[str, str]]]] = {
                "calls": lambda: call(arguments.python, url),
                "generated": lambda: generate(arguments.python, url),
                "load": lambda: load.drive(arguments.python, url, sample_bodies(instance)),
            }
            rows = [row for name, part in parts.items() if arguments.part in (None, name) for row in part()]
        finally:
            instances.stop(instance)
    print(table(rows))
    if arguments.write:
        write(arguments.write, rows)
    failed = [row for row in rows if row["result"] not in ("ok", "refused") and not row["result"].startswith("skipped")]
    print(f"{len(rows)} calls, {len(failed)} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
