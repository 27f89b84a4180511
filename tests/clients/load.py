"""Load generators that people use, against served archives: no request may fail, and answers must be right.

ab and wrk are programs of the system (Debian's apache2-utils and wrk), left out by name where they are missing; locust stands
beside a client's Python, and compares every answer with the one that the archive gave before, alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, Dict, List, Mapping

HERE = Path(__file__).parent
CONNECTIONS, REQUESTS, SECONDS = 8, 200, 3


def drive(pythons: List[str], url: str, bodies: Mapping[str, Any]) -> List[Dict[str, str]]:
    """Return the result of each load generator for each archive; `bodies` holds what is sent to each."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, body in bodies.items():
            file = Path(scratch, f"{name}.json")
            file.write_text(json.dumps(body), encoding="utf-8")
            address = f"{url}/predictions/{name}"
            rows += [_ab(name, address, file), _wrk(name, address, file)]
        for program in (Path(python).with_name("locust") for python in pythons):
            if program.is_file():
                rows += _locust(program, url, Path(scratch), bodies)
    return rows


def _row(client: str, name: str, what: str, wrong: str) -> Dict[str, str]:
    return {"client": client, "archive": name, "call": what, "result": wrong or "ok"}


def _missing(client: str, name: str) -> Dict[str, str]:
    return _row(client, name, "-", f"skipped: {client} is not installed")


def _ab(name: str, address: str, file: Path) -> Dict[str, str]:
    program = shutil.which("ab")
    if program is None:
        return _missing("ab", name)
    options = ["-q", "-l", "-n", str(REQUESTS), "-c", str(CONNECTIONS), "-k", "-p", str(file), "-T", "application/json"]
    done = subprocess.run([program, *options, address], capture_output=True, text=True, timeout=300)
    found = dict(re.findall(r"^(Complete|Failed|Non-2xx)[^:]*: +(\d+)", done.stdout, re.MULTILINE))
    right = done.returncode == 0 and found == {"Complete": str(REQUESTS), "Failed": "0"}
    return _row("ab", name, f"{REQUESTS} requests over {CONNECTIONS} connections", "" if right else _failed(done))


def _wrk(name: str, address: str, file: Path) -> Dict[str, str]:
    program = shutil.which("wrk")
    if program is None:
        return _missing("wrk", name)
    options = ["-t", "1", "-c", str(CONNECTIONS), "-d", f"{SECONDS}s", "--timeout", "60s", "-s", str(HERE / "post.lua")]
    done = subprocess.run([program, *options, address, "--", str(file)], capture_output=True, text=True, timeout=300)
    counted = re.search(r"(\d+) requests in", done.stdout)
    clean = "Non-2xx" not in done.stdout and "Socket errors" not in done.stdout
    right = done.returncode == 0 and counted is not None and int(counted[1]) > 0 and clean
    return _row("wrk", name, f"{SECONDS} s over {CONNECTIONS} connections", "" if right else _failed(done))


def _locust(program: Path, url: str, scratch: Path, bodies: Mapping[str, Any]) -> List[Dict[str, str]]:
    """Ask every archive at once, and compare each answer with the archive's own of before."""
    cases = {
        name: {"body": body, "answer": _answer(f"{url}/predictions/{name}", body)} for name, body in bodies.items()
    }
    file = scratch / "cases.json"
    file.write_text(json.dumps(cases), encoding="utf-8")
    options = ["--headless", "--only-summary", "--json", "--users", str(CONNECTIONS), "--spawn-rate", str(CONNECTIONS)]
    command = [str(program), "-f", str(HERE / "locustfile.py"), *options, "--run-time", f"{SECONDS * len(cases)}s"]
    environment = {**os.environ, "CASES": str(file)}
    done = subprocess.run([*command, "--host", url], env=environment, capture_output=True, text=True, timeout=600)
    start = done.stdout.find("[")
    counted = {one["name"]: one for one in json.loads(done.stdout[start:])} if start >= 0 else {}
    rows = []
    for name in cases:
        own = counted.get(name, {"num_requests": 0, "num_failures": 0})
        right = own["num_requests"] > 0 and own["num_failures"] == 0
        what = f"{SECONDS * len(cases)} s of {CONNECTIONS} users of all archives, each answer compared"
        rows.append(_row("locust", name, what, "" if right else _failed(done)))
    return rows


def _answer(address: str, body: Any) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def _failed(done: subprocess.CompletedProcess[str]) -> str:
    return f"failed:\n{done.stdout}{done.stderr}"
