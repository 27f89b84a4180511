"""A checkpoint: a folder in Hugging Face's layout, and its origin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, Optional

from traceserve_runtime.manifest import Base, Source, sha256

from traceserve.building.checkpoints import weight_files
from traceserve.building.checkpoints.json_files import read_object
from traceserve.building.config.setup_config import SetupConfig

VOCABULARIES = ("tokenizer.json", "vocab*.*", "*.model", "*.spm", "*.tiktoken", "*.bpe")  # a tokenizer has one of them
TOKENIZER_FILES = (
    (*VOCABULARIES, "*vocab*.*", "merges.txt", "bpe.codes", "tokenizer_config.json", "special_tokens_map.json")
    + ("added_tokens.json", "special_tokens.txt", "chat_template.json", "*.jinja", "emoji*.json", "normalizer.json")
)  # fmt: skip
# The files of a checkpoint besides its weights; a hub may hold others for other libraries.
SMALL_FILES = ["*.json", "*.txt", "*/config.json", "additional_chat_templates/*.jinja", *TOKENIZER_FILES]
CODE = ["*.py"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face's layout, and its origin."""

    folder: Path
    kind: str
    revision: Optional[str] = None
    note: Optional[str] = None  # for the user
    gguf_file: Optional[str] = None  # in the folder, if this file is the whole checkpoint
    task: str = ""  # as configured or detected
    task_found: str = ""  # the evidence; empty if configured

    root: Optional[Path] = None  # of modules.json, if the model is in a subfolder, such as 0_Transformer
    adapter: Optional[Adapter] = None  # if the folder joins an adapter and its base, without weights

    @property
    def pickled(self) -> bool:
        """Whether its weights are only available as a pickle."""
        return weight_files.are_pickles(self.folder)

    def read_object(self, name: str) -> Optional[Dict[str, object]]:
        """Return the object in a JSON file of the checkpoint, or None if missing; raises SourceError."""
        return self.read_path(self.folder / name)

    def read_root_object(self, name: str) -> Optional[Dict[str, object]]:
        """Return the object in a JSON file beside modules.json, or None if missing; raises SourceError."""
        return self.read_path((self.root or self.folder) / name)

    def read_path(self, path: Path) -> Optional[Dict[str, object]]:
        """Return the object in a JSON file, or None if missing; raises SourceError."""
        return read_object(path) if not self.gguf_file else None

    def source(self, config: SetupConfig) -> Source:
        """Return the manifest's record: name, revision, and the SHA-256 of each file that a model may be read from."""
        if self.adapter is not None:
            base = self.adapter.base.source(config)
            told = Base(self.adapter.base_name, base.kind, base.revision, base.files)
            return replace(self.adapter.stored.source(config), base=told)
        root = self.root or self.folder
        patterns = SMALL_FILES + (CODE if config.trust_remote_code else [])
        patterns = [self.gguf_file] if self.gguf_file else patterns
        places = {root, self.folder}
        found = {path for pattern in patterns for place in places for path in place.glob(pattern)}
        if (root / "modules.json").is_file():  # sentence-transformers' modules have weights of their own
            places.update(path for path in root.iterdir() if path.is_dir())
        found.update(file for place in places if not self.gguf_file for file in weight_files.files_of(place))
        return Source(
            name=config.model_name,
            kind=self.kind,
            library=config.library,
            revision=self.revision,
            trust_remote_code=config.trust_remote_code,
            files={path.relative_to(root).as_posix(): sha256(path) for path in sorted(found) if path.is_file()},
        )


@dataclass(frozen=True)
class Adapter:
    """An adapter's own files, and the checkpoint that it was trained on."""

    stored: Checkpoint
    base: Checkpoint
    base_name: str
