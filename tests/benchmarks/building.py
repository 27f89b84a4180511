"""Our archives for the benchmarks: given, or built from a checkpoint by `traceserve build`."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Dict, Sequence

# Our settings for each kind of answer. The rivals' embeddings are pooled too.
SETTINGS: Dict[str, Dict[str, Any]] = {
    "classification": {"task": "sequence_classification"},
    "embeddings": {"task": "feature_extraction", "parameters": {"pooling": "mean", "normalize": True}},
}


def add_archive_options(parser: argparse.ArgumentParser, max_length: int) -> None:
    """Add options for an archive of ours, or its build."""
    parser.add_argument("--archive", type=Path, metavar="MAR", help="ours; without it one is built from --model")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the checkpoint")
    add_build_options(parser, max_length)


def add_build_options(parser: argparse.ArgumentParser, max_length: int) -> None:
    """Add options for building an archive of ours."""
    parser.add_argument("--max-length", type=int, default=max_length, metavar="N", help="in tokens [%(default)s]")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for our setup_config.json, such as dtype=bfloat16; the value is JSON or text; repeatable",
    )


def settings(options: argparse.Namespace, **defaults: Any) -> Dict[str, Any]:
    """Return the options of `add_build_options`, for `build`."""
    chosen: Dict[str, Any] = {"max_length": options.max_length, **defaults}
    for setting in options.setting:
        key, _, value = setting.partition("=")
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        chosen[key] = value
    return chosen


def archive_of(options: argparse.Namespace, folder: Path, **defaults: Any) -> Path:
    """Return the archive of `add_archive_options`, built in `folder` if it is not given."""
    if options.archive is not None:
        given: Path = options.archive.resolve()
        return given
    if options.model is None:
        sys.exit("give --archive MAR, or --model FOLDER to build one")
    return build(options.model, folder, settings(options, **defaults))


def unpacked(archive: Path, folder: Path) -> Path:
    """Unpack the archive into the folder."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def build(model: Path, folder: Path, config: Dict[str, Any], arguments: Sequence[str] = ()) -> Path:
    """Build an archive with `traceserve build`."""
    file = folder / "setup_config.json"
    file.write_text(json.dumps({"model_name": str(model.resolve()), **config}))
    command = [sys.executable, "-m", "traceserve", "build", "--config", str(file), "--store", str(folder)]
    command += ["--output", str(folder / "bench"), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        sys.exit(result.stdout)
    return folder / "bench.mar"
