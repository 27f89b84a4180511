"""What a task is: the fields and parameters of its requests, the outputs of its model, and the way between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from traceserve_runtime import batching
from traceserve_runtime.batching import Arrays, Runner, Stats
from traceserve_runtime.errors import InvalidRequest, ModelFailure, TraceserveError
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.tokenization import LONG_INPUTS, Encoded, Row, Segments, TextTokenizer


class Field(NamedTuple):
    """A text of a request."""

    name: str
    required: bool
    description: str


class Output(NamedTuple):
    """An output of the model: float32 of shape (batch, ...), or (batch, length, ...) where `per_token`."""

    name: str
    per_token: bool


@dataclass(frozen=True)
class Parameter:
    """A parameter of a request: one of `choices`, or of `type`, where int means 1 or more."""

    name: str
    type: type
    description: str
    choices: Tuple[str, ...] = ()
    nullable: bool = False

    @property
    def legal(self) -> str:
        """The legal values, in words."""
        words = {int: "a whole number of 1 or more", bool: "true or false", str: "a string"}[self.type]
        if self.choices:
            words = "one of " + ", ".join(f'"{choice}"' for choice in self.choices)
        return words + (" or null" if self.nullable else "")

    def accepts(self, value: Any) -> bool:
        """Whether `value`, parsed JSON, is legal."""
        if value is None:
            return self.nullable
        if type(value) is not self.type:  # not isinstance: true is no number
            return False
        return value in self.choices if self.choices else type(value) is not int or value >= 1


@dataclass(frozen=True)
class Request:
    """One thing asked: checked fields and parameters, as the task names them.

    Requests of one `group`, a client's own batch, share the limit on rows; None has no group. `where` is the request's
    path in the client's body, as "inputs[2]".
    """

    inputs: Mapping[str, str]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    group: Optional[int] = None
    where: str = field(default="", compare=False)


LONG_INPUTS_PARAMETER = Parameter(
    "long_inputs",
    str,
    "what becomes of a text longer than max_length: answered in windows that are merged, cut, or refused",
    LONG_INPUTS,
)


class Task:
    """The base of every task; `decode` is what each one writes itself."""

    name: ClassVar[str]
    auto_model: ClassVar[str]  # the class of transformers that loads a checkpoint for this task
    pipeline: ClassVar[str]  # the name of the transformers pipeline whose answers these are
    fields: ClassVar[Tuple[Field, ...]]
    outputs: ClassVar[Tuple[Output, ...]]
    parameters: ClassVar[Tuple[Parameter, ...]]
    labelled: ClassVar[bool] = False  # whether answers name labels of the model
    sample: ClassVar[Dict[str, Any]]  # a request, as the JSON body that a client sends

    gate_parameters: ClassVar[Dict[str, Any]] = {}  # what the gate asks with, so that `same` sees all that matters

    def __init__(self, manifest: Manifest, tokenizer: TextTokenizer) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer

    @classmethod
    def all_parameters(cls) -> Tuple[Parameter, ...]:
        """The task's own parameters and those of every task."""
        return (*cls.parameters, LONG_INPUTS_PARAMETER)

    def parameter(self, request: Request, name: str, default: Any = None) -> Any:
        """The request's parameter, or the model's default for it, or `default`."""
        return request.parameters.get(name, self.manifest.parameters.get(name, default))

    def long_inputs(self, request: Request) -> str:
        """How this request is shortened."""
        how: str = request.parameters.get("long_inputs", self.manifest.long_inputs)
        return how

    def encode(self, requests: Sequence[Request]) -> List[Union[Encoded, TraceserveError]]:
        """The rows of each request, or why there are none."""
        names = [field.name for field in self.fields]
        first, second = names[0], names[-1]  # the same for a task of one field
        segments = [
            Segments(r.inputs[first], r.inputs.get(second) if second != first else None, (first, second))
            for r in requests
        ]
        return self.tokenizer.encode(segments, [self.long_inputs(request) for request in requests])

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Any:
        """The answer, ready for JSON, from the outputs of a request's rows."""
        raise NotImplementedError

    def same(self, answer: Any, other: Any) -> bool:
        """Whether two answers to one request say the same, whatever their last digits."""
        raise NotImplementedError

    def predict(self, runner: Runner, rows: Sequence[Row], stats: Stats) -> List[Arrays]:
        """Run rows together: one pass of the model. A task that loops overrides this."""
        per_token = [output.name for output in self.outputs if output.per_token]
        return batching.run(runner, rows, self.manifest, per_token, stats)

    def answer(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Any:
        """`decode`, for outputs that are numbers; raises ModelFailure for those that are not."""
        if not all(np.isfinite(array).all() for row in outputs for array in row.values()):
            raise ModelFailure("the model gave a value that is not a number (NaN or infinite) for this input")
        return self.decode(request, rows, outputs)


def average(values: Sequence[np.ndarray], rows: Sequence[Row]) -> np.ndarray:
    """The mean over windows, weighted by the text's tokens in each."""
    if len(values) == 1:
        return values[0]
    weights = np.array([row.tokens for row in rows], dtype=np.float32)
    return np.average(np.stack(values), axis=0, weights=weights)


def only_whole(rows: Sequence[Row], message: str) -> None:
    """Refuse several windows where they cannot be merged."""
    if len(rows) > 1:
        raise InvalidRequest(message, "parameters.long_inputs")
