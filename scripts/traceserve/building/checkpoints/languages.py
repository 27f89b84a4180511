"""The languages of a multilingual tokenizer (mBART's, NLLB's, M2M100's), by code."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Dict, Iterator, Optional

from traceserve_runtime.tasks.text2text_generation import LANGUAGE_PARAMETERS, nearest_code

from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CODE = re.compile(r"[a-z]{2,3}_[A-Za-z]{2,4}")  # en_XX, eng_Latn


def known(tokenizer: PreTrainedTokenizerBase) -> Dict[str, int]:
    """Map codes to token ids; empty for a tokenizer without languages."""
    if not hasattr(tokenizer, "src_lang"):
        return {}
    codes = getattr(tokenizer, "lang_code_to_id", None)  # NLLB has its codes only as special tokens
    if codes is None:
        codes = {str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.all_special_tokens}
        codes = {code: number for code, number in codes.items() if _CODE.fullmatch(code)}
    return {code.strip("_"): number for code, number in codes.items() if number != tokenizer.unk_token_id}


def source_id(tokenizer: PreTrainedTokenizerBase) -> Optional[int]:
    """Return the token for every text's language; None if there is none."""
    number = known(tokenizer).get(str(getattr(tokenizer, "src_lang", "")).strip("_"))
    return number if number in tokenizer("")["input_ids"] else None


def set_language(config: SetupConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokenizer to the configured language; raises ConfigError for an unknown code."""
    codes = known(tokenizer)
    for name in LANGUAGE_PARAMETERS:
        code = config.parameters.get(name)
        if code is None or code in codes:
            continue
        if not codes:
            raise ConfigError(
                f"parameters: {name} is {code}, but the tokenizer of {config.model_name} has no languages"
            )
        raise ConfigError(
            f"parameters: {name} is {code}, which the tokenizer of {config.model_name} does not know; did you mean "
            f"{nearest_code(code, codes)}? It knows {len(codes)} codes"
        )
    source = config.parameters.get("src_lang")
    if source is not None:
        tokenizer.src_lang = source


@contextlib.contextmanager
def reading(tokenizer: PreTrainedTokenizerBase, code: Optional[str]) -> Iterator[None]:
    """Temporarily set the tokenizer to this language, if given."""
    if code is None:
        yield
        return
    before = tokenizer.src_lang
    tokenizer.src_lang = code
    try:
        yield
    finally:
        tokenizer.src_lang = before
