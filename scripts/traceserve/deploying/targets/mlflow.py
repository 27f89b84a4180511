"""`mlflow`: a pyfunc model, which MLflow itself writes."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Sequence

from traceserve_runtime.tasks import TASKS

from traceserve.archives import staging
from traceserve.archives.contents import unpack
from traceserve.deploying import engines, packages, templates
from traceserve.deploying.described import Described
from traceserve.deploying.plan import DeployTarget, Made, Plan, Wishes
from traceserve.errors import DeployError
from traceserve.serving.curl import curl

_PORT = 5000


def plan(archives: Sequence[Described], wishes: Wishes) -> Plan:
    """The model's folder; raises DeployError where MLflow is not installed."""
    archive = engines.only(archives, "an MLflow model")
    if importlib.util.find_spec("mlflow") is None:
        raise DeployError("MLflow writes this model itself, and is not installed: pip install mlflow")
    task = TASKS[archive.manifest.task]
    names = {field.name for field in task.fields}
    sample = {name: value for name, value in task.sample_body(archive.manifest.facts).items() if name in names}
    return Plan(
        (Made("model", lambda target: _save(archive, target)),),
        (
            "pip install --requirement model/requirements.txt",
            f"mlflow models serve --model-uri model --env-manager local --port {_PORT}",
            curl(f"http://127.0.0.1:{_PORT}/invocations", {"instances": [sample]}),
        ),
        ("`mlflow models build-docker`, registries and batch jobs take the same folder.",),
    )


def _save(archive: Described, target: Path) -> None:
    """Write the model by MLflow's own function: its format is its own."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from traceserve_hosts.mlflow_model import ARTIFACT

    hosts = importlib.util.find_spec("traceserve_hosts")
    assert hosts is not None and hosts.submodule_search_locations
    with staging.scratch() as folder, warnings.catch_warnings():
        unpack(archive.file, folder / ARTIFACT)
        code = folder / "model.py"
        code.write_text(templates.read_template("mlflow/model.py"), encoding="utf-8")
        requirements = packages.requirements([archive], packages.ENGINE_PACKAGES["mlflow"])
        warnings.simplefilter("ignore", UserWarning)  # that there are no type hints and no example
        mlflow.pyfunc.save_model(
            str(target),
            python_model=str(code),
            artifacts={ARTIFACT: str(folder / ARTIFACT)},
            code_paths=[hosts.submodule_search_locations[0]],
            pip_requirements=requirements,
            signature=_signature(archive),
            metadata={"traceserve": {"name": archive.name, "version": archive.version, "sha256": archive.sha256}},
        )


def _signature(archive: Described) -> object:
    """The task's fields as columns; none where a field is no text or list of texts."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    kinds = {"text": DataType.string, "texts": Array(DataType.string)}
    fields = TASKS[archive.manifest.task].fields
    if any(field.kind not in kinds for field in fields):
        return None
    columns = [ColSpec(kinds[field.kind], field.name, required=field.required) for field in fields]
    return ModelSignature(inputs=Schema(columns))


TARGET = DeployTarget(
    "a pyfunc model: `mlflow models serve`, registries, batch jobs; one archive", ("mlflow",), plan, ()
)
