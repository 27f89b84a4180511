"""Other servers on a tiny archive, over HTTP: the recipes of docs/hosts.md as they stand there, and `traceserve deploy mlflow`.

    python tests/hosts/run.py --python PYTHON

PYTHON has the servers' packages in its environment (see `nox -s hosts`). Exits with 1 if an answer is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import models  # noqa: E402
from conftest import run_export  # noqa: E402
from traceserve.archives.archive import pack_archive  # noqa: E402
from traceserve.serving.configuration import free_ports  # noqa: E402

MOST_LINES = 20  # of a recipe
ARCHIVE = "model_store/support-intents.mar"  # as the recipes name it


def recipes() -> Dict[str, str]:
    """Return the code of docs/hosts.md by its heading."""
    text = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^## (\w+)\n.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def build(folder: Path) -> Path:
    """Build the archive that the recipes name."""
    source = models.make(
        folder / "checkpoint", "bert", id2label={0: "red", 1: "green"}, label2id={"red": 0, "green": 1}
    )
    config = {"model_name": str(source), "task": "sequence_classification", "max_length": 32, "dtype": "float32"}
    run_export(folder / "support-intents", config)
    (folder / "model_store").mkdir()
    return pack_archive(folder / "support-intents", "support-intents", folder / "model_store")


@contextlib.contextmanager
def running(command: List[str], folder: Path, environment: Dict[str, str], url: str) -> Iterator[None]:
    """A server, from when it answers on; all its processes are ended."""
    log = folder / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while ask(url, {"text": "Yes."})[0] == 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} gave no answer:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def ask(url: str, body: Any) -> Tuple[int, Any]:
    """Return the status and the answer; 0 where nothing listens."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status), json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
    except OSError:
        return 0, None


def check_each(url: str) -> None:
    """Ask for answers and refusals at once: each request has its own."""
    bodies = [{"text": f"This is text {i}."} if i % 3 else {"txt": "no"} for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda body: ask(url, body), bodies))
    for body, (status, answer) in zip(bodies, replies):
        if "text" in body:
            assert status == 200 and set(answer) == {"label", "score"}, (status, answer)
        else:
            assert status == 400 and answer["error"]["type"] == "InvalidRequest", (status, answer)
    assert len({answer["score"] for status, answer in replies if status == 200}) > 1


def check_litserve(python: str, folder: Path, environment: Dict[str, str]) -> None:
    """Run the recipe and ask it."""
    [port] = free_ports(1)
    (folder / "litserve_archive.py").write_text(recipes()["LitServe"].replace("port=8000", f"port={port}"))
    url = f"http://127.0.0.1:{port}/predict"
    with running([python, "litserve_archive.py"], folder, environment, url):
        check_each(url)


def check_bentoml(python: str, folder: Path, environment: Dict[str, str]) -> None:
    """Run the recipe and ask it, at other protocols' paths too."""
    [port] = free_ports(1)
    (folder / "bentoml_archive.py").write_text(recipes()["BentoML"])
    url = f"http://127.0.0.1:{port}"
    command = [python, "-m", "bentoml", "serve", "bentoml_archive:Server", "--port", str(port), "--host", "127.0.0.1"]
    with running(command, folder, environment, f"{url}/predictions/support-intents"):
        check_each(f"{url}/predictions/support-intents")
        status, answer = ask(f"{url}/v1/classify", {"input": ["Yes."]})
        assert status == 200 and answer["data"][0]["label"] in ("red", "green"), answer


def check_mlflow(python: str, folder: Path, environment: Dict[str, str]) -> None:
    """Deploy the archive, serve the model by MLflow's own command, and ask in each of its forms."""
    command = [python, "-m", "traceserve", "deploy", "mlflow", ARCHIVE, "--output", "mlflow"]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    own = {name: value for name, value in environment.items() if name != "PYTHONPATH"}  # the model brings its code
    shutil.copytree(folder / "mlflow" / "model", folder / "copy")
    script = Path(__file__).with_name("mlflow_process.py")
    subprocess.run([python, str(script), "mlflow/model", "copy"], cwd=folder, env=own, check=True, timeout=300)
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}/invocations"
    command = [python, "-m", "mlflow", "models", "serve", "--model-uri", "mlflow/model", "--env-manager", "local"]
    with running([*command, "--port", str(port)], folder, own, url):
        first = ask(url, {"instances": [{"text": "Yes."}]})[1]["predictions"]
        assert set(first[0]) == {"label", "score"}
        for body in (
            {"inputs": {"text": ["Yes."]}},
            {"dataframe_records": [{"text": "Yes."}]},
            {"dataframe_split": {"columns": ["text"], "data": [["Yes."]]}},
        ):
            assert ask(url, body)[1]["predictions"] == first, body
        # (What a signature does not name MLflow itself leaves out, before the model sees it.)
        status, answer = ask(url, {"dataframe_records": [{"text": "Yes."}, {"text": None}]})
        assert status == 400 and answer["error_code"] in ("BAD_REQUEST", "INVALID_PARAMETER_VALUE"), answer
        many = ask(url, {"dataframe_records": [{"text": "Yes.", "text_pair": "No."}, {"text": "Yes."}]})[1]
        assert len(many["predictions"]) == 2 and many["predictions"][1] == first[0]
        status, answer = ask(url, {"inputs": {"text": ["Yes.", "No."], "text_pair": ["No."]}})
        assert status == 400, answer
        labels = ask(url, {"dataframe_records": [{"text": "Yes."}], "params": {"top_k": 2}})[1]["predictions"]
        assert labels[0][0] == first[0] and len(labels[0]) == 2, labels
        # MLflow answers in many threads, and the engine is for one: it cuts a long text with its tokenizer changed.
        texts = ["Yes.", "Yes, this text is longer than the model reads. " * 20] * 20
        with ThreadPoolExecutor(6) as pool:
            told = list(pool.map(lambda text: ask(url, {"dataframe_records": [{"text": text}]})[1], texts))
        assert all(answer["predictions"] == first for answer in told[::2]), told[::2]


CHECKS = {"LitServe": check_litserve, "BentoML": check_bentoml, "MLflow": check_mlflow}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True)
    options = parser.parse_args()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "scripts"), str(ROOT / "handlers"))),
        "PATH": f"{Path(options.python).parent}{os.pathsep}{os.environ['PATH']}",
        "BENTOML_DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name, code in recipes().items():
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= MOST_LINES, f"the recipe for {name} has {len(lines)} lines"
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder)
        own = {**environment, "HOME": temporary, "XDG_CACHE_HOME": str(folder / "cache")}
        for name, check in CHECKS.items():
            started = time.monotonic()
            try:
                check(options.python, folder, own)
                print(f"{name}: ok, {time.monotonic() - started:.0f} s")
            except (AssertionError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
                failed += 1
                print(f"{name}: failed: {error!r}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
