"""TorchServe's logs: load failures of workers, and the last line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Optional


def load_failure(log: Path, start: int = 0) -> Optional[str]:
    """Return in one line why a worker could not load its archive, from the log after `start` bytes; None if none
    failed."""
    content = log.read_bytes() if log.is_file() else b""
    text = (content[start:] if len(content) >= start else content).decode(
        "utf-8", "replace"
    )  # it may have been rotated
    match = re.search(r"(?:Failed to load model \S+|Load model \S+ cpu OOM), exception (.+)", text)
    if match:
        return match.group(1).strip()
    died = [match.end() for match in re.finditer("Backend worker process died", text)]
    if died:
        errors = re.findall(
            r"^\S+ +[A-Z]+ +((?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*)$", text[died[0] :], re.MULTILINE
        )
        if errors:
            return str(errors[0]).strip()
        if len(died) > 1:  # the first one's reason would be between them
            return "its process died without a reason"
    match = re.search(r"(?:ModelException|InvalidModelException|ArchiveException|ModelNotFoundException): (.+)", text)
    return match.group(1).strip() if match else None


def log_tail(folder: Path) -> str:
    """Return the last line of the logs in a server's folder, as the end of an error."""
    for log in (folder / "logs" / "server.log", folder / "logs" / "start.log"):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
        if lines:
            return f": {lines[-1]}"
    return ""
