"""The contract of a task: requests, rows and answers, the facts of a checkpoint, and the conversions between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, ClassVar, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

import numpy as np

from traceserve_runtime import failures
from traceserve_runtime.batching import batches, plan
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.batching.costs import CostModel, Pace
from traceserve_runtime.errors import InputTooLong, InvalidRequest, TraceserveError
from traceserve_runtime.explaining.targets import ExplanationTarget
from traceserve_runtime.generation.loop import Member, WritingLoop
from traceserve_runtime.json_types import Json, JsonObject
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Runner
from traceserve_runtime.tasks.parameters import Field, Output, Parameter
from traceserve_runtime.texts import limits, probing
from traceserve_runtime.texts.rows import Encoded, Row, Segments
from traceserve_runtime.texts.tokenization import LONG_INPUTS, TextTokenizer


@dataclass(frozen=True)
class Request:
    """One request: checked fields and parameters, by the task's names.

    Requests of one `group`, a client's own batch, share the limit on rows; None means no group. `where` is the
    request's path in the client's body, such as "inputs[2]", and `envelope` that of the object whose parameters it shares,
    where it has none of its own. `explain`: it asks for an explanation of its answer.
    `continues`: it asks for a text as it continues the prompt's, see `Answer.continuation`; `clean_up`: cleaned up there
    where the tokenizer does that.
    """

    inputs: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    group: Optional[int] = None
    where: str = field(default="", compare=False)
    explain: bool = False
    continues: bool = False
    clean_up: bool = True
    envelope: Optional[str] = field(default=None, compare=False)


# Of a generated text, in text-generation-inference's format: see `tasks.generating`.
Details = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """The pipeline's answer to a request, ready for JSON; `unseen` maps a field to its truncated characters.

    `continuation`: the same with a text as it continues the prompt's, as OpenAI's and text-generation-inference's are: the
    pipeline leaves out the space before a first word. None where the request does not ask for it or it is the same.
    """

    value: Json
    unseen: Dict[str, Tuple[int, int]] = field(default_factory=dict)
    tokens: int = 0  # read by the model
    details: Optional[Details] = None
    continuation: Optional[Answer] = None

    @property
    def continued(self) -> Answer:
        """The answer with a text as it continues the prompt's."""
        return self.continuation or self


class WrittenToken(NamedTuple):
    """A generated token and its log-probability by the model."""

    id: int
    logarithm: float
    special: bool = False


class Job(NamedTuple):
    """A row to run, its request, and the callback for that request's growing text.

    `emit` is called with the whole text so far, any number of times; and, if the request asks for details, with its
    tokens, a sequence of WrittenToken.
    """

    row: Row
    request: Request
    emit: Optional[Callable[..., None]] = None


@dataclass(frozen=True)
class ModelFacts:
    """What a task may know of a model when its archive is built."""

    config: Mapping[str, Any]  # the model's configuration
    generation: Mapping[str, object]  # its generation configuration; empty for a model that does not generate
    tokens: Mapping[str, Tuple[str, int]]  # the special tokens that exist, as {"mask": ("[MASK]", 103)}
    labels: Tuple[str, ...]  # by class index; the configured names, if any
    chat_template: Optional[str]
    read_json: Callable[[str], Optional[Dict[str, object]]]  # reads a file of the checkpoint; None if missing
    padding_side: str = "right"  # the tokenizer's
    languages: Mapping[str, int] = field(default_factory=dict)  # the tokenizer's: code -> token id
    source_id: Optional[int] = None  # the language token that every row contains
    embedding: Mapping[str, object] = field(default_factory=dict)  # facts of a sentence-transformers checkpoint
    labels_named: bool = False  # whether the labels' names are the user's, by index_to_name


T = TypeVar("T")
TextOrPair = Union[str, Tuple[str, str]]
Parts = Union[List[Segments], TraceserveError]  # a request's texts, or why there are none


def characters(parts: Parts) -> int:
    """Count the characters to tokenize for a request."""
    if isinstance(parts, TraceserveError):
        return 0
    return sum(len(part.text) + (len(part.pair) if part.pair else 0) for part in parts)


def without_refused(
    refused: Mapping[Optional[int], InputTooLong], requests: Sequence[Request], parts: List[Parts]
) -> List[Parts]:
    """Replace the parts of refused groups by their errors."""
    if not refused:
        return parts
    return [
        part if isinstance(part, TraceserveError) else refused.get(request.group, part)
        for request, part in zip(requests, parts)
    ]


LONG_INPUTS_PARAMETER = Parameter(
    "long_inputs",
    str,
    "how to handle a text longer than max_length: merge windows, truncate, or reject",
    LONG_INPUTS,
)
WITHOUT_WINDOWS = replace(LONG_INPUTS_PARAMETER, choices=LONG_INPUTS[1:])


class Task:
    """The base of every task; each one implements `decode`."""

    name: ClassVar[str]
    auto_model: ClassVar[str]  # the transformers class that loads a checkpoint for this task
    pipeline: ClassVar[str]  # the transformers pipeline whose answers these are
    fields: ClassVar[Tuple[Field, ...]]
    outputs: ClassVar[Tuple[Output, ...]]
    parameters: ClassVar[Tuple[Parameter, ...]]
    labelled: ClassVar[bool] = False  # whether answers contain the model's labels
    sample: ClassVar[Dict[str, Any]]  # a request's fields
    sample_parameters: ClassVar[JsonObject] = {}  # a request's parameters
    merges_windows: ClassVar[bool] = True  # whether a long text can be answered from several windows
    windows_overlap: ClassVar[bool] = False  # whether adjacent windows share a quarter of max_length
    longest_default: ClassVar[int] = 512  # max_length if neither configuration nor model sets a lower one
    loop: ClassVar[str] = ""  # how the model runs: "" once, "decoder" or "encoder_decoder" token by token
    padding_side: ClassVar[Optional[str]] = None  # if the task decides it; else the gate does
    truncation_side: ClassVar[Optional[str]] = None  # likewise
    reads_vectors: ClassVar[bool] = False  # whether an answer is made of token vectors, like sentence-transformers'
    scores_pairs: ClassVar[bool] = False  # whether an answer is made of pairs' scores, like its cross-encoders'
    cleans_up: ClassVar[bool] = False  # whether texts that are decoded are cleaned up where the tokenizer does that
    auto_int8: ClassVar[bool] = True  # whether `auto` tries int8: the built-in samples show what that changes
    task_specific_params: ClassVar[bool] = False  # whether the pipeline reads its own section of config.json's
    # Parameters that choose what of an answer is explained; None if the task's answers cannot be explained.
    explains: ClassVar[Optional[Tuple[Parameter, ...]]] = None
    gate_parameters: ClassVar[Dict[str, object]] = {}  # of the gate's requests, so that `same` sees everything

    def __init__(self, manifest: Manifest, tokenizer: TextTokenizer) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer

    @classmethod
    def defaults(cls, model: ModelFacts) -> Dict[str, object]:
        """Return this model's defaults for parameters; raises Unsupported if the checkpoint cannot answer the task."""
        return {}

    @classmethod
    def archive_defaults(cls, model: ModelFacts, chosen: Mapping[str, object]) -> Dict[str, object]:
        """Return this archive's defaults: those `chosen` in its configuration, and the model's. Raises Unsupported."""
        return {**cls.defaults(model), **chosen}

    @classmethod
    def facts(cls, model: ModelFacts) -> Dict[str, object]:
        """Return the other facts that the task needs of this model; raises Unsupported."""
        return {}

    def read_files(self, folder: Path) -> None:
        """Read the task's other files in the archive's folder, if any."""

    @classmethod
    def sample_body(cls, facts: Mapping[str, object]) -> JsonObject:
        """Return the sample as the JSON body that a client sends to a model with these facts."""
        return {**cls.sample, **({"parameters": cls.sample_parameters} if cls.sample_parameters else {})}

    @classmethod
    def canary_body(cls, manifest: Manifest) -> JsonObject:
        """Return the body of a request that each archive answers, whatever its max_length and its way with long texts: its
        build has asked it."""
        body = cls.sample_body(manifest.facts)
        return {**body, "parameters": {**cls.sample_parameters, **cls.short_parameters(manifest)}}

    @classmethod
    def short_parameters(cls, manifest: Manifest) -> JsonObject:
        """Return the parameters by which the sample is answered where max_length is short."""
        return {"long_inputs": "truncate"}

    @classmethod
    def all_parameters(cls) -> Tuple[Parameter, ...]:
        """Return the task's own parameters and those of every task."""
        return (*cls.parameters, LONG_INPUTS_PARAMETER if cls.merges_windows else WITHOUT_WINDOWS)

    @classmethod
    def has_field(cls, name: str) -> bool:
        """Return whether requests may have this field."""
        return any(field.name == name for field in cls.fields)

    @classmethod
    def has_parameter(cls, name: str) -> bool:
        """Return whether requests may have this parameter."""
        return any(parameter.name == name for parameter in cls.all_parameters())

    @classmethod
    def texts_of(cls, request: Request) -> List[TextOrPair]:
        """Return the texts, or pairs of texts, that a model typically reads for a request; none of a chat. A builder shows
        them to it, before there is an artifact and so a task: see `segments` for what a worker reads."""
        values = [request.inputs.get(field.name) for field in cls.fields]
        texts = [value for value in values if isinstance(value, str)]
        texts += [text for value in values if isinstance(value, list) for text in value if isinstance(text, str)]
        return [(texts[0], other) for other in texts[1:]] or [*texts]

    @classmethod
    def check(cls, inputs: Mapping[str, object]) -> None:
        """Raise InvalidRequest for fields that are valid alone but not together."""

    def parameter(self, request: Request, name: str) -> Any:
        """Return the request's parameter, or the model's default, or the task's."""
        for values in (request.parameters, self.manifest.parameters):
            if name in values:
                return values[name]
        return next(parameter.default for parameter in self.parameters if parameter.name == name)

    def long_inputs(self, request: Request) -> str:
        """Return how this request's long texts are handled."""
        how: str = request.parameters.get("long_inputs", self.manifest.long_inputs)
        return how

    def segments(self, request: Request) -> List[Segments]:
        """Return the texts, or pairs of texts, that the model reads for this request: one by default.

        Raises TraceserveError if the request cannot be answered.
        """
        names = [field.name for field in self.fields]
        first, second = names[0], names[-1]  # the same for a task with one field
        pair = request.inputs.get(second) if second != first else None
        stride = self.manifest.max_length // 4 if self.windows_overlap else 0
        return [Segments(request.inputs[first], pair, (first, second), stride=stride)]

    def encode(self, requests: Sequence[Request]) -> List[Union[Encoded, TraceserveError]]:
        """Return each request's rows, or why there are none."""
        return self.tokenize(requests, self.parts(requests))

    def parts(self, requests: Sequence[Request]) -> List[Parts]:
        """Return each request's segments, or why there are none: those of a group with too many characters are not made."""
        sums = limits.GroupSums()
        parts: List[Parts] = []
        for request in requests:
            part: Parts = []
            if sums.size(request.group) <= self.tokenizer.limits.characters:
                part = failures.contained("it read this request", partial(self.segments, request))
            if not isinstance(part, TraceserveError):
                sums.add(request.group, len(part), characters(part))
            parts.append(part)
        parts = without_refused(sums.refused(self.tokenizer.limits.of_texts), requests, parts)
        return without_refused(self._probed(requests, parts), requests, parts)

    def _probed(self, requests: Sequence[Request], parts: Sequence[Parts]) -> Dict[Optional[int], InputTooLong]:
        """Return the groups whose texts' beginnings already show more tokens than one HTTP request may have."""
        own = self.tokenizer
        if not probing.worth_it(sum(map(characters, parts)), own.limits.tokens):
            return {}
        groups: Dict[int, List[Tuple[Segments, str]]] = {}
        for request, part in zip(requests, parts):
            if request.group is not None and not isinstance(part, TraceserveError):
                how = self.long_inputs(request)
                groups.setdefault(request.group, []).extend((segments, how) for segments in part)
        return {
            group: own.limits.of_more_tokens(len(each)) for group, each in groups.items() if self._surely_more(each)
        }

    def _surely_more(self, segments: Sequence[Tuple[Segments, str]]) -> bool:
        """`TextTokenizer.surely_more`; an error proves nothing, and is its owner's once the text is tokenized."""
        probed = partial(self.tokenizer.surely_more, segments)
        return failures.contained("it read this request", probed) is True

    def tokenize(self, requests: Sequence[Request], parts: Sequence[Parts]) -> List[Union[Encoded, TraceserveError]]:
        """Return the rows of each request's parts, or why there are none; texts are tokenized in few calls."""
        flat: List[Segments] = []
        how: List[str] = []
        for request, part in zip(requests, parts):
            if not isinstance(part, TraceserveError):
                flat += part
                how += [self.long_inputs(request)] * len(part)
        encoded = iter(self.tokenizer.encode(flat, how))
        return [part if isinstance(part, TraceserveError) else _joined([next(encoded) for _ in part]) for part in parts]

    def refused_answers(
        self, requests: Sequence[Request], encoded: Sequence[Union[Encoded, TraceserveError]]
    ) -> Dict[Optional[int], InputTooLong]:
        """Return the groups whose answers would be too large, and why; none by default."""
        return {}

    def decode(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> Json:
        """Make the answer, ready for JSON, from the outputs of a request's rows."""
        raise NotImplementedError

    def target(self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]) -> ExplanationTarget:
        """Return what is explained of a request's answer: what its parameters choose, or the answer's own.

        Raises InvalidRequest for a target that does not exist.
        """
        raise NotImplementedError

    def continuation(
        self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays], answer: Answer
    ) -> Optional[Answer]:
        """Return the answer with its text as it continues the prompt's; see `Answer`."""
        return None

    def same(self, answer: Json, other: Json) -> bool:
        """Return whether two answers to a request mean the same, apart from rounding."""
        raise NotImplementedError

    def answers_with_vector(self, request: Request) -> bool:
        """Return whether the answer is one vector for the whole text, as this archive makes it by default."""
        return False

    @property
    def answers_by_column(self) -> bool:
        """Whether each column of an output is an answer of its own; others give one answer together."""
        return False

    def streams(self, request: Request) -> bool:
        """Return whether this request's answer is streamed."""
        return False

    @classmethod
    def samples(cls, parameters: Mapping[str, Any], manifest: Manifest) -> bool:
        """Return whether a request with these parameters draws its text's tokens at random."""
        return False

    def repeatable(self, request: Request) -> bool:
        """Return whether the original must give the same answer."""
        return True

    def open_loop(
        self, runner: Runner, stats: Stats, pace: Optional[Pace] = None, seconds: float = math.inf
    ) -> Optional[WritingLoop]:
        """Return the loop of a task that writes token by token; it adds to `stats`. See it for the others."""
        return None

    def member(self, job: Job) -> Member:
        """Return a row of such a task for its loop."""
        raise NotImplementedError

    def written(self, member: Member) -> Arrays:
        """Return the outputs of a row that left the loop."""
        raise NotImplementedError

    def predict(self, runner: Runner, jobs: Sequence[Job], stats: Stats) -> List[Arrays]:
        """Run rows together in one forward pass, for a task without a loop."""
        per_token = [output.name for output in self.outputs if output.per_token]
        outputs = batches.run_batch(runner, [job.row for job in jobs], self.manifest, per_token, stats)
        return [self.keep(job.row, output) for job, output in zip(jobs, outputs)]

    def keep(self, row: Row, outputs: Arrays) -> Arrays:
        """Return the part of a row's outputs that `decode` reads, if it is small."""
        return outputs

    def answer(
        self, request: Request, rows: Sequence[Row], outputs: Sequence[Arrays]
    ) -> Tuple[Json, Optional[Details]]:
        """Return the answer, and the details of a generated text, for protocols that report them; raises ModelFailure for
        outputs that are not numbers."""
        check_numbers(outputs)
        return self.decode(request, rows, outputs), None

    @property
    def cost(self) -> CostModel:
        """The cost of a run."""
        return CostModel()

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens in one run, padding included."""
        return plan.MOST_BATCH_TOKENS

    def from_texts(self, texts: Sequence[str]) -> List[Request]:
        """Make the gate's requests: one per text, and some with two."""
        names = [field.name for field in self.fields]
        requests = [Request({names[0]: text}, self.gate_parameters) for text in texts]
        if len(names) > 1:
            pairs = zip(texts[3::4], texts[4::4])
            requests += [Request({names[0]: one, names[1]: two}, self.gate_parameters) for one, two in pairs]
        return requests

    def warm_up_requests(self) -> List[Request]:
        """Return a short request and one of full length: the last required field has the long texts."""
        field = [field for field in self.fields if field.required][-1]
        value = self.sample[field.name]
        text = " ".join([value if field.kind == "text" else value[0]] * self.manifest.max_length)
        long = {**self.sample, field.name: text if field.kind == "text" else [text]}
        parameters = {**self.sample_parameters, "long_inputs": "truncate"}
        return [Request(self.sample, parameters), Request(long, parameters)]


def check_numbers(outputs: Sequence[Arrays]) -> None:
    """Raise ModelFailure for outputs that are not numbers."""
    if not all(np.isfinite(array).all() for row in outputs for array in row.values()):
        raise failures.not_a_number()


def _joined(parts: Sequence[Union[Encoded, TraceserveError]]) -> Union[Encoded, TraceserveError]:
    """Join the rows of all parts of a request, numbered by part; or return the first part's error."""
    rows: List[Row] = []
    unseen: Dict[str, Tuple[int, int]] = {}
    for number, part in enumerate(parts):
        if isinstance(part, TraceserveError):
            return part
        rows += part.rows if number == 0 else [row.numbered(number) for row in part.rows]
        for name, span in part.unseen.items():
            start, end = unseen.get(name, span)
            unseen[name] = (min(start, span[0]), max(end, span[1]))
    return Encoded(rows, unseen)


def without_prefix(
    encoded: Union[Encoded, TraceserveError], field: str, length: int
) -> Union[Encoded, TraceserveError]:
    """Correct `encoded` for a field to which the task prepended `length` characters that the client did not send."""
    if not length or isinstance(encoded, TraceserveError) or field not in encoded.unseen:
        return encoded
    start, end = (max(0, position - length) for position in encoded.unseen[field])
    others = {name: span for name, span in encoded.unseen.items() if name != field}
    return Encoded(encoded.rows, {**others, field: (start, end)} if end > start else others)


def by_part(rows: Sequence[Row], values: Sequence[T]) -> List[Tuple[List[Row], List[T]]]:
    """Group a request's rows, and the values that belong to them, by part."""
    parts: List[Tuple[List[Row], List[T]]] = []
    for row, value in zip(rows, values):
        while len(parts) <= row.part:
            parts.append(([], []))
        parts[row.part][0].append(row)
        parts[row.part][1].append(value)
    return parts


def only_whole(rows: Sequence[Row], message: str) -> None:
    """Refuse several windows that cannot be merged."""
    if len(rows) > 1:
        raise InvalidRequest(message, "parameters.long_inputs")
