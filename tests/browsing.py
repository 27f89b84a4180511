"""A headless Chromium, and the playground started for real, for tests and pictures of its page."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium(playwright: Any) -> Optional[str]:
    """Playwright's own, or one on the PATH; None where there is neither."""
    own = playwright.chromium.executable_path
    return own if Path(own).exists() else next(filter(None, map(shutil.which, _PROGRAMS)), None)


def launched(playwright: Any) -> Any:
    """The browser."""
    program = chromium(playwright)
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's cannot be used by root
    return playwright.chromium.launch(executable_path=program, args=sandbox)


@contextlib.contextmanager
def playground(folder: Path, port: int, *arguments: str, **environment: str) -> Iterator[str]:
    """`traceserve playground`, in a process of its own; its URL, once it says that. What it prints goes into files."""
    temporary = folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    settings: Dict[str, str] = {**os.environ, "TMPDIR": str(temporary), "HOME": str(folder), **environment}
    command = [sys.executable, "-m", "traceserve", "playground", "--port", str(port), *arguments]
    with (folder / "printed.txt").open("w") as printed:
        process = subprocess.Popen(command, env=settings, cwd=folder, stdout=printed, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                said = (folder / "printed.txt").read_text()
                if url in said:
                    break
                assert process.poll() is None, said
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait(30)
