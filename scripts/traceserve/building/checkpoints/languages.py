"""The languages between which a tokenizer tells: mBART's, NLLB's, M2M100's, by their codes."""

from __future__ import annotations

import contextlib
import re
from typing import Any, Dict, Iterator, Optional

from traceserve_runtime.tasks.text2text_generation import LANGUAGE_PARAMETERS, nearest

from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ConfigError

_CODE = re.compile(r"[a-z]{2,3}_[A-Za-z]{2,4}")  # en_XX, eng_Latn


def known(tokenizer: Any) -> Dict[str, int]:
    """Code to token id; empty for a tokenizer that knows of no languages."""
    if not hasattr(tokenizer, "src_lang"):
        return {}
    codes = getattr(tokenizer, "lang_code_to_id", None)  # NLLB has its codes as special tokens only
    if codes is None:
        codes = {str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.all_special_tokens}
        codes = {code: number for code, number in codes.items() if _CODE.fullmatch(code)}
    return {code.strip("_"): number for code, number in codes.items() if number != tokenizer.unk_token_id}


def source_id(tokenizer: Any) -> Optional[int]:
    """The token that stands for the language of every text; None where there is none."""
    number = known(tokenizer).get(str(getattr(tokenizer, "src_lang", "")).strip("_"))
    return number if number in tokenizer("")["input_ids"] else None


def set_language(config: SetupConfig, tokenizer: Any) -> None:
    """Let the tokenizer read the language that the configuration names; raises ConfigError for a code that is unknown."""
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
            f"{nearest(code, codes)}? It knows {len(codes)} codes"
        )
    source = config.parameters.get("src_lang")
    if source is not None:
        tokenizer.src_lang = source


@contextlib.contextmanager
def reading(tokenizer: Any, code: Optional[str]) -> Iterator[None]:
    """For a moment the tokenizer reads this language, where one is named."""
    if code is None:
        yield
        return
    before = tokenizer.src_lang
    tokenizer.src_lang = code
    try:
        yield
    finally:
        tokenizer.src_lang = before
