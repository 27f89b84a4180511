"""TorchServe's logs: load failures of workers, and why a server ended."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, Optional

# Words of a JVM or operating system for a process's end.
_REASON = re.compile(r"\b\w*(Error|Exception)\b|[Oo]ut of memory|Killed|SIG[A-Z]+|fatal|No space left")


class LoadFailure(NamedTuple):
    """Why a worker could not load its archive, in one line; and the archive's name, if the log tells it."""

    name: Optional[str]
    reason: str


def load_failure(log: Path, start: int = 0, name: Optional[str] = None) -> Optional[LoadFailure]:
    """Return the first failure of a worker to load its archive in the log after `start` bytes, with `name` none of another
    archive; None if none failed."""
    content = log.read_bytes() if log.is_file() else b""
    text = (content[start:] if len(content) >= start else content).decode(
        "utf-8", "replace"
    )  # it may have been rotated
    for named in re.finditer(r"(?:Failed to load model (\S+)|Load model (\S+) cpu OOM), exception (.+)", text):
        failed = named[1] or named[2]
        if name in (None, failed):
            return LoadFailure(failed, named[3].strip())
    died = [match.end() for match in re.finditer("Backend worker process died", text)]
    if died:
        errors = re.findall(
            r"^\S+ +[A-Z]+ +((?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*)$", text[died[0] :], re.MULTILINE
        )
        if errors:
            return LoadFailure(None, str(errors[0]).strip())
        if len(died) > 1:  # the first one's reason would be between them
            return LoadFailure(None, "its process died without a reason")
    match = re.search(r"(?:ModelException|InvalidModelException|ArchiveException|ModelNotFoundException): (.+)", text)
    return LoadFailure(None, match[1].strip()) if match else None


def last_words(folder: Path) -> str:
    """Return why the server in a folder ended, according to its logs, as the end of a sentence."""
    logs = [folder / "logs" / name for name in ("start.log", "server.log")]
    text = "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs if log.is_file())
    lines = [line.strip() for line in text.splitlines() if line.strip() and "[cds]" not in line]
    told = [line for line in lines if _REASON.search(line)]
    return f": {(told or lines)[-1]}" if lines else " without a message in its log"
