"""A stream's client gets one text, or a text that ends with an error."""

from __future__ import annotations

import json
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
from conftest import run_export
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import ModelFailure
from traceserve_runtime.protocols import huggingface
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.service import Call, Service
from traceserve_runtime.streaming import Stream
from traceserve_runtime.tasks.contract import Answer, WrittenToken
from transformer_handler import TransformerHandler


def told() -> Tuple[Stream, List[bytes]]:
    pieces: List[bytes] = []
    return Stream(pieces.append), pieces


def error_in(end: bytes) -> Dict[str, Any]:
    """Return the error in a stream's last line."""
    before, line, after = end.decode("utf-8").rsplit("\n", 2)
    assert not after
    error: Dict[str, Any] = json.loads(line)["error"]
    assert set(error) == {"type", "message", "field"}
    return error


def test_a_text_that_begins_anew_and_is_the_same_is_told_once() -> None:
    one, pieces = told()
    for text in ("One", "One, two", "", "One", "One, two", "One, two, three"):
        one.tell(text)
    assert b"".join(pieces) + one.rest("One, two, three, four") == b"One, two, three, four"


@pytest.mark.parametrize("anew", ["Six", "Six, seven, eight, nine", "One, six, seven, eight"])
def test_a_text_that_begins_anew_and_is_another_is_an_error(anew: str) -> None:
    """Even if only the whole text, or a longer part of it, shows that; and another call's continues."""
    (one, pieces), (other, _) = told(), told()
    one.tell("One, two")
    other.tell("Un")
    for text in (anew[:2], anew, f"{anew}, ten"):
        one.tell(text)
    assert pieces == [b"One, two"]
    with pytest.raises(ModelFailure, match="began another text"):
        one.rest(f"{anew}, ten")
    assert other.rest("Un, deux") == b", deux"


def test_nothing_told_is_nothing_to_take_back() -> None:
    one, pieces = told()
    one.tell("")
    assert not one.started and not pieces and one.rest("One") == b"One"


def token(number: int) -> WrittenToken:
    return WrittenToken(number, -0.5)


def events(sent: bytes) -> List[Dict[str, Any]]:
    return [json.loads(each[len(b"data:") :]) for each in sent.split(b"\n\n") if each]


def held() -> Tuple[Stream, List[bytes]]:
    """A stream whose format holds the first token back."""
    pieces: List[bytes] = []
    return Stream(pieces.append, huggingface._Tokens("")), pieces


def test_what_is_held_back_is_not_sent() -> None:
    one, pieces = held()
    one.tell("One", [token(1)])
    assert not one.started and not pieces
    one.tell("One, two", [token(1), token(2)])
    assert one.started and [each["token"]["text"] for each in events(b"".join(pieces))] == ["One"]


@pytest.mark.parametrize("grows", [False, True])
def test_another_text_begins_anew_while_nothing_was_sent(grows: bool) -> None:
    one, pieces = held()
    one.tell("One", [token(1)])
    if grows:
        one.tell("Six", [token(6)])
        assert not pieces
        one.tell("Six, seven", [token(6), token(7)])
        assert one.started
    tokens = [{"id": number, "logprob": -0.5, "special": False} for number in (6, 7)]
    last = one.rest("Six, seven", Answer("Six, seven", details={"tokens": tokens}))
    found = events(b"".join([*pieces, last]))
    assert [each["token"]["id"] for each in found] == [6, 7]
    assert "".join(each["token"]["text"] for each in found) == "Six, seven" == found[-1]["generated_text"]


def test_a_retry_that_is_the_same_text_sends_what_was_held_once() -> None:
    one, pieces = held()
    for text, numbers in (("One", [1]), ("", []), ("One", [1]), ("One, two", [1, 2]), ("One, two, three", [1, 2, 3])):
        one.tell(text, [token(number) for number in numbers])
    assert [(each["token"]["id"], each["token"]["text"]) for each in events(b"".join(pieces))] == [
        (1, "One"),
        (2, ", two"),
    ]


class Context:
    """TorchServe's context, as far as the handler uses it here."""

    metrics = None

    def __init__(self) -> None:
        self.statuses: Dict[int, int] = {}
        self.headers: Dict[Tuple[int, str], str] = {}

    def get_all_request_header(self, index: int) -> Dict[str, str]:
        return {"Content-Type": "application/json"}

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.statuses[index] = code

    def set_response_header(self, index: int, key: str, value: str) -> None:
        self.headers[index, key] = value


class Failing:
    """A runner that fails at some of its steps."""

    def __init__(self, own: Any, fails: Callable[[int], bool]) -> None:
        self._own, self._fails, self._steps = own, fails, 0

    def step(self, *inputs: Any) -> Any:
        self._steps += 1
        if self._fails(self._steps):
            raise RuntimeError("not enough memory")
        return self._own.step(*inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


@pytest.fixture(scope="module")
def engine(checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("streaming") / "gpt2"
    run_export(folder, {"model_name": str(checkpoint("gpt2", "AutoModelForCausalLM")), "max_length": 64})
    return Engine.load(folder)


def stream(engine: Engine, fails: Callable[[int], bool], seed: Optional[int]) -> Tuple[bytes, bytes, Context]:
    """Return what a client gets while the text grows, and at the end."""
    handler, pieces, context = TransformerHandler(), [], Context()
    handler.engine = Engine(engine.folder, engine.manifest, engine.task, Failing(engine.runner, fails))
    parameters = {"stream": True, "max_new_tokens": 40, "do_sample": True, "temperature": 5.0, "top_k": 0}
    if seed is not None:
        parameters["seed"] = seed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformer_handler._send_piece", lambda context, row, piece, headers: pieces.append(piece))
        body = {"text": "The train to", "parameters": parameters}
        [end] = handler.handle([{"body": body}], context)
    return b"".join(pieces), end, context


def test_a_failed_step_splices_no_two_texts(engine: Engine) -> None:
    """The same seed repeats the text; without one it differs, and the stream says so."""
    whole = b"".join(stream(engine, lambda step: False, 3)[:2])
    again = b"".join(stream(engine, lambda step: step == 15, 3)[:2])
    assert again == whole and len(whole) > 40
    drawn = [stream(engine, lambda step: step == 15, None) for _ in range(8)]
    failed = [each for each in drawn if each[0] and each[1].startswith(b"\n")]
    assert failed  # by chance a text may end before that step, or not have been sent yet
    for _, end, context in failed:
        assert error_in(end)["type"] == "ModelFailure"
        assert context.headers[0, "content-type"].startswith("text/plain")


def test_a_stream_that_began_another_text_is_counted_as_failed(engine: Engine) -> None:
    failing = Engine(engine.folder, engine.manifest, engine.task, Failing(engine.runner, lambda step: step == 15))
    parameters = {"stream": True, "max_new_tokens": 40, "do_sample": True, "temperature": 5.0, "top_k": 0}
    call = Call({"body": {"text": "The train to", "parameters": parameters}}, Headers("application/json"))
    failed = []
    for _ in range(8):
        stats = Stats()
        [reply] = Service(failing, "small").answer([call], stats, lambda i, piece, headers: None)
        if b"began another text" in reply.body:
            failed.append(stats.errors)
    assert failed and all(errors == {"ModelFailure": 1} for errors in failed)


def test_a_stream_that_fails_for_good_ends_with_the_error(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    pieces, end, context = stream(engine, lambda step: step >= 15, 3)
    assert pieces and end.startswith(b"\n")
    assert error_in(end) == {
        "type": ModelFailure.__name__,
        "message": "the model failed on this input: not enough memory",
        "field": None,
    }
    assert context.headers[0, "content-type"].startswith("text/plain")
    assert caplog.text.count("traceserve: RuntimeError in 1 of 1 requests") == 1


def test_a_stream_that_never_began_is_an_error_like_others(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    pieces, end, context = stream(engine, lambda step: True, 3)
    assert not pieces and json.loads(end)["error"]["type"] == "ModelFailure"
    assert context.statuses == {0: 500}
    assert caplog.text.count("traceserve: RuntimeError in 1 of 1 requests") == 1
