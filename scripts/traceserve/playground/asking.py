"""Asking models, one or several at once, and what they have said so far."""

from __future__ import annotations

import codecs
import http.client
import json
import queue
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from traceserve_hosts import KEY_VARIABLE
from traceserve_runtime.service import TRUNCATED_HEADER

from traceserve.errors import ServerError
from traceserve.playground.models import Model
from traceserve.serving import client
from traceserve.serving.curl import curl

_STREAMED = "text/plain"
_BETWEEN = 0.05  # seconds between two states of a growing text: a page need not show more
_PATIENCE = 0.2  # seconds, after which it is looked whether to stop
PREDICTIONS, EXPLANATIONS = "predictions", "explanations"  # what comes before a model's name in a path


@dataclass(frozen=True)
class Heard:
    """What a model has answered: JSON, or a text, which may still grow; or why it has not."""

    value: object = None
    unseen: Mapping[str, Tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0  # since it was asked
    first: float = 0.0  # of these, until the first piece of a text came
    pieces: int = 0  # of a text that is streamed: tokens, but where several make one character
    streamed: bool = False
    done: bool = False
    stopped: bool = False  # whether the rest was not waited for
    error: Optional[str] = None
    where: Optional[str] = None  # where in the body the error is


def ask(
    model: Model, body: Mapping[str, object], stopped: Callable[[], bool] = lambda: False, method: str = PREDICTIONS
) -> Iterator[Heard]:
    """The answer as it comes; the last one is `done`, whatever happens. Once `stopped`, no more is read."""
    begun = time.perf_counter()
    try:
        with client.post(model.address, model.path, dict(body), method=method) as response:
            unseen = json.loads(response.headers.get(TRUNCATED_HEADER) or "{}").get("0", {})
            heard = Heard(unseen={name: (start, end) for name, (start, end) in unseen.items()})
            if response.headers.get_content_type() == _STREAMED:
                yield from _streamed(response, heard, begun, stopped)
                return
            value = json.loads(response.read())
            yield replace(heard, value=value, seconds=time.perf_counter() - begun, done=True)
    except client.RequestRefused as error:
        yield _failed(error.words, error.field, begun)
    except ServerError as error:
        yield _failed(error.message, None, begun)
    except (OSError, ValueError, http.client.HTTPException) as error:
        yield _failed(f"the answer broke off: {error}", None, begun)


def _failed(words: str, where: Optional[str], begun: float) -> Heard:
    return Heard(error=words, where=where, seconds=time.perf_counter() - begun, done=True)


def _streamed(
    response: http.client.HTTPResponse, heard: Heard, begun: float, stopped: Callable[[], bool]
) -> Iterator[Heard]:
    """A text as it grows; each read gives one piece, which is one chunk of the response."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, first, told = "", 0.0, 0.0
    for pieces, piece in enumerate(iter(lambda: response.read1(1 << 16), b""), 1):
        now = time.perf_counter() - begun
        text += decoder.decode(piece)
        first = first or now
        heard = replace(heard, value=text, seconds=now, first=first, pieces=pieces, streamed=True)
        if stopped():
            yield replace(heard, done=True, stopped=True)
            return
        if now - told > _BETWEEN:
            told = now
            yield heard
    text, words, where = _ended(text)
    seconds = time.perf_counter() - begun
    yield replace(heard, value=text, seconds=seconds, streamed=True, done=True, error=words, where=where)


def _ended(text: str) -> Tuple[str, Optional[str], Optional[str]]:
    """The text of a stream, and the error that its last line is where it failed, with that one's field."""
    before, newline, line = text.rstrip("\n").rpartition("\n")
    try:
        error = json.loads(line)["error"] if newline and line.startswith('{"error"') else None
        return (text, None, None) if error is None else (before, str(error["message"]), error["field"])
    except (ValueError, KeyError, TypeError):
        return text, None, None


def ask_each(
    models: Sequence[Model], body: Mapping[str, object], stop: threading.Event, method: str = PREDICTIONS
) -> Iterator[List[Heard]]:
    """What all models have said so far, asked at once, each time that one says more; the last time all are `done`.

    Once `stop` is set, or this is closed, no more is read of their answers.
    """
    news: queue.Queue[Tuple[int, Heard]] = queue.Queue()

    def listen(number: int) -> None:
        for heard in ask(models[number], body, stop.is_set, method):
            news.put((number, heard))

    threads = [threading.Thread(target=listen, args=(number,), daemon=True) for number in range(len(models))]
    for thread in threads:
        thread.start()
    said = [Heard() for _ in models]
    try:
        while not all(heard.done for heard in said):
            try:
                number, heard = news.get(timeout=_PATIENCE)
            except queue.Empty:
                if stop.is_set():  # an answer that comes as a whole, and has not come
                    said = [heard if heard.done else replace(heard, done=True, stopped=True) for heard in said]
                    yield list(said)
                continue
            said[number] = heard
            yield list(said)
    finally:
        stop.set()


def curl_command(model: Model, body: Mapping[str, Any], method: str = PREDICTIONS) -> str:
    """The request as a curl command; a key is named in it, not shown."""
    options: List[str] = []
    if model.certificate:  # ours may be for another name than the machine's
        options += ["--insecure"] if model.any_name else ["--cacert", model.certificate]
    if dict(body.get("parameters") or {}).get("stream") is True:
        options.append("--no-buffer")
    whole = curl(f"{model.url}/{method}/{model.path}", body, *options)
    if not model.key:
        return whole
    program, rest = whole.split(" ", 1)
    return f'{program} -H "Authorization: Bearer ${KEY_VARIABLE}" {rest}'


def facts(heard: Heard) -> Dict[str, str]:
    """How long it took, in words, by what it is."""
    if heard.stopped:
        return {"stopped": f"after {heard.pieces:,} pieces"}
    found = {"latency": _milliseconds(heard.seconds)}
    if heard.streamed and heard.pieces:
        found["first piece after"] = _milliseconds(heard.first)
        writing = heard.seconds - heard.first
        if heard.pieces > 1 and writing > 0:
            found["speed"] = f"about {(heard.pieces - 1) / writing:,.0f} tokens/s"
    return found


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
