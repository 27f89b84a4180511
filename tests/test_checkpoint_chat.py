"""The chat template of a checkpoint: rendered by a worker as by transformers, or refused when the archive is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import pytest
from traceserve.building.checkpoints import loading, sources
from traceserve.building.checkpoints.original import Original
from traceserve.building.config.parsing import parse_config
from traceserve.errors import SourceError

Make = Callable[..., Path]

ENDS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
ONCE = "{% if messages | length > 1 %}{{ raise_exception('One message, please') }}{% endif %}{{ messages[0].content }}"
SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set first, rest = messages[0].content, messages[1:] %}{% else %}"
    "{% set first, rest = 'Be kind.', messages %}{% endif %}{{ bos_token }}{{ first }}"
    "{% for m in rest %}{{ m.content }}{% endfor %}"
)
DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }} {% if tools %}{{ tools | tojson }}{% endif %}" + ENDS
GENERATED = "{% set x = 'outer' %}{% generation %}{% set x = 'inner' %}{% endgeneration %}{{ x }}"
DIFFERENT = "{{ range(99999) | random }}" + ENDS


def loaded(checkpoint: Make, folder: Path, files: Dict[str, str], **content: Any) -> Original:
    """Load a tiny Llama with these files added, as an export does."""
    source = Path(shutil.copytree(checkpoint("llama", "AutoModelForCausalLM"), folder / "chatty"))
    for name, text in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    config, _ = parse_config({"model_name": "chatty", "task": "text_generation", **content})
    with loading.quiet_transformers():
        return loading.load_original(config, sources.fetch_checkpoint(config, folder), folder)


def stated(checkpoint: Make, template: Any) -> Dict[str, str]:
    """Return a tokenizer_config.json with a template."""
    settings = json.loads((checkpoint("llama", "AutoModelForCausalLM") / "tokenizer_config.json").read_text())
    return {"tokenizer_config.json": json.dumps({**settings, "chat_template": template})}


@pytest.mark.parametrize("template", [ENDS, SYSTEM, DATED, GENERATED, "{{ messages[0].content | trim }}{{ missing }}"])
def test_a_template_that_both_sides_render_alike(template: str, checkpoint: Make, tmp_path: Path) -> None:
    original = loaded(checkpoint, tmp_path, {"chat_template.jinja": template})
    assert original.facts["chat_template"] == template and original.note is None


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for m in messages %}[INST]{{ m['content'] }}[/INST]{% endfo %}", "Encountered unknown tag 'endfo'"),
        ("{{ messages | no_such_filter }}", "No filter named 'no_such_filter'"),
    ],
)
def test_a_broken_template_is_refused(template: str, reason: str, place: str, checkpoint: Make, tmp_path: Path) -> None:
    files = {place: template} if place.endswith(".jinja") else stated(checkpoint, template)
    with pytest.raises(SourceError, match=rf"chatty: its chat template \({place}\) is no valid template: {reason}"):
        loaded(checkpoint, tmp_path, files)


def test_a_template_that_is_rendered_otherwise_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"chat_template.jinja\) is rendered otherwise "):
        loaded(checkpoint, tmp_path, {"chat_template.jinja": DIFFERENT})


@pytest.mark.parametrize(
    "template, notes",
    [
        (ONCE, ["a chat of user, assistant and user, in transformers too: One message, please"]),
        ("{{ raise_exception('No') }}", ["a user's message, in transformers too: No", "a chat of user, "]),
        (
            "{{ language.code }}" + ENDS,
            ["a user's message, in transformers too: 'language' is undefined", "a chat of "],
        ),
    ],
)
def test_a_template_that_refuses_in_transformers_too_is_noted(
    template: str, notes: Any, checkpoint: Make, tmp_path: Path
) -> None:
    note = loaded(checkpoint, tmp_path, {"chat_template.jinja": template}).note
    assert note is not None
    found = note.splitlines()
    assert len(found) == len(notes)
    for line, expected in zip(found, notes):
        assert line.startswith(f"the chat template refuses {expected}") and line.endswith("such a request is a 400")


@pytest.mark.parametrize("place", ["tokenizer_config.json", "additional_chat_templates/tool_use.jinja"])
def test_templates_without_a_default_are_named(place: str, checkpoint: Make, tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": ENDS}, {"name": "rag", "template": ENDS}]
    files = stated(checkpoint, listed) if place.endswith(".json") else {place: ENDS}
    original = loaded(checkpoint, tmp_path, files)
    names = "rag, tool_use" if place.endswith(".json") else "tool_use"
    assert original.facts["chat_template"] is None
    assert original.note is not None and f"has chat templates ({names}), but none named default" in original.note


def test_of_several_templates_the_default_is_taken(checkpoint: Make, tmp_path: Path) -> None:
    listed = [{"name": "default", "template": ENDS}, {"name": "rag", "template": DIFFERENT}]
    original = loaded(checkpoint, tmp_path, stated(checkpoint, listed))
    assert (original.facts["chat_template"], original.note) == (ENDS, None)


@pytest.mark.parametrize("template", [None, "{% endfo %}"])
def test_a_task_without_chats_has_no_template(template: Optional[str], checkpoint: Make, tmp_path: Path) -> None:
    files = {"chat_template.jinja": template} if template else {}
    assert loaded(checkpoint, tmp_path, files, task="feature_extraction").note is None
