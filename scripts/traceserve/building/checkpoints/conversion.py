"""Converts Python-only tokenizers to a sentencepiece model with a separate vocabulary, which a worker can run.

Marian's and M2M100's are such: sentencepiece finds the pieces, and vocab.json has their ids. The result is exact, or
the tokenizer is refused by name; the gate compares it with the original like any tokenizer.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple

from traceserve_runtime.texts.pieces import BPE, UNIGRAM, PiecesFacts

from traceserve.errors import ExportError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Kinds of pieces and models, numbered as in sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_KINDS = {1: UNIGRAM, 2: BPE}
PIECES_FILE = "pieces.json"


class PiecesLayout(NamedTuple):
    """How a transformers class uses sentencepiece's model and its vocabulary."""

    model: Callable[[PreTrainedTokenizerBase], str]  # path of the model for reading
    language_codes: bool  # whether a text may begin with one, such as >>fr<<
    writes_spaces: bool  # whether ▁ becomes a space in pieces missing from the model
    beyond: Callable[[PreTrainedTokenizerBase], str]  # the text of an id beyond the vocabulary


class Converted(NamedTuple):
    """A tokenizer in the worker's format."""

    tokenizer: Tokenizer
    pieces: PiecesFacts

    def write(self, folder: Path) -> None:
        """Write the files beside tokenizer.json."""
        (folder / PIECES_FILE).write_text(json.dumps(self.pieces, ensure_ascii=False), encoding="utf-8")


LAYOUTS: Dict[str, PiecesLayout] = {
    "MarianTokenizer": PiecesLayout(lambda own: str(own.spm_files[0]), True, True, lambda own: ""),
    "M2M100Tokenizer": PiecesLayout(lambda own: str(own.spm_file), False, False, lambda own: str(own.unk_token)),
}


def converts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether this class is supported."""
    return type(tokenizer).__name__ in LAYOUTS


def convert(tokenizer: PreTrainedTokenizerBase) -> Converted:
    """Convert a slow tokenizer of one of LAYOUTS; raises ExportError for one that cannot be converted exactly."""
    layout = LAYOUTS[type(tokenizer).__name__]
    _check(tokenizer)
    path = Path(layout.model(tokenizer))
    proto = _read(path)
    kinds: Dict[int, List[str]] = {kind: [] for kind in range(1, 7)}
    for piece in proto.pieces:
        kinds[piece.type].append(piece.piece)
    # Tokens that are split off a text before sentencepiece sees it.
    tokens = dict.fromkeys([*tokenizer.added_tokens_encoder, *map(str, tokenizer.all_special_tokens)])
    vocabulary = {**tokenizer.encoder, **getattr(tokenizer, "lang_token_to_id", {})}
    numbers = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    for token, number in numbers.items():
        if vocabulary.setdefault(token, number) != number:
            raise ExportError(
                f"the tokenizer of {tokenizer.name_or_path} has two numbers for {token}, {vocabulary[token]} and {number}, "
                "so it cannot be converted exactly; bring a tokenizer.json"
            )
    control = {vocabulary[piece] for piece in kinds[_CONTROL] if piece in vocabulary}
    known = {piece.piece for piece in proto.pieces}
    return Converted(
        _vocabulary(tokenizer, vocabulary),
        {
            "kind": _KINDS[proto.trainer_spec.model_type],
            "pieces": [(piece.piece, piece.score) for piece in proto.pieces if piece.type == _NORMAL],
            "user_defined": kinds[_USER_DEFINED],
            "charsmap": base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode("ascii"),
            "add_prefix": proto.normalizer_spec.add_dummy_prefix,
            "collapse": proto.normalizer_spec.remove_extra_whitespaces,
            "language_codes": layout.language_codes,
            "tokens": list(tokens),
            "unknown_id": tokenizer.unk_token_id,
            "not_written": sorted(control | set(tokenizer.all_special_ids)),
            "beyond": layout.beyond(tokenizer),
            "as_they_are": [] if layout.writes_spaces else sorted(set(vocabulary) - known),
        },
    )


def _check(tokenizer: PreTrainedTokenizerBase) -> None:
    added = tokenizer.added_tokens_decoder.values()
    if not all(isinstance(getattr(token, "lstrip", None), bool) for token in added):  # before 4.34 they are strings
        raise ExportError(
            f"a {type(tokenizer).__name__} is converted by transformers 4.34 or newer; install one, or bring a tokenizer.json"
        )
    for wrong, what in (
        (bool(tokenizer.sp_model_kwargs), "has sp_model_kwargs, as for sampling"),
        (getattr(tokenizer, "split_special_tokens", False), "reads special tokens as text (split_special_tokens)"),
        (
            getattr(tokenizer, "separate_vocabs", False),
            "reads by one vocabulary and writes by another (separate_vocabs)",
        ),
        (
            any(token.lstrip or token.rstrip or token.single_word for token in added),
            "has tokens with lstrip, rstrip or single_word",
        ),
    ):
        if wrong:
            raise ExportError(
                f"the tokenizer of {tokenizer.name_or_path} {what}; a {type(tokenizer).__name__} like this cannot be "
                "converted exactly: remove that from tokenizer_config.json, or bring a tokenizer.json"
            )


def _read(path: Path) -> Any:
    """Return sentencepiece's model; raises ExportError if the worker would segment it differently."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ExportError(f"{path.name} is not a sentencepiece file: {error}") from error
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    kinds = {piece.type for piece in proto.pieces}
    for wrong, what in (
        (trainer.model_type not in _KINDS, "is neither an unigram nor a bpe model"),
        (trainer.treat_whitespace_as_suffix, "has treat_whitespace_as_suffix"),
        (not normalizer.escape_whitespaces, "has no escape_whitespaces"),
        (bool(proto.denormalizer_spec.precompiled_charsmap), "changes the texts that it writes (denormalizer_spec)"),
        (_BYTE in kinds, "has byte_fallback"),
        (_UNUSED in kinds, "has pieces that are not used"),
        (_NORMAL not in kinds, "has no pieces"),
    ):
        if wrong:
            raise ExportError(f"{path.name} {what}, which cannot be converted exactly; bring a tokenizer.json")
    return proto


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary: Dict[str, int]) -> Tokenizer:
    """Return the vocabulary, and the tokens around every text."""
    from tokenizers import Tokenizer, models, processors

    converted = Tokenizer(models.WordLevel(vocabulary, unk_token=str(tokenizer.unk_token)))
    around = tokenizer.build_inputs_with_special_tokens([-1])  # -1 marks the text
    parts = ["$A" if number == -1 else tokenizer.convert_ids_to_tokens(number) for number in around]
    used = [(tokenizer.convert_ids_to_tokens(number), number) for number in sorted({*around} - {-1})]
    converted.post_processor = processors.TemplateProcessing(single=parts, special_tokens=used)
    return converted
