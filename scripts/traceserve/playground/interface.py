"""The page itself, in Gradio: a form on one side, the answers on the other. No other file imports Gradio."""

from __future__ import annotations

import os
import re
import threading
import uuid
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence

from traceserve.errors import ServerError, some
from traceserve.playground import asking, form, panels
from traceserve.playground.form import Control, FormError
from traceserve.playground.models import Model
from traceserve.playground.shapes import STARTING

INSTALL = "pip install 'traceserve[playground]'"
STYLES = Path(__file__).with_name("styles.css")
# Telemetry, a version check, and a history of runs with their texts in the browser's storage: none of these.
_OFF = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
_TITLE = "traceserve playground"
_AT_ONCE = 8  # questions that are answered beside each other


def gradio() -> Any:
    """The package, with nothing sent anywhere; raises ServerError where it is not installed."""
    os.environ.update(_OFF)
    try:
        import gradio as package
    except ImportError as error:
        raise ServerError(
            f"the playground needs the package {error.name or 'gradio'}; install it with: {INSTALL}"
        ) from None
    return package


def playground_application(boards: Sequence[Sequence[Model]]) -> Any:
    """The page as an ASGI application; a board is one model, or several that are asked the same."""
    gr = gradio()
    from fastapi import FastAPI

    with gr.Blocks(title=_TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f'<h1 class="ts-title">{_TITLE}</h1>', js_on_load=None)
        if len(boards) == 1:
            _Board(gr, boards[0], "0")
        else:
            with gr.Tabs():
                for number, (label, board) in enumerate(zip(_labels(boards), boards)):
                    with gr.Tab(label):
                        _Board(gr, board, str(number))
    page.queue(default_concurrency_limit=_AT_ONCE)
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="",
        theme=_theme(gr),
        css=STYLES.read_text(encoding="utf-8"),
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        show_error=False,
    )


def _theme(gr: Any) -> Any:
    """Fonts of the machine itself, and texts of enough contrast in light and dark."""
    system = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(
        font=system, font_mono=["ui-monospace", "monospace"], primary_hue="blue", neutral_hue="slate"
    )
    subdued = {"body_text_color_subdued": "*neutral_600", "block_info_text_color": "*neutral_600"}
    buttons = {"button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700"}
    return theme.set(
        **subdued,
        **{f"{name}_dark": "*neutral_300" for name in subdued},
        **buttons,
        **{f"{name}_dark": value for name, value in buttons.items()},
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
    )


def _labels(boards: Sequence[Sequence[Model]]) -> List[str]:
    """A tab's name: the archive's, with the server's address where several serve one of that name."""
    names = [board[0].description.name for board in boards]
    return [
        name if names.count(name) == 1 else f"{name} at {board[0].url.rpartition('/')[2]}"
        for name, board in zip(names, boards)
    ]


class _Board:
    """The form and the answers of one model, or of several side by side."""

    def __init__(self, gr: Any, models: Sequence[Model], number: str) -> None:
        self._gr = gr
        self._models = models
        self._number = number
        own = models[0].description
        self._controls = form.controls([model.description for model in models], STARTING.get(own.task, {}))
        self._asked: Dict[str, threading.Event] = {}
        self._inputs: List[Any] = [None] * len(self._controls)
        self._infos = [control.info + _HINTS.get(control.kind, "") for control in self._controls]
        with gr.Row(elem_classes="ts-board"):
            with gr.Column(scale=2, min_width=320):
                self._form()
            with gr.Column(scale=3, min_width=320):
                self._answers()
        self._connect()

    def _form(self) -> None:
        gr, own = self._gr, self._models[0].description
        labels = f" Labels: {some(own.labels, 5)}." if own.labels else ""
        names = " and ".join(f"{model.description.name} {model.description.version}" for model in self._models)
        gr.Markdown(f"### {_plain(names)}\n{_plain(own.task)}. {_plain(own.about + labels)}")
        first = [
            n for n, control in enumerate(self._controls) if not control.is_parameter or control.value not in ("", None)
        ]
        for number in first:
            self._add(number)
        with gr.Row():
            self._ask = gr.Button("Ask", variant="primary", elem_id=self._id("ask"))
            # What each word added to the answer.
            explains = all(model.description.explains for model in self._models)
            self._explain = gr.Button("Explain", visible=explains, elem_id=self._id("explain"))
            self._stop = gr.Button("Stop", elem_id=self._id("stop"))
        more = [n for n in range(len(self._controls)) if n not in first]
        with gr.Accordion(f"{len(more)} more parameters", open=False, elem_id=self._id("more")) as self._more:
            for number in more:
                self._add(number)
        self._hidden = set(more)

    def _add(self, number: int) -> None:
        control = self._controls[number]
        shown = {
            "label": control.name,
            "info": self._infos[number],
            "value": control.value,
            "elem_id": self._id(control.key.replace(".", "-")),
        }
        self._inputs[number] = _COMPONENTS[control.kind](self._gr, control, shown)

    def _answers(self) -> None:
        gr = self._gr
        self._verdict = gr.HTML("", js_on_load=None, elem_id=self._id("verdict"))
        with gr.Row():
            self._panels = [
                gr.HTML(
                    '<p class="ts-facts">Nothing was asked yet.</p>', js_on_load=None, elem_id=self._id(f"answer-{i}")
                )
                for i in range(len(self._models))
            ]
        self._commands = [
            gr.Textbox(
                label="The same request as a command"
                + (f", {model.description.name}" if len(self._models) > 1 else ""),
                lines=2,
                max_lines=8,
                interactive=False,
                buttons=["copy"],
                visible=False,
                elem_id=self._id(f"command-{i}"),
                elem_classes="ts-command",
            )
            for i, model in enumerate(self._models)
        ]

    def _connect(self) -> None:
        gr = self._gr
        outputs = [self._verdict, *self._panels, *self._commands, *self._inputs, self._more]
        texts = [
            own
            for own, control in zip(self._inputs, self._controls)
            if control.kind in (form.TEXT, form.WORDS, form.NUMBER)
        ]
        # What is asked on one open page, and can be stopped there.
        visitor = gr.State(lambda: uuid.uuid4().hex)
        common = {
            "inputs": [visitor, *self._inputs],
            "outputs": outputs,
            "show_progress": "hidden",
            "concurrency_limit": _AT_ONCE,
            "api_visibility": "private",
            "trigger_mode": "always_last",
        }
        gr.on([self._ask.click, *(text.submit for text in texts)], self._answer, **common)
        self._explain.click(self._explanation, **common)
        self._stop.click(self._end, visitor, None, api_visibility="private", concurrency_limit=_AT_ONCE)

    def _end(self, visitor: str) -> None:
        """Wait no longer for what this visitor asks."""
        asked = self._asked.get(visitor)
        if asked is not None:
            asked.set()

    def _answer(self, visitor: str, *values: object) -> Iterator[Dict[object, object]]:
        """What changes on the page while the models answer."""
        yield from self._told_by(visitor, values, asking.PREDICTIONS)

    def _explanation(self, visitor: str, *values: object) -> Iterator[Dict[object, object]]:
        """What changes on the page while the models explain their answers."""
        yield from self._told_by(visitor, values, asking.EXPLANATIONS)

    def _told_by(self, visitor: str, values: Sequence[object], method: str) -> Iterator[Dict[object, object]]:
        self._asked[visitor] = stop = threading.Event()
        try:
            yield from self._answered(values, stop, method)
        finally:
            if self._asked.get(visitor) is stop:
                del self._asked[visitor]

    def _answered(self, values: Sequence[object], stop: threading.Event, method: str) -> Iterator[Dict[object, object]]:
        try:
            body = form.body(self._controls, values)
        except FormError as error:
            said = [asking.Heard(error=error.message, where=error.field, done=True) for _ in self._models]
            yield {**self._told({}, said), **self._at_fields(said)}
            return
        said = [asking.Heard() for _ in self._models]
        commands = [
            self._gr.update(value=asking.curl_command(model, body, method), visible=True) for model in self._models
        ]
        shown = dict(zip(self._commands, commands))
        yield {**self._told(body, said), **shown, **self._at_fields(said)}
        for said in asking.ask_each(self._models, body, stop, method):
            ended = all(heard.done for heard in said) and any(heard.error for heard in said)
            # The command again: a page that gets two states at once shows the last one alone.
            yield {**self._told(body, said), **shown, **(self._at_fields(said) if ended else {})}

    def _told(self, body: Dict[str, object], said: Sequence[asking.Heard]) -> Dict[object, object]:
        return {self._verdict: panels.verdict(said), **dict(zip(self._panels, panels.panels(self._models, body, said)))}

    def _at_fields(self, said: Sequence[asking.Heard]) -> Dict[object, object]:
        """Errors at the inputs that they are about, and none at the others."""
        errors = {form.control_at(self._controls, heard.where): heard.error for heard in said if heard.error}
        changed: Dict[object, object] = {}
        for number, own in enumerate(self._inputs):
            words = errors.get(number)
            told = self._infos[number] if words is None else f"⚠ {words}"
            changed[own] = self._gr.update(info=told, elem_classes=["ts-invalid"] if words else [])
        if self._hidden & set(errors):
            changed[self._more] = self._gr.update(open=True)
        return changed

    def _id(self, name: str) -> str:
        return f"board-{self._number}-{name}"


def _plain(text: str) -> str:
    """A text where Gradio reads Markdown."""
    return re.sub(r"[^\w\s.,;:()/-]", lambda found: f"&#{ord(found[0])};", text)


def _text(gr: Any, control: Control, shown: Dict[str, Any]) -> Any:
    several = control.kind != form.WORDS
    lines = 3 if several and (control.required or control.value) else 1
    return gr.Textbox(lines=lines, max_lines=12 if several else 1, placeholder=control.placeholder or None, **shown)


def _number(gr: Any, control: Control, shown: Dict[str, Any]) -> Any:
    """A text: a gr.Number that is empty turns into 0 when it is unfolded, and refuses in its own words what is beyond its
    limits."""
    return gr.Textbox(lines=1, max_lines=1, placeholder=control.placeholder, **shown)


def _choice(gr: Any, control: Control, shown: Dict[str, Any]) -> Any:
    return gr.Dropdown(list(control.choices), allow_custom_value=control.kind == form.OPEN, **shown)


_HINTS = {
    form.LINES: ". One a line",
    form.PAIRS: '. One a line, as "50: -100"',
    form.CHAT: '. Here a message begins with "user:", "assistant:" or "system:"',
}
_COMPONENTS: Dict[str, Callable[[Any, Control, Dict[str, Any]], Any]] = {
    form.TEXT: _text,
    form.WORDS: _text,
    form.LINES: _text,
    form.PAIRS: _text,
    form.CHAT: _text,
    form.NUMBER: _number,
    form.CHOICE: _choice,
    form.OPEN: _choice,
}
