"""The interface between builder and worker: `traceserve.json`, written by one and read by the other.

The document holds everything that the worker knows of the model; the worker reads only it and the files that it names.
`Manifest.read` checks the schema, every key and type, the document's own digest, and the SHA-256 of every file, and
reports what is wrong. The digest detects edits and damage, for example of a label; it is not a signature, since an
attacker can compute another one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, Optional, Tuple, Type, TypeVar, Union, get_type_hints

from traceserve_runtime import __version__
from traceserve_runtime.errors import InvalidManifest

MANIFEST_FILE = "traceserve.json"
SCHEMA = 5
DEFAULT_VERSION = "1.0"  # of an archive whose configuration names none
VERSION = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # safe in a URL, a folder's name, a command and an image's tag
OLDEST = 3  # keys that later ones added have defaults
_SEALED = 4  # the first with a digest
HANDLER_FILE = "transformer_handler.py"
SERVING_FILE = "model-config.yaml"  # TorchServe's and the worker's configuration
OWN_CODE = "traceserve_"  # the prefix of our packages, which a hand-packed archive's manifest lacks
_DIGEST = "digest"
# Suffixes that Python would import from the archive's folder, which is first on the worker's path.
_IMPORTABLE = {".py", ".pyc", ".so", ".pyd"}

T = TypeVar("T")


@dataclass(frozen=True)
class Shapes:
    """The (batch, length) shapes that the model accepts; None means any (lengths: up to max_length).

    `graph_per_shape`: the model file has one graph per listed shape, see `graph_name`. If padding changes the model's
    answers, rows are not `padded`: only rows of one length run together. Rows below `shortest`, the fewest tokens that
    a model can read, are always padded to it.
    """

    lengths: Optional[Tuple[int, ...]] = None
    batches: Optional[Tuple[int, ...]] = None
    graph_per_shape: bool = False
    padded: bool = True
    shortest: int = 1

    def stepped(self, step: int, most: int) -> Shapes:
        """Return these shapes with lengths in multiples of `step` up to `most`, if any length was allowed."""
        if self.lengths is not None:
            return self
        return replace(self, lengths=(*range(step, most, step), most))

    def length(self, wanted: int) -> int:
        """Return the smallest allowed length that holds `wanted` tokens."""
        wanted = max(wanted, self.shortest)
        return wanted if self.lengths is None else min(n for n in self.lengths if n >= wanted)

    def batch(self, wanted: int) -> int:
        """Return the smallest allowed batch that holds `wanted` rows."""
        return wanted if self.batches is None else min(n for n in self.batches if n >= wanted)

    def holds(self, rows: int) -> bool:
        """Return whether this many rows may run together."""
        return self.batches is None or rows <= max(self.batches)

    def graph_name(self, batch: int, length: int) -> str:
        """Return the name of this shape's graph, if each shape has one."""
        return f"batch_{'any' if self.batches is None else batch}_length_{'any' if self.lengths is None else length}"


@dataclass(frozen=True)
class TokenizerFacts:
    """Tokenizer facts that `tokenizer.json` lacks, or that the checkpoint overrides."""

    file: str
    pad_id: int
    pad_type_id: int
    padding_side: str  # "left" or "right"
    truncation_side: str  # "left" or "right"
    clean_up: bool = False  # whether decoding removes spaces before punctuation
    pieces: Optional[str] = None  # the file of a preceding sentencepiece model; see `pieces`
    embeddings: Optional[int] = None  # the number of (first) tokens that the model knows, if not all
    types: Optional[int] = None  # the number of token types that the model knows, if a pair of texts has more
    splits_special: bool = False  # whether a special token in a text is read as text
    infilling: Optional[str] = None  # marks a place to fill, which the original reads otherwise: refused


@dataclass(frozen=True)
class Base:
    """The checkpoint that an adapter was trained on and is merged into; `files` as in Source."""

    name: str
    kind: str
    revision: Optional[str]
    files: Dict[str, str]


@dataclass(frozen=True)
class Source:
    """The checkpoint's origin; `files` has the SHA-256 of each of its files."""

    name: str
    kind: str
    library: str
    revision: Optional[str]
    trust_remote_code: bool
    files: Dict[str, str]
    base: Optional[Base] = None  # an adapter's


@dataclass(frozen=True)
class Manifest:
    """Everything that the worker knows of a model."""

    name: str
    task: str
    save_mode: str
    hardware: str
    model_file: str
    inputs: Tuple[str, ...]  # the model's, in positional order
    outputs: Tuple[str, ...]  # in order
    step_inputs: Tuple[str, ...]  # of the loop's graph, in positional order; empty for a model without a loop
    dtype: str
    max_length: int  # the longest row, including special tokens
    shapes: Shapes
    long_inputs: str
    max_rows: int  # the most rows (windows of all texts) per HTTP request
    labels: Tuple[str, ...]
    tokenizer: TokenizerFacts
    parameters: Dict[str, Any]  # this model's defaults for its task's parameters
    facts: Dict[str, Any]  # other facts that the task needs
    source: Source
    versions: Dict[str, str]
    files: Dict[str, str] = field(default_factory=dict)  # SHA-256 of all other files in the archive
    receipt: Dict[str, Any] = field(default_factory=dict)  # what the gate measured
    runtime: Dict[str, Any] = field(default_factory=dict)  # facts for the reader of this save mode
    version: str = DEFAULT_VERSION  # the archive's: in its URL, and in TorchServe's registrations

    @property
    def on_gpu(self) -> bool:
        """Whether it was built for GPUs."""
        return self.hardware == "gpu"

    @property
    def contents(self) -> str:
        """The SHA-256 of its files' names and hashes, by which a server says what it runs.

        Without the serving configuration: `tune` and the options of `serve` change it, and no answer.
        """
        files = {name: digest for name, digest in self.files.items() if name != SERVING_FILE}
        return hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()

    @classmethod
    def read(cls, folder: Path, verify: bool = True) -> Manifest:
        """Read and check `folder/traceserve.json` and, by default, every file that it names.

        Raises InvalidManifest, which says what is wrong.
        """
        manifest = cls.from_json(_load(folder / MANIFEST_FILE))
        if verify:
            manifest.verify(folder)
        return manifest

    def verify(self, folder: Path) -> None:
        """Check every file in the manifest, and that no other one is importable; raises InvalidManifest."""
        self._check_strangers(folder)
        self.verify_files(folder, self.files)

    def verify_files(self, folder: Path, names: Iterable[str]) -> None:
        """Check these files; raises InvalidManifest."""
        for name in names:
            expected = self.files[name]
            path = folder / name
            if not path.is_file():
                raise InvalidManifest(f"{MANIFEST_FILE} names the file {name}, which is missing from the archive")
            if sha256(path) != expected:
                raise InvalidManifest(
                    f"the file {name} is not the one that was verified (its SHA-256 differs from {MANIFEST_FILE}); "
                    "build the archive again"
                )

    def _check_strangers(self, folder: Path) -> None:
        """Refuse code at the archive's root that the manifest does not name: it would shadow a library."""
        for path in folder.iterdir():
            inside = {f"__init__{suffix}" for suffix in _IMPORTABLE}
            package = path.is_dir() and any((path / name).exists() for name in inside)
            named = path.name in self.files or any(name.startswith(f"{path.name}/") for name in self.files)
            named = named or path.name == HANDLER_FILE or path.name.startswith(OWN_CODE)
            if not named and (package or path.suffix in _IMPORTABLE):
                raise InvalidManifest(
                    f"{path.name} is not named in {MANIFEST_FILE}, and would shadow a library of that "
                    "name; remove it, or build the archive again"
                )

    @classmethod
    def from_json(cls, document: object) -> Manifest:
        """Return the manifest in `document`, parsed JSON; raises InvalidManifest."""
        if not isinstance(document, dict):
            raise InvalidManifest(f"{MANIFEST_FILE} should hold an object, not {_kind(document)}")
        content = dict(document)
        schema = content.pop("schema", None)
        if type(schema) is not int or not OLDEST <= schema <= SCHEMA:
            versions = content.get("versions")
            maker = versions.get("traceserve", "unknown") if isinstance(versions, dict) else "unknown"
            raise InvalidManifest(
                f"{MANIFEST_FILE} has schema {schema!r} (made by traceserve {maker}), but this runtime, traceserve "
                f"{__version__}, reads schema {OLDEST} to schema {SCHEMA}; build and pack with the same version"
            )
        digest = content.pop(_DIGEST, None) if schema >= _SEALED else None
        manifest = _read_object(cls, content, "", complete=schema == SCHEMA)
        manifest._check()
        if schema >= _SEALED and digest != _digest(document):
            raise InvalidManifest(
                f"{MANIFEST_FILE} is not the one that was verified: it was changed after the gate compared the model (its "
                "digest differs); build the archive again"
            )
        return manifest

    def _check(self) -> None:
        """Raise InvalidManifest for values of the right type that are invalid."""
        sides = (self.tokenizer.padding_side, self.tokenizer.truncation_side)
        lengths = self.shapes.lengths
        for wrong, what in (
            (not set(sides) <= {"left", "right"}, "padding_side and truncation_side should be left or right"),
            (self.max_length < 1 or self.max_rows < 1, "max_length and max_rows should be 1 or more"),
            (not self.inputs or not self.outputs, "inputs and outputs should not be empty"),
            (lengths is not None and lengths[-1:] != (self.max_length,), "shapes.lengths should end at max_length"),
            (self.shapes.batches == (), "shapes.batches should not be empty"),
            (not 1 <= self.shapes.shortest <= self.max_length, "shapes.shortest should be 1 to max_length"),
            (not self.shapes.padded and lengths is not None, "shapes.lengths should be null where rows are not padded"),
            (self.model_file not in self.files, f"files lacks the model, {self.model_file}"),
            (self.tokenizer.file not in self.files, f"files lacks the tokenizer, {self.tokenizer.file}"),
            (self.tokenizer.pieces not in (None, *self.files), f"files lacks the tokenizer's {self.tokenizer.pieces}"),
            (not re.fullmatch(VERSION, self.version), "version should be 1 to 64 letters, digits, _ . and -, as 1.0"),
            (not all(map(is_inside, self.files)), "files should name files of the archive, such as folder/name"),
        ):
            if wrong:
                raise InvalidManifest(f"{MANIFEST_FILE}: {what}")

    def write(self, folder: Path) -> None:
        """Write `folder/traceserve.json`; equal manifests give equal bytes."""
        write_document({"schema": SCHEMA, **dataclasses.asdict(self)}, folder)


def write_document(document: Mapping[str, object], folder: Path) -> None:
    """Write a whole document, with its digest, into `folder/traceserve.json`; NaN and infinities, which JSON lacks, become
    null."""
    document = json.loads(json.dumps(document), parse_constant=lambda constant: None)
    text = json.dumps(sealed(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def sealed(document: Mapping[str, object]) -> Dict[str, object]:
    """Return the document with a digest of the rest; unchanged if its schema has none."""
    content: Dict[str, Any] = json.loads(json.dumps(document))  # as it will be read
    return {**content, _DIGEST: _digest(content)} if content["schema"] >= _SEALED else content


def _digest(document: Mapping[str, object]) -> str:
    """Return the SHA-256 of the document's content, independent of its layout, without the digest itself."""
    rest = {key: value for key, value in document.items() if key != _DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def is_inside(name: str) -> bool:
    """Return whether a path stays below its starting folder, on every system."""
    parts = name.split("/")
    return not set(parts) & {"", ".", ".."} and not set(name) & set("\\:\0") and name != MANIFEST_FILE


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _load(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidManifest(f"{path.name} is missing: this folder was not made by `traceserve export`") from None
    except OSError as error:
        raise InvalidManifest(f"{path.name} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidManifest(f"{path.name} is not valid JSON: {error}") from error


def _read_object(kind: Type[T], content: Mapping[str, object], where: str, complete: bool = True) -> T:
    """Make an instance of the dataclass `kind`, checking each key against the field's type; a key may be missing only
    if its field has a default and the document need not be `complete`."""
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # T is always a dataclass here
    for key in content:
        if key not in fields:
            raise InvalidManifest(
                f"{MANIFEST_FILE} has the key {where}{key}, which this runtime, traceserve {__version__}, does not know"
            )
    for name, own in fields.items():
        default = own.default is not dataclasses.MISSING or own.default_factory is not dataclasses.MISSING
        if name not in content and (complete or not default):
            raise InvalidManifest(f"{MANIFEST_FILE} lacks the key {where}{name}")
    given = [name for name in fields if name in content]
    return kind(**{name: _read_value(hints[name], content[name], where + name, complete) for name in given})


def _read_value(kind: Any, value: object, where: str, complete: bool) -> Any:
    origin: Any = getattr(kind, "__origin__", None)
    args: Tuple[Any, ...] = getattr(kind, "__args__", ())
    if kind is Any:
        return value
    if origin is Union:  # Optional[X]
        return None if value is None else _read_value(args[0], value, where, complete)
    if origin is tuple and isinstance(value, list):
        return tuple(_read_value(args[0], item, f"{where}[{i}]", complete) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _read_value(args[1], item, f"{where}.{key}", complete) for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_object(kind, value, f"{where}.", complete)  # type: ignore[arg-type]  # kind is a class, not an instance
    if origin is None and type(value) is kind:
        return value
    wanted = {tuple: "a list", dict: "an object"}.get(origin) or getattr(kind, "__name__", str(kind))
    raise InvalidManifest(f"{MANIFEST_FILE}: {where} should be {wanted}, not {_kind(value)}")


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
