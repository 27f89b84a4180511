"""Ask a server a request that each of its archives must be able to answer; exit 0 where all answer, else 1.

TorchServe's own /ping says Healthy of a frontend whose workers are dead or hang: what counts is an answer of the model.

    python -m traceserve.deploying.inside.canary canaries.json [--url http://127.0.0.1:8080] [--timeout 20]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Dict, Mapping, Optional, Sequence


def main(arguments: Optional[Sequence[str]] = None) -> Optional[str]:
    """Ask each; gives what is wrong with the first that fails, never what it was asked, or None."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="JSON: the path of each archive, and a body that it can answer")
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--timeout", type=float, default=20.0)
    options = parser.parse_args(arguments)
    canaries: Dict[str, object] = json.loads(options.file.read_text(encoding="utf-8"))
    headers = {"Content-Type": "application/json", **_key(os.environ)}
    # Straight to this machine, whatever proxy the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path, body in canaries.items():
        request = urllib.request.Request(f"{options.url}{path}", json.dumps(body).encode(), headers)
        try:
            with opener.open(request, timeout=options.timeout) as response:
                json.loads(response.read())
        except (OSError, ValueError) as error:
            return f"{path} gave no answer: {error}"
    return None


def _key(environment: Mapping[str, str]) -> Dict[str, str]:
    """The key that the server demands now: the one in the file that it was given, the latest that `traceserve serve` keeps in
    this container (a server that died may have left its own), or the one of the environment, which may have been replaced."""
    file = environment.get("TRACESERVE_KEY_FILE")
    key = _in_file(file) if file else _kept(environment) or environment.get("TRACESERVE_KEY", "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


def _in_file(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _kept(environment: Mapping[str, str]) -> str:
    state = environment.get("XDG_STATE_HOME") or str(Path(environment.get("HOME", "/tmp"), ".local", "state"))
    files = Path(state, "traceserve", "servers").glob("*.json")
    for file in sorted(files, key=_written, reverse=True):
        try:
            key: Optional[str] = json.loads(file.read_text(encoding="utf-8")).get("key")
        except (OSError, ValueError):
            continue
        if key:
            return key
    return ""


def _written(file: Path) -> float:
    """When a file was written; 0 if it has been removed since."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


if __name__ == "__main__":
    sys.exit(main())  # 1 for a text, which goes to standard error
