"""The original: the archive is made from it and compared with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional, Tuple

from traceserve_runtime.manifest import TokenizerFacts
from traceserve_runtime.runtimes import calling

from traceserve.building.checkpoints.conversion import PIECES_FILE, Converted
from traceserve.building.checkpoints.labels import same_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
ARRAYS_FILE = "layers.npz"
_SPACED = "a . b ? c ! d , e ' f n't g 'm h 's i 've j 're k"  # a space before all that is cleaned up


@dataclass(frozen=True)
class Original:
    """The original model and tokenizer, from which the archive is made and with which it is compared."""

    model: PreTrainedModel  # float32, eval
    tokenizer: PreTrainedTokenizerBase
    inputs: Tuple[str, ...]
    max_length: int
    labels: Tuple[str, ...]
    parameters: Dict[str, object]
    facts: Dict[str, Any]
    padding_side: str
    truncation_side: str
    loop: str = ""  # how its task runs it token by token, see `config.loops`; empty if it runs once
    dtype: str = "float32"  # the traced model's; others have another model, see `writers.lowering`
    converted: Optional[Converted] = None  # the tokenizer, if transformers' runs only in Python
    known_tokens: Optional[int] = None  # of the tokenizer's, if the model lacks some
    known_types: Optional[int] = None  # of tokens, if the tokenizer gives a pair of texts more
    case_note: Optional[str] = None  # on do_lower_case
    weights_note: Optional[str] = None  # on weights that the model does not read
    chat_note: Optional[str] = None  # on chats that the template refuses
    arrays: Dict[str, Any] = field(default_factory=dict)  # for the task's own computations, float32
    kept: Tuple[str, ...] = ()  # the layers kept in float32
    calibration: Tuple[Dict[str, Any], ...] = ()  # inputs, for a writer whose library quantizes by itself
    shortest: int = 1  # the shortest row that the model can read; others are padded to it
    per_token: Tuple[str, ...] = ()  # the outputs with a value per token

    @property
    def tokenizer_facts(self) -> TokenizerFacts:
        """The facts that the worker needs besides tokenizer.json."""
        tokenizer = self.tokenizer
        # The model's padding id overrides the tokenizer's: classifiers of decoders search for it.
        numbers = [number for number in (calling.pad_id(self.model), tokenizer.pad_token_id) if number is not None]
        if self.known_tokens is not None:  # padding may have been added only to the tokenizer
            numbers = [number for number in numbers if number < self.known_tokens]
        return TokenizerFacts(
            file=TOKENIZER_FILE,
            pad_id=next(iter(numbers), 0),
            pad_type_id=tokenizer.pad_token_type_id,
            padding_side=self.padding_side,
            truncation_side=self.truncation_side,
            clean_up=_cleans_up(tokenizer),
            pieces=None if self.converted is None else PIECES_FILE,
            embeddings=self.known_tokens,
            types=self.known_types,
            splits_special=self.converted is None and splits_special(tokenizer),
            infilling=infilling(tokenizer),
        )

    @property
    def note(self) -> Optional[str]:
        """Notes for the user."""
        notes = [self._short_note, self.case_note, self._tokens_note, self._types_note, self._infilling_note]
        notes += [self._response_note, self._labels_note, self.weights_note, self.chat_note]
        return "\n".join(note for note in notes if note) or None

    @property
    def _short_note(self) -> Optional[str]:
        if self.shortest == 1:
            return None
        return (
            f"transformers' own {type(self.model).__name__} fails on rows below {self.shortest} tokens (special ones "
            "included): they are padded to that length"
        )

    @property
    def _tokens_note(self) -> Optional[str]:
        if self.known_tokens is None:
            return None
        more = len(self.tokenizer) - self.known_tokens
        return (
            f"the tokenizer has {more:,} added token{'s' * (more > 1)} that the model has no embedding for: a text with one "
            "is refused (400)"
        )

    @property
    def _types_note(self) -> Optional[str]:
        if self.known_types is None:
            return None
        return "the model knows no token type of a second text: a pair of texts is refused (400)"

    @property
    def _infilling_note(self) -> Optional[str]:
        token = infilling(self.tokenizer)
        return None if token is None else f"a text with {token} is refused (400): places are not filled here"

    @property
    def _labels_note(self) -> Optional[str]:
        same = same_labels(self.labels)
        return None if same is None else f"{same}; name them by index_to_name"

    @property
    def _response_note(self) -> Optional[str]:
        if not self.loop or not getattr(self.tokenizer, "response_template", None):
            return None
        return "the tokenizer's response_template is not used: answers are texts without special tokens, whole"

    def write_arrays(self, folder: Path) -> Tuple[str, ...]:
        """Write the arrays for the task's own computations; returns the files' names."""
        if not self.arrays:
            return ()
        import numpy as np

        np.savez(folder / ARRAYS_FILE, **self.arrays)
        return (ARRAYS_FILE,)

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json as transformers uses it, without padding and truncation."""
        converted = self.converted
        if converted is not None:
            converted.write(folder)
        backend = self.tokenizer.backend_tokenizer if converted is None else converted.tokenizer
        document = json.loads(backend.to_str())
        document.update(truncation=None, padding=None)
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")


def splits_special(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer reads special tokens in a text as text; tokenizer.json does not say so, and older versions
    of fast tokenizers cannot."""
    can = hasattr(tokenizer.backend_tokenizer, "encode_special_tokens")
    return can and bool(getattr(tokenizer, "split_special_tokens", False))


def infilling(tokenizer: PreTrainedTokenizerBase) -> Optional[str]:
    """Return what marks a place to fill, of a tokenizer that takes texts apart there by itself, as CodeLlama's."""
    token = getattr(tokenizer, "fill_token", None)
    return token if isinstance(token, str) and token else None


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `decode` removes spaces before punctuation and contractions; some tokenizers ignore their own setting, and
    WordPiece's decoder always removes some of them."""
    ids = tokenizer(_SPACED, add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False))
