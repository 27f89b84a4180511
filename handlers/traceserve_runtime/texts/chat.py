"""Renders a chat's messages to a prompt with the checkpoint's own template."""

from __future__ import annotations

import datetime
import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Dict, Mapping, NoReturn, Sequence, Tuple

from traceserve_runtime.errors import InvalidRequest, MissingPackage, reason
from traceserve_runtime.versions import release_of

if TYPE_CHECKING:
    import jinja2
    from jinja2.parser import Parser

_SAFE = (3, 1, 6)  # templates are the checkpoint's code, and older sandboxes have known vulnerabilities
# Like transformers, the trailing space shows whether the template trims messages; if so, the last one is trimmed too.
_END = "<<the message goes on here>> "


def render(template: str, tokens: Mapping[str, str], messages: Sequence[Mapping[str, str]]) -> str:
    """Return the prompt; if the last message is the assistant's, it ends inside it, so that the model continues it.

    `tokens` are the special tokens by their names in templates ("bos_token"). Raises InvalidRequest for messages that
    the template refuses, MissingPackage without jinja2.
    """
    continues = messages[-1]["role"] == "assistant"
    given = [dict(message) for message in messages]
    if continues:
        given[-1]["content"] += _END
    try:
        # transformers passes all four, and templates ask whether one is none.
        known = {"messages": given, "tools": None, "documents": None, "add_generation_prompt": not continues}
        text = str(_compiled(template).render(**{**known, **tokens}))
    except MissingPackage:
        raise
    except Exception as error:  # a template is the checkpoint's code, and may fail in any way
        raise InvalidRequest(
            f"the model's chat template refuses these messages: {reason(error)}", "messages"
        ) from error
    if not continues:
        return text
    before, found, after = text.rpartition(_END.strip())
    if not found:
        raise InvalidRequest(
            "the model's chat template leaves the last message out, so it cannot be continued", "messages"
        )
    return before if after[:1] == " " else before.rstrip()


@lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    """Compile the template in jinja2's sandbox, with the names that transformers provides."""
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingPackage(f"chat messages need jinja2, which cannot be imported: {error}") from error

    if release_of(jinja2.__version__) < _SAFE:
        raise MissingPackage(
            f"chat messages need jinja2 {'.'.join(map(str, _SAFE))} or newer, whose sandbox holds; this is {jinja2.__version__}"
        )

    class Generation(Extension):
        """{% generation %} marks the assistant's text for training; here its block is just rendered, with its own names, as
        in transformers."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: object, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def names(tokens: Mapping[str, Tuple[str, int]]) -> Dict[str, str]:
    """Map special tokens, as {"bos": ("<s>", 1)}, to the names that templates use."""
    return {f"{name}_token": token for name, (token, _) in tokens.items()}
