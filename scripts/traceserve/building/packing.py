"""A configuration to an artifact and its archive: both appear at the end, or neither."""

from __future__ import annotations

from contextlib import ExitStack

from traceserve.archives import archive, reports, staging
from traceserve.building.config.parsing import LoadedConfig
from traceserve.building.config.targets import Targets
from traceserve.building.export import export
from traceserve.building.exported import Exported
from traceserve.building.gate_options import GateOptions
from traceserve.building.progress import Progress


def export_and_pack(
    loaded: LoadedConfig, written: Targets, progress: Progress, gate: GateOptions = GateOptions()
) -> Exported:
    """Write the artifact and its archive, and the report beside each; raises as `export`."""
    name = written.artifact.resolve().name
    with ExitStack() as stack:
        # Staged folders are filled in reverse order: the archive must come last.
        store = stack.enter_context(staging.staged(written.archive)) if written.archive else None
        folder = stack.enter_context(staging.staged(written.artifact)) / written.artifact.name
        folder.mkdir()
        exported = export(loaded, name, folder, progress, gate)
        if store:
            progress("packing", 0, 0)
            archive.pack_archive(folder, name, store, written.version)
        written.check()  # another build may have written them since
    for made in filter(None, (written.artifact, written.archive)):
        reports.write_report(made, exported.report())
    return exported
