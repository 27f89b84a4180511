"""The chat template that is served, and the check that a worker renders it as transformers does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, List, Mapping, NamedTuple, Optional, Sequence

from traceserve_runtime.errors import InvalidRequest, MissingPackage, reason
from traceserve_runtime.texts import chat

from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import SourceError, shortened, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = List[Dict[str, str]]

_DEFAULT = "default"  # the name of the template that transformers takes where a chat has no tools
_HI: Messages = [{"role": "user", "content": " Hello, <b>what</b> is 'that'? "}]
_CHATS: Mapping[str, Messages] = {
    "a user's message": _HI,
    "a chat of user, assistant and user": [*_HI, {"role": "assistant", "content": "A café."}, *_HI],
}
_TRIES = 3  # a template may write the time, and the clock may move on between two renderings
_CORRECT = "correct it, or remove it from a copy of the checkpoint: then texts are written, and chats refused"
_SHOWN = 120  # characters of a prompt in a message


class _Rendered(NamedTuple):
    """A prompt, or why there is none."""

    text: Optional[str]
    refusal: Optional[Exception] = None


def served_template(tokenizer: PreTrainedTokenizerBase) -> Optional[str]:
    """Return the chat template that a worker renders; None if there is none, or none by default among several."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get(_DEFAULT)
    return template if isinstance(template, str) else None


def check_template(
    config: SetupConfig, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, object]
) -> Optional[str]:
    """Return a note on chats that are refused; raises SourceError for a template that a worker renders otherwise than
    transformers does, or not at all. `facts` are the task's: tasks without chats have no template."""
    if "chat_template" not in facts:
        return None
    template, tokens = facts["chat_template"], facts["tokens"]
    if not isinstance(template, str):
        return _unnamed(tokenizer)
    assert isinstance(tokens, dict)
    where = f"{config.model_name}: its chat template ({_place(checkpoint)})"
    notes = []
    for what, messages in _CHATS.items():
        try:
            refusal = _compare(where, what, template, tokens, messages, tokenizer)
        except MissingPackage as error:
            return f"the chat template was not checked: {error.message}"
        if refusal:
            notes.append(f"the chat template refuses {what}, in transformers too: {refusal}; such a request is a 400")
    return "\n".join(notes) or None


def _unnamed(tokenizer: PreTrainedTokenizerBase) -> Optional[str]:
    """Return a note on templates none of which is taken."""
    templates = getattr(tokenizer, "chat_template", None)
    if not isinstance(templates, dict) or not templates:
        return None
    return (
        f"the checkpoint has chat templates ({some(sorted(map(str, templates)))}), but none named {_DEFAULT}, so chats are "
        "refused (400); name the one to serve so, or write it into chat_template.jinja"
    )


def _place(checkpoint: Checkpoint) -> str:
    if checkpoint.gguf_file:
        return checkpoint.gguf_file
    own = "chat_template.jinja"  # it goes first, as in transformers
    return own if (checkpoint.folder / own).is_file() else "tokenizer_config.json"


def _compare(
    where: str,
    what: str,
    template: str,
    tokens: Mapping[str, str],
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
) -> Optional[str]:
    """Return why the template refuses these messages, on both sides; None if it renders them alike."""
    for _ in range(_TRIES):
        ours, theirs = _by_worker(template, tokens, messages), _by_transformers(tokenizer, messages)
        if ours.refusal and _is_syntax(ours.refusal):
            raise SourceError(f"{where} is no valid template: {reason(ours.refusal)}; {_CORRECT}")
        if ours.text == theirs.text:
            break
    else:
        raise SourceError(
            f"{where} is rendered otherwise by a worker than by transformers, for {what}: {_shown(ours, theirs)} instead of "
            f"{_shown(theirs, ours)}; {_CORRECT}"
        )
    return reason(ours.refusal) if ours.refusal else None


def _by_worker(template: str, tokens: Mapping[str, str], messages: Messages) -> _Rendered:
    try:
        return _Rendered(chat.render(template, tokens, messages))
    except InvalidRequest as error:
        cause = error.__cause__
        return _Rendered(None, cause if isinstance(cause, Exception) else error)


def _by_transformers(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Dict[str, str]]) -> _Rendered:
    given = [dict(message) for message in messages]
    try:
        return _Rendered(str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)))
    except Exception as error:  # a template is the checkpoint's code, and may fail in any way
        return _Rendered(None, error)


def _is_syntax(error: Exception) -> bool:
    """Return whether a template cannot be compiled, also for a filter or test that does not exist."""
    import jinja2

    return isinstance(error, jinja2.TemplateSyntaxError)


def _shown(rendered: _Rendered, other: _Rendered) -> str:
    """Show a prompt from shortly before the first character that differs, or its refusal."""
    if rendered.text is None:
        return f"a refusal ({reason(rendered.refusal)})" if rendered.refusal else "a refusal"
    pairs = zip(rendered.text, other.text or "")
    same = next((i for i, (one, two) in enumerate(pairs) if one != two), 0)
    return repr(shortened(rendered.text[max(0, same - 20) :], _SHOWN))
