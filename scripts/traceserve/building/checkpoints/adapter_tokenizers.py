"""An adapter's tokenizer files without a vocabulary, which are not read: they may say only what its base's do.

peft itself writes none. A Trainer writes the whole tokenizer, and that is taken instead of the base's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, Iterator, Mapping, Sequence, Tuple

from traceserve.building.checkpoints import case, tokenizers
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.json_files import read_object
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import SourceError, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_ADDED, _TEMPLATE = "added_tokens.json", "chat_template.jinja"
FILES = (_CONFIG, _MAP, _ADDED, _TEMPLATE)
_LISTS = ("additional_special_tokens", "extra_special_tokens")  # the names in transformers 4 and 5
# Settings of tokenizer_config.json that change a text's tokens, and whether a tokenizer does so.
_SETTINGS: Dict[str, Callable[[PreTrainedTokenizerBase], bool]] = {
    "add_bos_token": lambda tokenizer: tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
    "add_eos_token": lambda tokenizer: tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id],
    "do_lower_case": case.lowers,
}


def check_unread(stored: Checkpoint, base: Checkpoint, config: SetupConfig, chats: bool) -> None:
    """Raise SourceError if the adapter's files say another tokenizer than the base's, which is taken; `chats` says whether
    chat templates are read."""
    names = [name for name in FILES if (stored.folder / name).is_file()]
    if all(_bytes(stored.folder / name) == _bytes(base.folder / name) for name in names):
        return
    # The task decides nothing about a tokenizer without its model, and may not be known yet.
    tokenizer = tokenizers.load_tokenizer(config.model_copy(update={"task": "feature_extraction"}), base)
    differing = list(_differences(stored.folder, base.folder, tokenizer, chats))
    if differing:
        raise SourceError(
            f"{config.model_name}: the adapter's {some(names)} and its base's tokenizer differ in {some(differing)}, but the "
            "base's is taken, since the adapter has no vocabulary; save the whole tokenizer of its training beside it with "
            "tokenizer.save_pretrained, or remove these files if the base's is right"
        )


def _differences(folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase, chats: bool) -> Iterator[str]:
    """Name what the files of `folder` set otherwise than the base's tokenizer is; what they leave out is the base's."""
    settings = _object(folder / _CONFIG)
    if chats:
        own = _templates(getattr(tokenizer, "chat_template", None))
        if any(own.get(name) != text for name, text in _stated_templates(folder, settings).items()):
            yield "the chat template"
    stated = [token for each in (settings, _object(folder / _MAP)) for token in _special_tokens(each)]
    known = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name not in _LISTS}
    yield from sorted({name for name, token in stated if name not in _LISTS and known.get(name) != token})
    if not {token for name, token in stated if name in _LISTS} <= set(map(str, tokenizer.all_special_tokens)):
        yield "special tokens"
    vocabulary = tokenizer.get_vocab()
    if any(vocabulary.get(token) != number for token, number in _added_tokens(folder, settings)):
        yield "added tokens"
    of_base = _object(base / _CONFIG)
    for name, does in _SETTINGS.items():
        wanted = settings.get(name)
        if isinstance(wanted, bool) and of_base.get(name) is not wanted and does(tokenizer) is not wanted:
            yield name


def _special_tokens(stated: Mapping[str, object]) -> Iterator[Tuple[str, str]]:
    """Yield the special tokens that a file states, with their name or that of their list; null states none."""
    for name, value in stated.items():
        tokens: Sequence[object] = [value] if name.endswith("_token") else []
        if name in _LISTS:
            listed = list(value.values()) if isinstance(value, dict) else value
            tokens = listed if isinstance(listed, list) else []
        yield from ((name, text) for text in map(_text, tokens) if text)


def _text(token: object) -> str:
    """Return a token's text, alone or as an object with its kind; empty if it is neither."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _added_tokens(folder: Path, settings: Mapping[str, object]) -> Iterator[Tuple[str, object]]:
    """Yield the tokens that files add to a vocabulary, and their numbers."""
    yield from _object(folder / _ADDED).items()
    decoder = settings.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        yield _text(token), int(number) if number.isdecimal() else number


def _stated_templates(folder: Path, settings: Mapping[str, object]) -> Dict[str, str]:
    """Return the chat templates that files state, by name; the file of its own goes first, as in transformers."""
    content = _bytes(folder / _TEMPLATE)
    if content:
        return _templates(content.decode("utf-8", "replace"))
    return _templates(settings.get("chat_template"))


def _templates(stated: object) -> Dict[str, str]:
    """Return templates by name: one, several as objects, or by name. A line's end at a template's end writes nothing."""
    if isinstance(stated, list):
        stated = {str(each.get("name")): each.get("template") for each in stated if isinstance(each, dict)}
    by_name = stated if isinstance(stated, dict) else {"default": stated}
    texts = {str(name): text for name, text in by_name.items() if isinstance(text, str)}
    return {name: text.replace("\r\n", "\n").rstrip("\n") for name, text in texts.items()}


def _object(path: Path) -> Dict[str, object]:
    return read_object(path) or {}


def _bytes(path: Path) -> bytes:
    """Return a file's content; empty if there is none."""
    return path.read_bytes() if path.is_file() else b""
