"""Compare archives with their SHA-256, then become the server that reads them.

python -m traceserve.deploying.inside.pinned /archives/NAME.mar=HEX ... -- PROGRAM ARGUMENT ...
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Optional, Sequence


def main(arguments: Sequence[str]) -> Optional[str]:
    """Gives why the program was not started; where it is, this process is the program, and signals reach it."""
    if "--" not in arguments:
        return "usage: ARCHIVE=SHA256 ... -- PROGRAM ARGUMENT ..."
    behind = arguments.index("--")
    for pin in arguments[:behind]:
        file, _, expected = pin.rpartition("=")
        try:
            found = _sha256(file)
        except OSError as error:
            return f"{file} cannot be read: {error}"
        if found != expected.lower():
            return f"{file} is not the archive that was deployed: its SHA-256 is {found}, and should be {expected}"
    program = list(arguments[behind + 1 :])
    return os.execvp(program[0], program)


def _sha256(file: str) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as source:
        for part in iter(lambda: source.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))  # 1 for a text, which goes to standard error
