"""`mlflow`: a pyfunc model, which MLflow itself writes."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Sequence

from packaging.version import Version
from traceserve_runtime.json_types import JsonObject
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.parameters import Parameter

from traceserve.archives import staging
from traceserve.archives.contents import unpack
from traceserve.deploying import engines, packages, templates
from traceserve.deploying.described import Described
from traceserve.deploying.plan import DeployTarget, Made, Plan, Wishes
from traceserve.errors import DeployError
from traceserve.serving.curl import curl

_PORT = 5000
_OLDEST = 3  # of MLflow's major versions


def plan(archives: Sequence[Described], wishes: Wishes) -> Plan:
    """The model's folder; raises DeployError where MLflow is not installed."""
    archive = engines.only(archives, "an MLflow model")
    if importlib.util.find_spec("mlflow") is None:
        raise DeployError("MLflow writes this model itself, and is not installed: pip install mlflow")
    _check_version()
    return Plan(
        (Made("model", lambda target: _save(archive, target)),),
        (
            "pip install --requirement model/requirements.txt",
            f"mlflow models serve --model-uri model --env-manager local --port {_PORT}",
            curl(f"http://127.0.0.1:{_PORT}/invocations", _sample(archive)),
        ),
        ("`mlflow models build-docker`, registries and batch jobs take the same folder.",),
    )


def _check_version() -> None:
    """Raise DeployError for MLflow 2, which loads a model to save it: this process has another runtime than the archive's."""
    from mlflow.version import VERSION

    if Version(VERSION).major < _OLDEST:
        raise DeployError(
            f"the model is written by MLflow {_OLDEST} or later, and {VERSION} is installed: pip install -U mlflow"
        )


def _sample(archive: Described) -> JsonObject:
    """The task's sample as a body for MLflow's server."""
    task = TASKS[archive.manifest.task]
    body = task.sample_body(archive.manifest.facts)
    sample = {name: value for name, value in body.items() if task.has_field(name)}
    return {"instances": [sample], **({"params": task.sample_parameters} if task.sample_parameters else {})}


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
        requirements = packages.requirements([archive], ("mlflow",))
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
    """The task's fields as columns, or none where a field is no text or list of texts; and its parameters."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    task = TASKS[archive.manifest.task]
    kinds = {"text": DataType.string, "texts": Array(DataType.string)}
    columns = [
        ColSpec(kinds[field.kind], field.name, required=field.required) for field in task.fields if field.kind in kinds
    ]
    return ModelSignature(
        inputs=Schema(columns) if len(columns) == len(task.fields) else None, params=_parameters(task.all_parameters())
    )


def _parameters(parameters: Sequence[Parameter]) -> object:
    """The parameters that MLflow has a type for. Their default, None or an empty list, stands for one that is not set."""
    from mlflow.types import DataType, ParamSchema, ParamSpec

    kinds = {int: DataType.long, float: DataType.double, bool: DataType.boolean, str: DataType.string}
    found = [ParamSpec(each.name, kinds[each.type], None) for each in parameters if each.type in kinds]
    lists = [each for each in parameters if each.type is list]
    found += [ParamSpec(each.name, DataType.long if each.numbers else DataType.string, [], (-1,)) for each in lists]
    return ParamSchema(found)


TARGET = DeployTarget(("mlflow",), plan, ())
