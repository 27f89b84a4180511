"""What a deployment asks of a machine: from what was measured, else by a stated rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

from traceserve_runtime.texts.limits import RequestLimits

from traceserve.deploying import engines
from traceserve.deploying.described import Described

_MIB = 1 << 20
WORKER = 400  # MiB: Python, torch, a tokenizer, and a batch of ordinary texts
_COPIES = 2  # of the weights: the file, mapped and shared, and a copy as the processor reads it
# What Kubernetes calls what a worker has one of: a GPU, or a core of an Inferentia, whose devices have several.
GPU, NEURON_CORE = "nvidia.com/gpu", "aws.amazon.com/neuroncore"
KUBERNETES_RESOURCES = {"gpu": GPU, "neuron": NEURON_CORE, "neuronx": NEURON_CORE}
CORES_OF_A_DEVICE = {"neuron": 4, "neuronx": 2}
_TAINTS = {GPU: (GPU,), NEURON_CORE: ("aws.amazon.com/neuron", NEURON_CORE)}  # of the nodes that have it


@dataclass(frozen=True)
class Resources:
    """Whole cores, and MiB; `reasons` say where the figures come from."""

    cpu: int
    memory: int
    disk: int
    devices: Dict[str, int]
    reasons: Tuple[str, ...]

    def requests(self) -> Dict[str, str]:
        """As Kubernetes has them."""
        return {
            "cpu": str(self.cpu),
            "memory": f"{self.memory}Mi",
            "ephemeral-storage": f"{self.disk}Mi",
            **self._devices(),
        }

    def limits(self) -> Dict[str, str]:
        """No limit of cores: a worker takes as many threads as its quota has, and a throttled one answers late."""
        return {"memory": f"{_rounded(1.5 * self.memory)}Mi", "ephemeral-storage": f"{self.disk}Mi", **self._devices()}

    def tolerations(self) -> List[Dict[str, str]]:
        """Of the taints by which nodes keep their devices for those that ask for them."""
        return [{"key": key, "operator": "Exists"} for device in self.devices for key in _TAINTS[device]]

    def _devices(self) -> Dict[str, str]:
        return {name: str(count) for name, count in self.devices.items()}


def needed(archives: Sequence[Described], engine: str) -> Resources:
    """What these archives need together, in one pod."""
    own = engines.CONTAINER_ENGINES[engine]
    memory, cores = float(own.memory), 0
    reasons = [f"memory: {own.memory} MiB for {engine} itself"]
    workers = {each.name: 1 if own.single else each.workers for each in archives}
    for each in archives:
        count, model = workers[each.name], each.unpacked / _MIB
        copies = 1 + (_COPIES - 1) * (count if each.serving.pack_weights or count == 1 else 1)
        memory += count * WORKER + copies * model
        threads = each.serving.threads or 1
        cores += count * threads
        reasons.append(
            f"memory of {each.name}: {count} x {WORKER} MiB for the worker, and {copies} x {model:.0f} MiB, the size of "
            "its files; no archive holds a measurement of memory, so look at the first pod under load and correct this"
        )
        tuned = each.serving.workers is not None or each.serving.threads is not None
        by = (
            "as `traceserve tune` found best"
            if tuned
            else "not tuned: `traceserve tune` writes what fits into the archive"
        )
        reasons.append(f"cores of {each.name}: {count} worker(s) of {threads} thread(s), {by}")
    devices: Dict[str, int] = {}
    for each in archives:
        device = KUBERNETES_RESOURCES.get(each.manifest.hardware)
        if device is not None:
            devices[device] = devices.get(device, 0) + workers[each.name]
    disk = sum(each.size + each.unpacked for each in archives) / _MIB + 256
    reasons.append("ephemeral storage: the archives, packed and unpacked, and 256 MiB for logs and the JVM's classes")
    # One core more for what hands the requests over.
    return Resources(cores + 1, _rounded(memory), _rounded(disk), devices, tuple(reasons))


def largest_body(archives: Sequence[Described]) -> int:
    """How many MiB a request to one of these archives has at most."""
    limits = (RequestLimits.of(each.manifest.max_length, each.manifest.max_rows) for each in archives)
    return math.ceil(max(each.largest_body for each in limits) / _MIB)


def _rounded(megabytes: float) -> int:
    return 64 * math.ceil(megabytes / 64)
