"""The border between builder and worker: `traceserve.json`, written by one and read by the other.

The document holds everything that the worker knows of the model; beside it the worker reads only the files that it
names. `Manifest.read` checks the schema, every key and type, and the SHA-256 of every file, and says what is wrong.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple, Type, TypeVar, Union, get_type_hints

from traceserve_runtime import __version__
from traceserve_runtime.errors import InvalidManifest

MANIFEST_FILE = "traceserve.json"
SCHEMA = 4
# Keys that came after this schema: an archive without them was made when there was only what their default says.
_LATER = ("shapes.padded",)

T = TypeVar("T")


@dataclass(frozen=True)
class Shapes:
    """The (batch, length) shapes that the model may be run with; None means any (lengths: up to max_length).

    `graph_per_shape` tells that the model file holds one graph for each listed shape, see `graph_name`. Where the model's
    answers change with padding, rows are not `padded`: only those of one length run together.
    """

    lengths: Optional[Tuple[int, ...]] = None
    batches: Optional[Tuple[int, ...]] = None
    graph_per_shape: bool = False
    padded: bool = True

    def stepped(self, step: int, most: int) -> Shapes:
        """These shapes with lengths in multiples of `step` up to `most`, where any length was allowed."""
        if self.lengths is not None:
            return self
        return replace(self, lengths=(*range(step, most, step), most))

    def length(self, wanted: int) -> int:
        """The smallest allowed length that holds `wanted` tokens."""
        return wanted if self.lengths is None else min(n for n in self.lengths if n >= wanted)

    def batch(self, wanted: int) -> int:
        """The smallest allowed batch that holds `wanted` rows."""
        return wanted if self.batches is None else min(n for n in self.batches if n >= wanted)

    def holds(self, rows: int) -> bool:
        """Whether so many rows may run together."""
        return self.batches is None or rows <= max(self.batches)

    def graph_name(self, batch: int, length: int) -> str:
        """The name of the graph that answers this shape, where there is one for each."""
        return f"batch_{'any' if self.batches is None else batch}_length_{'any' if self.lengths is None else length}"


@dataclass(frozen=True)
class TokenizerFacts:
    """What `tokenizer.json` does not say, or says otherwise than the checkpoint means it."""

    file: str
    pad_id: int
    pad_type_id: int
    padding_side: str  # "left" or "right"
    truncation_side: str  # "left" or "right"
    clean_up: bool = False  # whether decoding takes the space before punctuation away
    pieces: Optional[str] = None  # the file with sentencepiece's model, where that comes first; see `pieces`
    embeddings: Optional[int] = None  # how many of its tokens, the first ones, the model knows, where that is not all


@dataclass(frozen=True)
class Source:
    """Where the checkpoint came from; `files` holds the SHA-256 of each of its files."""

    name: str
    kind: str
    library: str
    revision: Optional[str]
    trust_remote_code: bool
    files: Dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything that the worker knows of a model."""

    name: str
    task: str
    save_mode: str
    hardware: str
    model_file: str
    inputs: Tuple[str, ...]  # of the model, in positional order
    outputs: Tuple[str, ...]  # in order
    step_inputs: Tuple[str, ...]  # of the graph that a loop runs, in positional order; empty for a model without a loop
    dtype: str
    max_length: int  # the longest row, special tokens included
    shapes: Shapes
    long_inputs: str
    max_rows: int  # the most rows (windows of all its texts) that one HTTP request may take
    labels: Tuple[str, ...]
    tokenizer: TokenizerFacts
    parameters: Dict[str, Any]  # the defaults of this model for parameters of its task
    facts: Dict[str, Any]  # what else its task knows of this model
    source: Source
    versions: Dict[str, str]
    files: Dict[str, str] = field(default_factory=dict)  # SHA-256 of every other file of the archive
    receipt: Dict[str, Any] = field(default_factory=dict)  # what the gate measured
    runtime: Dict[str, Any] = field(default_factory=dict)  # what the reader of this save mode must know

    @classmethod
    def read(cls, folder: Path, verify: bool = True) -> Manifest:
        """Read and check `folder/traceserve.json` and, unless told otherwise, every file that it names.

        Raises InvalidManifest, which says what is wrong.
        """
        manifest = cls.from_json(_load(folder / MANIFEST_FILE))
        if verify:
            manifest.verify(folder)
        return manifest

    def verify(self, folder: Path) -> None:
        """Check every file that the manifest names; raises InvalidManifest."""
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise InvalidManifest(f"{MANIFEST_FILE} names the file {name}, which is missing from the archive")
            if sha256(path) != expected:
                raise InvalidManifest(
                    f"the file {name} is not the one that was verified (its SHA-256 differs from {MANIFEST_FILE}); "
                    "build the archive again"
                )

    @classmethod
    def from_json(cls, document: Any) -> Manifest:
        """The manifest that `document`, parsed JSON, describes; raises InvalidManifest."""
        if not isinstance(document, dict):
            raise InvalidManifest(f"{MANIFEST_FILE} should hold an object, not {_kind(document)}")
        content = dict(document)
        schema = content.pop("schema", None)
        if type(schema) is not int or schema != SCHEMA:
            versions = content.get("versions")
            maker = versions.get("traceserve", "unknown") if isinstance(versions, dict) else "unknown"
            raise InvalidManifest(
                f"{MANIFEST_FILE} has schema {schema!r} (made by traceserve {maker}), but this runtime, traceserve "
                f"{__version__}, reads schema {SCHEMA}; build and pack with the same version"
            )
        manifest = _read_object(cls, content, "")
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Raise InvalidManifest for values of the right type that no builder writes."""
        sides = (self.tokenizer.padding_side, self.tokenizer.truncation_side)
        lengths = self.shapes.lengths
        for wrong, what in (
            (not set(sides) <= {"left", "right"}, "padding_side and truncation_side should be left or right"),
            (self.max_length < 1 or self.max_rows < 1, "max_length and max_rows should be 1 or more"),
            (not self.inputs or not self.outputs, "inputs and outputs should not be empty"),
            (lengths is not None and lengths[-1:] != (self.max_length,), "shapes.lengths should end at max_length"),
            (self.shapes.batches == (), "shapes.batches should not be empty"),
            (not self.shapes.padded and lengths is not None, "shapes.lengths should be null where rows are not padded"),
            (self.model_file not in self.files, f"files lacks the model, {self.model_file}"),
            (self.tokenizer.file not in self.files, f"files lacks the tokenizer, {self.tokenizer.file}"),
            (self.tokenizer.pieces not in (None, *self.files), f"files lacks the tokenizer's {self.tokenizer.pieces}"),
        ):
            if wrong:
                raise InvalidManifest(f"{MANIFEST_FILE}: {what}")

    def write(self, folder: Path) -> None:
        """Write `folder/traceserve.json`; equal manifests give equal bytes."""
        document = {"schema": SCHEMA, **dataclasses.asdict(self)}
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidManifest(f"{path.name} is missing: this folder was not made by `traceserve export`") from None
    except (ValueError, RecursionError) as error:
        raise InvalidManifest(f"{path.name} is not valid JSON: {error}") from error


def _read_object(kind: Type[T], content: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `kind`, each key checked against the field's type."""
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # T is always a dataclass here
    for key in content:
        if key not in fields:
            raise InvalidManifest(
                f"{MANIFEST_FILE} has the key {where}{key}, which this runtime, traceserve {__version__}, does not know"
            )
    for name in fields:
        if name not in content and where + name not in _LATER:
            raise InvalidManifest(f"{MANIFEST_FILE} lacks the key {where}{name}")
    return kind(**{name: _read_value(hints[name], content[name], where + name) for name in fields if name in content})


def _read_value(kind: Any, value: Any, where: str) -> Any:
    origin: Any = getattr(kind, "__origin__", None)
    args: Tuple[Any, ...] = getattr(kind, "__args__", ())
    if kind is Any:
        return value
    if origin is Union:  # Optional[X]
        return None if value is None else _read_value(args[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_read_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _read_value(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_object(kind, value, f"{where}.")  # type: ignore[arg-type]  # kind is a class, not an instance
    if origin is None and type(value) is kind:
        return value
    wanted = {tuple: "a list", dict: "an object"}.get(origin) or getattr(kind, "__name__", str(kind))
    raise InvalidManifest(f"{MANIFEST_FILE}: {where} should be {wanted}, not {_kind(value)}")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
