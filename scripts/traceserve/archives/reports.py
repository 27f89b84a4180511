"""A build's report, NAME.report.json beside its artifact and its archive: what differs from run to run, so not in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Mapping

from traceserve.archives import staging


def report_file(made: Path) -> Path:
    """Return the file of the report on an artifact or an archive."""
    return made.with_name(f"{made.stem if made.suffix == '.mar' else made.name}.report.json")


def write_report(made: Path, report: Mapping[str, object]) -> None:
    """Write the report on an artifact or an archive, in place of an earlier build's; raises TraceserveError."""
    staging.write_whole(report_file(made), json.dumps(report, indent=2) + "\n")


def copy_report(artifact: Path, archive: Path) -> None:
    """Put an artifact's report beside the archive that it was packed into, and remove an earlier archive's if it has none;
    raises TraceserveError."""
    try:
        text = report_file(artifact).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        report_file(archive).unlink(missing_ok=True)
    else:
        staging.write_whole(report_file(archive), text)
