"""Loops whose steps write into the room behind their cache: equal to steps that make it anew."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, List, Optional, Tuple

import numpy as np
import pytest
import torch
import transformers
from conftest import reread, run_export
from traceserve.building.gate import verification
from traceserve.building.gate.texts import SENTENCES
from traceserve.building.writers.tracing import graphs
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes.graph import ATTENTION
from traceserve_runtime.runtimes.torchscript import attention, growing, reader, states
from traceserve_runtime.runtimes.torchscript.states import Copied, InPlace
from traceserve_runtime.tasks import TASKS

V4 = transformers.__version__.startswith("4.")
TASK = {
    "llama": "text_generation",  # groups of queries
    "gpt2": "text_generation",
    "bloom": "text_generation",
    **({} if V4 else {"qwen3.5": "text_generation"}),  # beside states of a fixed size
    "t5": "text2text_generation",
    "bart": "text2text_generation",
}
CAST = "aten::to("
Runners = Tuple[Any, Any]  # in place, and with copies


@pytest.fixture(scope="module")
def runners_of(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runners]:
    @lru_cache(maxsize=None)
    def make(architecture: str, dtype: str = "float32", wide: bool = False) -> Runners:
        folder = tmp_path_factory.mktemp("growing") / f"{architecture}-{dtype}-{wide}"
        source = checkpoint(architecture, TASKS[TASK[architecture]].auto_model)
        content = {"model_name": str(source), "task": TASK[architecture], "max_length": 64, "dtype": dtype}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verification, "TEXTS", SENTENCES[1:3])
            run_export(folder, content, allow_drift=True)
        manifest = Manifest.read(folder)
        in_place = reader.read(manifest, folder, "cpu")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(growing, "write_behind", lambda *_: None)
            copying = reader.read(manifest, folder, "cpu")
        return in_place, copying

    return make


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let caches be full every few steps."""
    monkeypatch.setattr(states, "_ROOM", 3)


@pytest.fixture(params=[3, 40])
def rooms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let caches be full every few steps, or never."""
    monkeypatch.setattr(states, "_ROOM", request.param)


class Loop:
    """Rows that one runner writes, with the same tokens as any other that is given the same calls."""

    def __init__(self, runner: Any, rows: int, length: int, seed: int) -> None:
        self.runner = runner
        self.random = np.random.default_rng(seed)
        self.ids = self.random.integers(5, 100, (rows, length))
        self.mask = np.ones_like(self.ids)
        self.mask[0, : length // 2] = 0
        self.decodes = "decoder_input_ids" in runner._manifest.step_inputs
        self.state = runner.start({"input_ids": self.ids, "attention_mask": self.mask})
        self.found: List[np.ndarray] = []
        new = np.full((rows, 1), 1) if self.decodes else self.ids
        self._run(new, None)

    def step(self, rows: Optional[List[int]] = None) -> None:
        chosen = None if rows is None else np.array(rows)
        if chosen is not None:
            self.mask = self.mask[chosen]
        if not self.decodes:
            self.mask = np.concatenate([self.mask, np.ones_like(self.mask[:, :1])], axis=1)
        self._run(self.random.integers(5, 100, (len(self.mask), 1)), chosen)

    def _run(self, new: np.ndarray, rows: Optional[np.ndarray]) -> None:
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -new.shape[1] :]
        inputs = {"input_ids": new, "decoder_input_ids": new, "attention_mask": self.mask, "position_ids": positions}
        outputs, self.state = self.runner.step(inputs, self.state, rows)
        self.found.append(outputs["logits"])

    def absorb(self, other: Loop) -> None:
        length = max(self.mask.shape[1], other.mask.shape[1])
        self.state = self.runner.join([self.state, other.state], length)
        self.mask = np.concatenate([np.pad(m, ((0, 0), (length - m.shape[1], 0))) for m in (self.mask, other.mask)])

    def shorten(self, length: int) -> None:
        self.state = self.runner.join([self.state], length)
        self.mask = self.mask[:, -length:]


def written(runner: Any, seed: int) -> Iterator[np.ndarray]:
    """Yield the logits of steps, of rows that leave, change places and are doubled, and for decoders of joined ones."""
    one, two = Loop(runner, 3, 9, seed), Loop(runner, 2, 4, seed + 1)
    for rows in (None, None, None, None, None, [0, 2], None, [1, 0], [1, 1, 0], None, None, None, None):
        one.step(rows)
        two.step()
    if not one.decodes:
        one.absorb(two)
        for rows in (None, [4, 0, 2], None, None, None, None, None):
            one.step(rows)
        one.shorten(12)
        for rows in (None, None, [2, 1], None):
            one.step(rows)
        three = Loop(runner, 1, 3, seed + 2)
        three.step()
        one.absorb(three)  # in the room of one that has left
        for rows in (None, [2, 1], None, [1], None):
            one.step(rows)
        long = Loop(runner, 1, 17, seed + 3)
        one.absorb(long)
        for rows in (None, None, [1, 0], None):
            one.step(rows)
    yield from one.found
    yield from two.found


@pytest.mark.usefixtures("rooms")
@pytest.mark.parametrize("architecture", TASK)
def test_every_step_is_equal(architecture: str, runners_of: Callable[..., Runners]) -> None:
    in_place, copying = runners_of(architecture)
    assert isinstance(in_place._states, InPlace) and isinstance(copying._states, Copied)
    pairs = list(zip(written(in_place, 0), written(copying, 0)))
    assert len(pairs) > 20
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, atol=1e-6)  # products of other memory layouts round differently


def begin_of(loop: Loop) -> List[int]:
    return [tensor.untyped_storage().data_ptr() for tensor in loop.state]


def test_rows_leave_and_join_among_the_others(
    runners_of: Callable[..., Runners], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "_ROOM", 40)
    runner = runners_of("llama")[0]
    loop = Loop(runner, 4, 9, 0)
    kept = begin_of(loop)
    loop.step([0, 3, 2])  # the last takes the position of one that has left
    loop.absorb(Loop(runner, 1, 4, 1))
    loop.shorten(8)  # the longest has left
    loop.step([3, 1, 2])
    loop.absorb(Loop(runner, 1, 10, 2))  # longer, as the longest was
    loop.step()
    assert begin_of(loop) == kept
    loop.step([3, 2, 1, 0])  # all move
    assert begin_of(loop) != kept


def test_a_step_copies_nothing_while_there_is_room(
    runners_of: Callable[..., Runners], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "_ROOM", 8)
    loop = Loop(runners_of("llama")[0], 2, 5, 0)
    pointers = []
    for _ in range(20):
        loop.step()
        pointers.append([tensor.data_ptr() for tensor in loop.state])
    changes = [i for i in range(1, 20) if pointers[i] != pointers[i - 1]]
    assert len(changes) == 2 and changes[1] - changes[0] == 9  # with one new position, and room for eight more
    loop = Loop(runners_of("llama")[1], 2, 5, 0)
    before = [tensor.data_ptr() for tensor in loop.state]
    loop.step()
    assert before != [tensor.data_ptr() for tensor in loop.state]


@pytest.mark.usefixtures("rooms")
@pytest.mark.parametrize("wide", [False, True])
def test_bfloat16_is_kept_where_attention_is_in_float32_too(
    runners_of: Callable[..., Runners], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "sooner_wide", lambda: wide)
    in_place, copying = runners_of("llama", "bfloat16", wide)
    for got, expected in zip(written(in_place, 0), written(copying, 0)):
        np.testing.assert_array_equal(got, expected)
    assert {tensor.dtype for tensor in Loop(in_place, 2, 5, 0).state} == {torch.bfloat16}
    graph = str(in_place._module.step.graph)
    assert str(copying._module.step.graph).count(CAST) == graph.count(CAST)
    read = [
        value.node() for node in in_place._module.step.graph.findAllNodes(ATTENTION, True) for value in node.inputs()
    ]
    if wide:
        read = [node.inputsAt(0).node() for node in read if node.kind() == "aten::to"]
    assert sum(node.kind() == "aten::as_strided" for node in read) == 4


class Step(torch.nn.Module):
    """A step's graph with one tensor of a cache; `made` makes its successor."""

    def __init__(self, made: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.made = made

    def forward(self, new: torch.Tensor, past: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return new.sum(), self.made(past, new)


@pytest.mark.parametrize(
    ("made", "grows"),
    [
        (lambda past, new: torch.cat([past, new], 2), True),
        (lambda past, new: torch.cat([past, new], -2), True),
        (lambda past, new: torch.cat([new, past], 2), False),
        (lambda past, new: torch.cat([past, new.expand_as(past)], 1), False),
        (lambda past, new: torch.cat([past, new, new], 2), False),
        (lambda past, new: torch.cat([past, new], 2)[:, :, -4:], False),
        (lambda past, new: past * 2, False),
    ],
)
def test_only_a_cache_that_grows(made: Any, grows: bool, tmp_path: Path) -> None:
    new, past = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 5, 4)
    module = reread(graphs.together({"step": graphs.trace(Step(made), (new, past))}), tmp_path)
    manifest: Any = SimpleNamespace(step_inputs=("new",), outputs=("logits",), runtime={})
    kept = growing.write_behind(module, manifest)
    assert kept == ((None,) if grows else None)
    if kept is None:
        assert torch.equal(module.step(new, past)[1], made(past, new))
        return
    [roomy] = InPlace(kept).before((past,), 1, None)
    assert torch.equal(module.step(new, roomy)[1], made(past, new))


def test_what_is_behind_joined_rows_is_never_read() -> None:
    kept = InPlace((None,))
    short, long = torch.randn(1, 2, 2, 4), torch.randn(2, 2, 6, 4)
    [joined] = kept.join([(short,), (long,)], 5)
    assert joined.shape == (3, 2, 5, 4)
    assert torch.equal(joined[0, :, 3:], short[0]) and not joined[0, :, :3].any()
    assert torch.equal(joined[1:], long[:, :, 1:])
