"""The protocols in which a golden set is asked: our own, V2 (Open Inference), and Hugging Face's.

A server's own is found by asking: the first in which it answers the first sample in the task's form.
"""

from __future__ import annotations

import json
import math
import urllib.parse
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence

from traceserve_runtime.manifest import Manifest
from traceserve_runtime.protocols.native import UNSEEN
from traceserve_runtime.tasks.contract import Task

from traceserve.building.gate.golden import GoldenSample


class Dialect(NamedTuple):
    """How a sample is written, and the answer read; `read` raises LookupError, TypeError or ValueError for other forms."""

    name: str
    write: Callable[[GoldenSample, Task], Any]
    read: Callable[[Any, GoldenSample, Task], Any]


class SpokenAt(NamedTuple):
    """A URL at which a dialect may be spoken."""

    dialect: Dialect
    url: str

    def answer(self, document: Any, sample: GoldenSample, task: Task) -> Any:
        """Return the answer in a response, without our own note on what a truncated text hid; raises as `Dialect.read`."""
        return _without_note(self.dialect.read(document, sample, task))


def _without_note(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {key: value for key, value in answer.items() if key != UNSEEN}
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        return [_without_note(item) for item in answer]
    return answer


def _write_native(sample: GoldenSample, task: Task) -> Any:
    return {**sample.inputs, "parameters": sample.parameters}


def _read_native(answer: Any, sample: GoldenSample, task: Task) -> Any:
    return answer


def _write_tensors(sample: GoldenSample, task: Task) -> Any:
    """Write one element, the JSON text of all fields and parameters: so lists and nulls can be said too."""
    if list(sample.inputs) == [task.fields[0].name] and not sample.parameters:
        text = sample.inputs[task.fields[0].name]
        return {"inputs": [{"name": task.fields[0].name, "shape": [1], "datatype": "BYTES", "data": [text]}]}
    tensors = [
        {
            "name": name,
            "shape": [1],
            "datatype": "BYTES",
            "data": [value if isinstance(value, str) else json.dumps(value)],
        }
        for name, value in sample.inputs.items()
    ]
    return {"inputs": tensors, **({"parameters": sample.parameters} if sample.parameters else {})}


def _read_tensors(answer: Any, sample: GoldenSample, task: Task) -> Any:
    output = answer["outputs"][0]
    if output["datatype"] == "BYTES":
        return json.loads(output["data"][0])
    flat, shape = [float(number) for number in output["data"]], list(output["shape"])[1:]
    if math.prod(shape) != len(flat):
        raise ValueError("the data does not fill the shape")
    return _shaped(flat, shape)


def _shaped(flat: Sequence[float], shape: Sequence[int]) -> Any:
    if len(shape) < 2:
        return list(flat)
    step = len(flat) // shape[0]
    return [_shaped(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def _write_hugging_face(sample: GoldenSample, task: Task) -> Any:
    fields = sample.inputs
    inputs: Any = next(iter(fields.values())) if len(fields) == 1 else dict(fields)
    named = {parameter.name for parameter in task.parameters}
    whole = {"return_full_text": True} if "return_full_text" in named else {}  # the pipeline's default, not this API's
    return {"inputs": inputs, "parameters": {**whole, **sample.parameters}}


def _read_hugging_face(answer: Any, sample: GoldenSample, task: Task) -> Any:
    """Return an answer in the pipeline's form: this API nests some in another list, and renames keys."""
    expected = sample.answer
    while isinstance(answer, list) and len(answer) == 1 and _depth(answer) > _depth(expected):
        answer = answer[0]
    if isinstance(expected, Mapping) and isinstance(answer, list):  # zero-shot's ranking
        ranked = sorted(answer, key=lambda item: -float(item["score"]))
        return {**expected, "labels": [i["label"] for i in ranked], "scores": [float(i["score"]) for i in ranked]}
    if isinstance(expected, Mapping) and "generated_text" in expected:
        names = ("generated_text", "translation_text", "summary_text")
        return {**expected, "generated_text": next(answer[name] for name in names if name in answer)}
    return answer


def _depth(value: Any) -> int:
    return 1 + _depth(value[0]) if isinstance(value, list) and value else int(isinstance(value, list))


NATIVE = Dialect("native", _write_native, _read_native)
DIALECTS: Dict[str, Dialect] = {
    each.name: each
    for each in (
        NATIVE,
        Dialect("v2", _write_tensors, _read_tensors),
        Dialect("huggingface", _write_hugging_face, _read_hugging_face),
    )
}


def places(url: str, manifest: Manifest) -> List[SpokenAt]:
    """Return where each dialect may be spoken at a user's URL, the likeliest first."""
    url, name = url.rstrip("/"), urllib.parse.quote(manifest.name)
    if "/v2/models/" in url:
        tensors = url if url.endswith("/infer") else f"{url}/infer"
        return [SpokenAt(DIALECTS["v2"], tensors)]
    named = [url] if "/predictions/" in url else [url, f"{url}/predictions/{name}"]
    return [
        *(SpokenAt(NATIVE, each) for each in named),
        SpokenAt(DIALECTS["v2"], f"{url}/v2/models/{name}/infer"),
        SpokenAt(DIALECTS["huggingface"], url),
    ]


def metadata_url(url: str, manifest: Manifest) -> str:
    """Return where a server of ours would describe the model, in V2's form."""
    url = url.rstrip("/")
    if "/v2/models/" in url:
        return url[: -len("/infer")] if url.endswith("/infer") else url
    head, found, rest = url.partition("/predictions/")
    served = rest.split("/")[0] if found else urllib.parse.quote(manifest.name)
    if found:  # TorchServe passes on only what follows a version
        version = rest.split("/")[1] if "/" in rest else urllib.parse.quote(manifest.version)
        return f"{head}/predictions/{served}/{version}/v2/models/{served}"
    return f"{url}/v2/models/{served}"
