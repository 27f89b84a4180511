"""deploy: files for containers, clusters and clouds, made from archives."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from pathlib import Path
from typing import List, Sequence

from traceserve.commands.contract import Command
from traceserve.commands.printing import console, megabytes, print_line, print_note

_SHOWN = 12  # files shown per folder; more are only counted


def _add_deploy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="one of the targets above")
    parser.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE", help="a .mar that `traceserve build` made")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder for the files")
    parser.add_argument(
        "--engine",
        metavar="E",
        help="the server in the container: torchserve, ray or uvicorn for docker, torchserve or ray for "
        "kubernetes, and the only one of each other target [the first]",
    )
    parser.add_argument(
        "--image", metavar="NAME:TAG", help="the image's name in manifests and commands [NAME:VERSION of the archive]"
    )
    parser.add_argument(
        "--url",
        metavar="URL",
        help="the folder from which a cluster fetches the archives: https://..., s3://..., gs://...",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an earlier deployment in DIR, if nobody changed it"
    )
    parser.add_argument(
        "--discard-changes",
        action="store_true",
        help="with --force: also files that were changed or added in DIR since",
    )


def _deploy(options: argparse.Namespace) -> int:
    from traceserve.deploying import writing
    from traceserve.deploying.described import describe
    from traceserve.deploying.plan import Wishes
    from traceserve.deploying.targets import TARGETS, checked

    engine = checked(options.target, options.engine, options.image, options.url)
    writing.check_free(options.output, options.force, options.discard_changes)
    archives = describe(options.archives)
    plan = TARGETS[options.target].plan(archives, Wishes(engine, options.image, options.url))
    files = writing.write_plan(options.target, archives, plan, options.output)
    _print(options.output, files)
    for note in plan.notes:
        print_line("")
        print_note(note)
    print_line("\nnext:")
    folder = str(options.output)
    into = "cd -- " if folder.startswith("-") else "cd "
    for command in (f"{into}{shlex.quote(folder)}", *plan.commands):
        print_line(f"  {command}")
    return 0


def _print(folder: Path, files: Sequence[Path]) -> None:
    from rich.table import Table

    table = Table("file", "size")
    table.columns[1].justify = "right"
    for shown, size in _rows(folder, files):
        table.add_row(shown, size)
    console().print(table)


def _rows(folder: Path, files: Sequence[Path]) -> List[Sequence[str]]:
    """Return a row per file; one for all of a folder with many."""
    counts = Counter(file.parts[0] for file in files)
    rows: List[Sequence[str]] = []
    for file in files:
        first = file.parts[0]
        if counts[first] <= _SHOWN:
            rows.append((str(file), megabytes((folder / file).stat().st_size)))
        elif not rows or rows[-1][0] != f"{first}/ ({counts[first]} files)":
            size = sum((folder / each).stat().st_size for each in files if each.parts[0] == first)
            rows.append((f"{first}/ ({counts[first]} files)", megabytes(size)))
    return rows


_TEXT = """\
Write files that deploy archives: for a container, a cluster or a cloud.

Their facts come from the archives: names, versions, hardware, a request that each can answer (the canary
of health checks), sizes, and the best number of workers by `traceserve tune`.

targets:
  docker      a Dockerfile and its context: slim, not root, a read-only root, a health check that asks a prediction
  kubernetes  a Helm chart and its image: probes that ask a prediction, keys, autoscaling, network policy
  kserve      a ServingRuntime and its image, an InferenceService for each archive; KServe's V1 and V2 protocols
  kuberay     a RayService and its image: replicas that scale by what waits, on nodes that scale
  sagemaker   model.tar.gz and an image: GET /ping, POST /invocations, as Amazon SageMaker asks; one archive
  mlflow      a pyfunc model: `mlflow models serve`, registries, batch jobs; one archive

examples:
  traceserve deploy docker model_store/NAME.mar --output deploy/docker
  traceserve deploy kubernetes model_store/NAME.mar --image registry.example.org/name:1.0 --output deploy/kubernetes
"""

COMMANDS = (Command("deploy", _TEXT, _add_deploy, _deploy),)
