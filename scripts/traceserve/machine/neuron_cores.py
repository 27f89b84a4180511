"""This machine's NeuronCores, each of which belongs to one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Dict, Mapping

from traceserve_runtime.runtimes.torchscript.neuron import CERTAIN_CORES, CHIPS, CORES

from traceserve.errors import ServerError

TOOL = "neuron-ls"
TOOLS = Path("/opt/aws/neuron/bin")  # the location in AWS's images, not always on the PATH
DEVICE_FOLDER = Path("/dev")


def count(hardware: str) -> int:
    """Return this machine's number of cores; 0 without a chip or its driver."""
    tool = shutil.which(TOOL) or str(TOOLS / TOOL)
    try:
        result = subprocess.run(
            [tool, "--json-output"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=False
        )
        return sum(int(device["nc_count"]) for device in json.loads(result.stdout))
    except (OSError, subprocess.SubprocessError):  # the driver may be installed without its tools
        return CHIPS[hardware].cores * len(list(DEVICE_FOLDER.glob("neuron[0-9]*")))
    except (ValueError, TypeError, KeyError):  # it prints nothing without a driver
        return 0


def for_workers(hardware: Mapping[str, str], workers: Mapping[str, int]) -> Dict[str, str]:
    """Return the environment variables with which each worker takes one core; raises ServerError if there are too few.

    `hardware` and `workers` are by archive; archives that need no core do not count.
    """
    compiled = [name for name in hardware if hardware[name] in CHIPS]
    if not compiled:
        return {}
    names, wanted = ", ".join(compiled), sum(workers[name] for name in compiled)
    kind = hardware[compiled[0]]
    there = count(kind)
    if not there:
        raise ServerError(
            f"{names} runs on {CHIPS[kind].machines}, but this machine has no NeuronCore: {TOOL} lists none, "
            f"and there is no {DEVICE_FOLDER}/neuron0; serve it on such a machine, with its driver loaded"
        )
    if wanted > there:
        raise ServerError(
            f"{names} would have {wanted} workers, but this machine has {there} NeuronCores, and each worker takes one of "
            f"its own; ask for at most {there} with --workers"
        )
    certain = os.environ.get(CERTAIN_CORES)
    if certain and wanted > 1:
        raise ServerError(
            f"{CERTAIN_CORES} is {certain}, which all of {wanted} workers would take for themselves; unset it: each worker "
            "takes one free core"
        )
    return {} if certain else {CORES: "1"}
