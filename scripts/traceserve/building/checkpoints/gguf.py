"""Checkpoints in one GGUF file, llama.cpp's format, which provides configuration, tokenizer and weights."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, NamedTuple, Optional, Tuple

from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.errors import ExportError, SourceError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tensors that are not part of any parameter.
_SCALED_ROTARY = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_SCALING, _TOKENIZER, _ADDS_BOS = ".rope.scaling.type", "tokenizer.ggml.model", "tokenizer.ggml.add_bos_token"
_READ_FIELDS = (_SCALING, _TOKENIZER, _ADDS_BOS)
_BYTE_LEVEL = "gpt2"  # llama.cpp's name for such tokenizers


@contextlib.contextmanager
def located(checkpoint: Checkpoint) -> Iterator[Tuple[Path, Optional[Path]]]:
    """Yield from_pretrained's folder, and the GGUF file if the checkpoint is one.

    For a GGUF file the folder is empty: files beside it, such as another tokenizer.json, would be read too
    by some versions of transformers.
    """
    if checkpoint.gguf_file is None:
        yield checkpoint.folder, None
        return
    # transformers shows its own progress bar while unpacking, whatever its logging level.
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stderr(io.StringIO()):
        yield Path(empty), checkpoint.folder.resolve() / checkpoint.gguf_file


def check_gguf(checkpoint: Checkpoint) -> None:
    """Raise SourceError, ExportError for a GGUF file that cannot be read, or only in part by transformers."""
    if checkpoint.gguf_file is None:
        return
    lost = _facts(checkpoint).scaling
    if lost:
        raise ExportError(
            f"{checkpoint.gguf_file} scales its rotary embeddings ({', '.join(lost)}), which transformers does not read "
            "from a GGUF file, so that other texts would be written; name the checkpoint that it was made from"
        )


def tokenizer_options(checkpoint: Checkpoint) -> Dict[str, object]:
    """Return the tokenizer's options besides the file: whether a text begins with a special token.

    transformers 4.57 ignores a "no" in the file.
    """
    if checkpoint.gguf_file is None:
        return {}
    facts = _facts(checkpoint)
    # llama.cpp's default for older files, which do not say: yes for sentencepiece's.
    return {"add_bos_token": facts.tokenizer == "llama" if facts.adds_bos is None else facts.adds_bos}


def check_tokenizer(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ExportError if a byte-level tokenizer is lossy: transformers 4.57's drop a text's leading space."""
    text = " a"
    if checkpoint.gguf_file is None or _facts(checkpoint).tokenizer != _BYTE_LEVEL:
        return
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
        raise ExportError(
            f"this version of transformers mistakes the kind of {checkpoint.gguf_file}'s tokenizer, and loses spaces; "
            "take transformers 5 or newer, or name the checkpoint that the file was made from"
        )


class _Facts(NamedTuple):
    """What is read of a GGUF file here: what scales its rotary embeddings, its kind of tokenizer, and whether that begins each
    text with a special token; None where it does not say."""

    scaling: Tuple[str, ...]
    tokenizer: Optional[str]
    adds_bos: Optional[bool]


def _facts(checkpoint: Checkpoint) -> _Facts:
    path = checkpoint.folder / str(checkpoint.gguf_file)
    try:
        found = path.stat()
        return _read(path, found.st_mtime_ns, found.st_size)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise SourceError(f"{checkpoint.gguf_file} cannot be read as a GGUF file: {first_line(error)}") from error


@functools.lru_cache(maxsize=1)
def _read(path: Path, changed: int, size: int) -> _Facts:
    """Parse a file once: its vocabulary takes seconds. It is another one after a change of its time or size."""
    try:
        import accelerate  # noqa: F401
        from gguf import GGUFReader
    except ImportError as error:
        raise ExportError(
            f"a GGUF file needs packages that are not installed ({error}); pip install 'traceserve[gguf]'"
        ) from error
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.endswith(_READ_FIELDS)}
    kinds = [f"rope.scaling.type {kind}" for name, kind in fields.items() if name.endswith(_SCALING) and kind != "none"]
    rotary = sorted({tensor.name for tensor in reader.tensors} & _SCALED_ROTARY)
    return _Facts((*rotary, *kinds), fields.get(_TOKENIZER), fields.get(_ADDS_BOS))
