"""Which rows run together: the plan is legal and the cheapest, and padding is removed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple

import numpy as np
import pytest
from conftest import Called
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from traceserve_runtime.batching import costs
from traceserve_runtime.batching.batches import Stats, filled, pad, run_batch, unpad
from traceserve_runtime.batching.costs import CostModel, Timing, fit_costs
from traceserve_runtime.batching.plan import MOST_BATCH_TOKENS, MOST_ROWS, plan_batches
from traceserve_runtime.manifest import Manifest, Shapes
from traceserve_runtime.runner import Arrays, Padding
from traceserve_runtime.texts.rows import Row

quick = settings(deadline=None, max_examples=50, database=None)

LEAST_RUN, MOST_RUN, MOST_ATTENTION = costs._LEAST_RUN, costs._MOST_RUN, costs._MOST_ATTENTION
MEASURED = [(1, 16), (4, 16), (1, 64), (16, 16), (4, 64), (1, 512)]  # the shapes that an engine times


def timings_of(cost: CostModel, seconds: float = 1e-5, noise: Sequence[float] = (1.0,) * 6) -> List[Timing]:
    """Return the durations of runs with this many seconds per token."""
    return [Timing(b, n, seconds * cost(float(b), n) * off) for (b, n), off in zip(MEASURED, noise)]


def fitted(cost: CostModel) -> CostModel:
    found = fit_costs(timings_of(cost))
    assert found is not None
    return found


COSTS = [
    CostModel(),
    CostModel(run=0.0),
    CostModel(run=1e6),
    CostModel(run=100.0, token=1.0, attention=1.0),
    # As fitted.
    fitted(CostModel(run=412.3, token=1.0, attention=0.0031)),
    fitted(CostModel(run=0.0, token=1.0, attention=0.0)),
    fitted(CostModel(run=1e9, token=1.0, attention=1e9)),
    CostModel(run=2000.0, token=1.0, attention=0.0),
    CostModel(run=17.25, token=1.0, attention=0.1),
    # With padding computed only in attention.
    CostModel(padding=Padding(0.1)),
    CostModel(run=17.25, token=1.8, attention=0.1, padding=Padding(0.0)),
]
SHAPES = [
    Shapes(),
    Shapes(lengths=(16, 64, 512)),
    Shapes(batches=(1, 2, 4)),
    Shapes(lengths=(64, 512), batches=(2, 8), graph_per_shape=True),
]
lengths_of_rows = st.lists(st.integers(1, 512), max_size=150)
few_lengths = st.lists(st.integers(1, 512) | st.integers(3000, 20000), min_size=1, max_size=7)


def cost_of(batches: Sequence[Sequence[int]], lengths: Sequence[int], shapes: Shapes, cost: CostModel) -> float:
    return sum(
        cost(shapes.batch(len(b)), shapes.length(max(lengths[i] for i in b)), sum(lengths[i] for i in b))
        for b in batches
    )


def is_allowed(
    batch: Sequence[int], lengths: Sequence[int], shapes: Shapes, most_tokens: int = MOST_BATCH_TOKENS
) -> bool:
    most = MOST_ROWS if shapes.batches is None else max(shapes.batches)
    longest = shapes.length(max(lengths[i] for i in batch))
    return len(batch) == 1 or (len(batch) <= most and len(batch) * longest <= most_tokens)


def partitions(items: List[int]) -> Iterator[List[List[int]]]:
    """Return every way to divide the items into batches, contiguous or not."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for i, batch in enumerate(smaller):
            yield [*smaller[:i], [first, *batch], *smaller[i + 1 :]]


@quick
@given(lengths=lengths_of_rows, shapes=st.sampled_from(SHAPES), cost=st.sampled_from(COSTS))
@example(lengths=[], shapes=Shapes(), cost=CostModel())
@example(lengths=[1] * 65, shapes=Shapes(), cost=CostModel(run=1e6))
@example(lengths=[512] * 33, shapes=Shapes(), cost=CostModel(run=1e6))
def test_a_plan_covers_every_row_once_in_sorted_order(lengths: List[int], shapes: Shapes, cost: CostModel) -> None:
    batches = plan_batches(lengths, shapes, cost)
    in_order = [i for batch in batches for i in batch]
    assert sorted(in_order) == list(range(len(lengths)))
    assert [lengths[i] for i in in_order] == sorted(lengths)
    assert all(batches)


@quick
@given(lengths=lengths_of_rows, shapes=st.sampled_from(SHAPES), cost=st.sampled_from(COSTS))
@example(lengths=[1] * 200, shapes=Shapes(), cost=CostModel(run=1e6))
@example(lengths=[512] * 64, shapes=Shapes(), cost=CostModel(run=1e6))
@example(lengths=[20000, 20000], shapes=Shapes(), cost=CostModel(run=1e6))
@example(lengths=[9] * 9, shapes=SHAPES[2], cost=CostModel(run=1e6))
def test_a_plan_keeps_the_limits(lengths: List[int], shapes: Shapes, cost: CostModel) -> None:
    assert all(is_allowed(batch, lengths, shapes) for batch in plan_batches(lengths, shapes, cost))


@quick
@given(
    lengths=lengths_of_rows,
    shapes=st.sampled_from(SHAPES),
    cost=st.sampled_from(COSTS),
    most_tokens=st.integers(1, 2 * MOST_BATCH_TOKENS),
)
@example(lengths=[5] * 9, shapes=Shapes(), cost=CostModel(run=1e6), most_tokens=20)
@example(lengths=[5] * 9, shapes=Shapes(), cost=CostModel(run=1e6), most_tokens=4)
def test_a_plan_keeps_a_tasks_own_limit(lengths: List[int], shapes: Shapes, cost: CostModel, most_tokens: int) -> None:
    batches = plan_batches(lengths, shapes, cost, most_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(is_allowed(batch, lengths, shapes, most_tokens) for batch in batches)


@pytest.mark.parametrize(("most_tokens", "sizes"), [(20, [1, 4, 4]), (24, [1, 4, 4]), (4, [1] * 9), (45, [9])])
def test_a_tasks_own_limit_cuts_what_would_run_together(most_tokens: int, sizes: List[int]) -> None:
    planned = plan_batches([5] * 9, Shapes(), CostModel(run=1e9), most_tokens)
    assert sorted(len(batch) for batch in planned) == sizes


@pytest.mark.parametrize(
    ("lengths", "shapes", "sizes"),
    [
        ([1] * 128, Shapes(), [64, 64]),
        ([512] * 64, Shapes(), [32, 32]),
        ([MOST_BATCH_TOKENS // 64] * 64, Shapes(), [64]),
        ([MOST_BATCH_TOKENS + 1] * 2, Shapes(), [1, 1]),
        ([5] * 8, Shapes(batches=(1, 4)), [4, 4]),
        ([5] * 100, Shapes(batches=(100,)), [100]),
        ([5] * 64, Shapes(lengths=(512,)), [32, 32]),
    ],
)
def test_where_a_run_is_dear_each_batch_is_as_large_as_is_allowed(
    lengths: List[int], shapes: Shapes, sizes: List[int]
) -> None:
    assert [len(batch) for batch in plan_batches(lengths, shapes, CostModel(run=1e9))] == sizes


def test_short_rows_do_not_pay_for_a_long_one() -> None:
    assert plan_batches([8] * 15 + [512], Shapes()) == [list(range(15)), [15]]


def test_rows_of_one_length_run_together() -> None:
    assert plan_batches([100] * 20, Shapes()) == [list(range(20))]


@quick
@given(lengths=lengths_of_rows.filter(bool), shapes=st.sampled_from(SHAPES), cost=st.sampled_from(COSTS))
@example(lengths=[8] * 15 + [512], shapes=Shapes(), cost=CostModel())
def test_a_plan_is_never_dearer_than_all_at_once_or_one_by_one(
    lengths: List[int], shapes: Shapes, cost: CostModel
) -> None:
    planned = cost_of(plan_batches(lengths, shapes, cost), lengths, shapes, cost)
    everything = list(range(len(lengths)))
    assert planned <= cost_of([[i] for i in everything], lengths, shapes, cost) * (1 + 1e-9)
    if is_allowed(everything, lengths, shapes):
        assert planned <= cost_of([everything], lengths, shapes, cost) * (1 + 1e-9)


@quick
@given(lengths=few_lengths, shapes=st.sampled_from(SHAPES), cost=st.sampled_from(COSTS))
def test_a_plan_is_as_cheap_as_the_best_of_all_partitions(lengths: List[int], shapes: Shapes, cost: CostModel) -> None:
    assume(shapes.lengths is None or max(lengths) <= max(shapes.lengths))
    legal = (p for p in partitions(list(range(len(lengths)))) if all(is_allowed(b, lengths, shapes) for b in p))
    best = min(cost_of(partition, lengths, shapes, cost) for partition in legal)
    assert cost_of(plan_batches(lengths, shapes, cost), lengths, shapes, cost) == pytest.approx(best, rel=1e-9)


def test_the_cost_is_of_the_run_its_tokens_and_its_attention() -> None:
    assert CostModel(run=3.0, token=2.0, attention=0.5)(4, 10) == 3 + 2 * 40 + 0.5 * 40 * 10


# Fitting the cost of a run to times


@quick
@given(
    run=st.floats(LEAST_RUN, MOST_RUN),
    attention=st.floats(0, MOST_ATTENTION),
    seconds=st.floats(1e-8, 1e-2),
    order=st.permutations(range(6)),
)
@example(run=30.0, attention=0.002, seconds=1e-5, order=[5, 4, 3, 2, 1, 0])
@example(run=100.0, attention=0.0, seconds=1e-5, order=[0, 1, 2, 3, 4, 5])
def test_exact_times_give_the_cost_that_made_them(
    run: float, attention: float, seconds: float, order: List[int]
) -> None:
    timings = timings_of(CostModel(run, 1.0, attention), seconds)
    found = fit_costs([timings[i] for i in order])
    assert found is not None and found.token == 1.0
    assert found.run == pytest.approx(run, rel=1e-4, abs=1e-3)
    assert found.attention == pytest.approx(attention, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("true", "taken"),
    [
        (CostModel(run=0.0, attention=0.0), CostModel(run=LEAST_RUN, attention=0.0)),
        (CostModel(run=3 * MOST_RUN, attention=0.01), CostModel(run=MOST_RUN, attention=0.01)),
        (CostModel(run=30.0, attention=1.0), CostModel(run=30.0, attention=MOST_ATTENTION)),
    ],
    ids=["no-run", "dear-run", "dear-attention"],
)
def test_what_no_machine_shows_is_bounded(true: CostModel, taken: CostModel) -> None:
    found = fit_costs(timings_of(true))
    assert found is not None
    assert (found.run, found.attention) == pytest.approx((taken.run, taken.attention), rel=1e-3, abs=1e-6)


@quick
@given(
    run=st.floats(2 * LEAST_RUN, MOST_RUN / 2),
    attention=st.floats(0.0005, MOST_ATTENTION / 2),
    noise=st.lists(st.floats(0.95, 1.05), min_size=6, max_size=6),
)
def test_times_that_are_off_by_some_percent_give_nearly_it(run: float, attention: float, noise: List[float]) -> None:
    """Similar predictions, which are all that a plan uses: up to a factor common to all runs."""
    true = CostModel(run, 1.0, attention)
    found = fit_costs(timings_of(true, noise=noise))
    assert found is not None
    ratios = [found(float(b), n) / true(float(b), n) for b, n in MEASURED]
    assert max(ratios) / min(ratios) < 1.25


@quick
@given(
    timings=st.lists(
        st.builds(Timing, st.integers(1, 64), st.integers(1, 512), st.floats(1e-6, 10)), min_size=3, max_size=8
    )
)
@example(timings=[Timing(1, 16, 1e-3)] * 3)
@example(timings=[Timing(1, 16, 1e-3), Timing(16, 1, 1e-3), Timing(4, 4, 1e-3)])
@example(timings=[Timing(1, 512, 1e-6), Timing(64, 512, 10.0), Timing(1, 1, 10.0)])
def test_whatever_was_measured_no_part_of_a_cost_is_below_nothing(timings: List[Timing]) -> None:
    found = fit_costs(timings)
    assert found is None or (
        found.token == 1.0 and LEAST_RUN <= found.run <= MOST_RUN and 0 <= found.attention <= MOST_ATTENTION
    )
    if found is not None:
        assert sorted(i for batch in plan_batches([3, 9, 50, 512], Shapes(), found) for i in batch) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_times_tell_nothing(count: int) -> None:
    assert fit_costs(timings_of(CostModel())[:count]) is None
    assert fit_costs(timings_of(CostModel())[:3]) is not None


@pytest.mark.parametrize("power", [0.01, 1.0], ids=["hardly", "as-the-size-grows"])
def test_times_that_fall_with_the_size_do_not_make_a_run_cheap(power: float) -> None:
    """Noise causes this if starting a run takes nearly all the time: then everything should run together."""
    found = fit_costs([Timing(b, n, 1e-3 * (b * n) ** -power) for b, n in MEASURED])
    assert found is None or found.run == MOST_RUN


def test_where_a_run_takes_most_of_the_time_it_is_dear() -> None:
    found = fit_costs([Timing(b, n, 1e-3 + 1e-8 * b * n) for b, n in MEASURED])
    assert found is not None and found.run == MOST_RUN
    assert plan_batches([8] * 15 + [16], Shapes(), found) == [list(range(16))]


# Allowed shapes


@pytest.mark.parametrize(
    ("step", "most", "lengths"),
    [
        (8, 32, (8, 16, 24, 32)),
        (10, 32, (10, 20, 30, 32)),
        (32, 32, (32,)),
        (33, 32, (32,)),
        (1000, 32, (32,)),
        (1, 4, (1, 2, 3, 4)),
        (31, 32, (31, 32)),
        (5, 1, (1,)),
    ],
)
def test_lengths_in_steps(step: int, most: int, lengths: Tuple[int, ...]) -> None:
    assert Shapes().stepped(step, most) == Shapes(lengths)
    assert Shapes(batches=(2, 4)).stepped(step, most) == Shapes(lengths, (2, 4))


@pytest.mark.parametrize("shapes", [Shapes((16, 64)), Shapes((64,), (1, 4), True)])
def test_lengths_that_a_model_holds_fast_stay(shapes: Shapes) -> None:
    assert shapes.stepped(8, 64) == shapes


@quick
@given(step=st.integers(1, 70), most=st.integers(1, 300), wanted=st.integers(1, 300))
def test_every_row_has_a_length_a_step_away_at_most(step: int, most: int, wanted: int) -> None:
    assume(wanted <= most)
    length = Shapes().stepped(step, most).length(wanted)
    assert wanted <= length <= most and length - wanted < step
    assert length % step == 0 or length == most


@pytest.mark.parametrize(
    ("batches", "held", "not_held"), [(None, [1, 64, 10_000], []), ((1, 4, 16), [1, 3, 16], [17, 64]), ((1,), [1], [2])]
)
def test_how_many_rows_may_run_together(
    batches: Optional[Tuple[int, ...]], held: List[int], not_held: List[int]
) -> None:
    shapes = Shapes(batches=batches)
    assert all(shapes.holds(rows) for rows in held) and not any(shapes.holds(rows) for rows in not_held)


@dataclass(frozen=True)
class FakeEncoding:
    """The parts of an encoding that are read."""

    ids: List[int]
    type_ids: List[int]
    attention_mask: List[int]


def make_row(length: int, first: int) -> Row:
    """Return a row whose ids count up from `first`, its second half of type 1."""
    types = [int(i >= length // 2) for i in range(length)]
    encoding = FakeEncoding(list(range(first, first + length)), types, [1] * length)
    return Row(encoding, length, length)  # type: ignore[arg-type]


ROWS = [make_row(3, 100), make_row(5, 200), make_row(1, 300)]


@pytest.fixture(scope="module")
def manifest(artifact: Path) -> Manifest:
    return Manifest.read(artifact)


def shaped(
    manifest: Manifest, side: str, lengths: Optional[Tuple[int, ...]] = None, batches: Optional[Tuple[int, ...]] = None
) -> Manifest:
    """Return the manifest with other shapes, padded on `side` with the id 9 and the type 7."""
    facts = replace(manifest.tokenizer, pad_id=9, pad_type_id=7, padding_side=side)
    return replace(manifest, tokenizer=facts, shapes=Shapes(lengths, batches))


def test_padding_on_the_right(manifest: Manifest) -> None:
    arrays, places = pad(ROWS, shaped(manifest, "right"))
    assert arrays["input_ids"].tolist() == [[100, 101, 102, 9, 9], [200, 201, 202, 203, 204], [300, 9, 9, 9, 9]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert arrays["token_type_ids"].tolist() == [[0, 1, 1, 7, 7], [0, 0, 1, 1, 1], [1, 7, 7, 7, 7]]
    assert places == [slice(0, 3), slice(0, 5), slice(0, 1)]


def test_padding_on_the_left(manifest: Manifest) -> None:
    arrays, places = pad(ROWS, shaped(manifest, "left"))
    assert arrays["input_ids"].tolist() == [[9, 9, 100, 101, 102], [200, 201, 202, 203, 204], [9, 9, 9, 9, 300]]
    assert arrays["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert arrays["token_type_ids"].tolist() == [[7, 7, 0, 1, 1], [0, 0, 1, 1, 1], [7, 7, 7, 7, 1]]
    assert places == [slice(2, 5), slice(0, 5), slice(4, 5)]


def test_the_inputs_are_the_models_own_in_its_order(manifest: Manifest) -> None:
    arrays, _ = pad(ROWS, replace(shaped(manifest, "right"), inputs=("attention_mask", "input_ids")))
    assert list(arrays) == ["attention_mask", "input_ids"]
    assert all(array.dtype == np.int64 for array in arrays.values())


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_fixed_length_is_padded_to(manifest: Manifest, side: str) -> None:
    arrays, places = pad(ROWS, shaped(manifest, side, lengths=(4, 8)))
    assert arrays["input_ids"].shape == (3, 8)
    assert [place.stop - place.start for place in places] == [3, 5, 1]
    assert [arrays["input_ids"][i, place].tolist() for i, place in enumerate(places)] == [
        row.encoding.ids for row in ROWS
    ]
    assert arrays["attention_mask"].sum() == 9


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_fixed_batch_is_filled_with_the_last_row(manifest: Manifest, side: str) -> None:
    arrays, places = pad(ROWS, shaped(manifest, side, batches=(2, 6)))
    assert len(places) == 3
    for array in arrays.values():
        assert array.shape == (6, 5)
        assert (array[3:] == array[2]).all()
    assert arrays["attention_mask"].any(axis=1).all()


def test_a_full_batch_is_not_filled(manifest: Manifest) -> None:
    arrays, _ = pad(ROWS, shaped(manifest, "right", batches=(3, 6)))
    assert arrays["input_ids"].shape == (3, 5)


rows = st.lists(st.integers(1, 12), min_size=1, max_size=8).map(
    lambda lengths: [make_row(length, 1000 * (i + 1)) for i, length in enumerate(lengths)]
)


@quick
@given(
    rows=rows,
    side=st.sampled_from(["left", "right"]),
    lengths=st.sampled_from([None, (4, 12), (32,)]),
    batches=st.sampled_from([None, (1, 3, 8), (10,)]),
)
def test_unpad_gives_each_row_its_own(
    manifest: Manifest,
    rows: List[Row],
    side: str,
    lengths: Optional[Tuple[int, ...]],
    batches: Optional[Tuple[int, ...]],
) -> None:
    arrays, places = pad(rows, shaped(manifest, side, lengths, batches))
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    outputs = {"tokens": np.stack([ids, ids], axis=-1), "sums": (ids * mask).sum(axis=1, keepdims=True)}
    parts = unpad(outputs, places, ["tokens"])
    assert len(parts) == len(rows)
    for row, part in zip(rows, parts):
        assert part["tokens"].tolist() == [[i, i] for i in row.encoding.ids]
        assert part["sums"].tolist() == [sum(row.encoding.ids)]


def echo(inputs: Arrays) -> Arrays:
    return {"logits": inputs["input_ids"][:, :1]}


def test_run_counts_what_was_computed(manifest: Manifest) -> None:
    stats = Stats()
    outputs = run_batch(Called(echo), ROWS, shaped(manifest, "right", lengths=(8,), batches=(4,)), [], stats)
    assert [output["logits"].tolist() for output in outputs] == [[100], [200], [300]]
    assert (stats.rows, stats.tokens, stats.padded_tokens, stats.micro_batches) == (3, 9, 32, 1)
    assert stats.padding_share == 1 - 9 / 32
    assert stats.model_seconds > 0


def test_runs_add_up(manifest: Manifest) -> None:
    stats = Stats()
    for _ in range(2):
        run_batch(Called(echo), ROWS, shaped(manifest, "left"), [], stats)
    assert (stats.rows, stats.tokens, stats.padded_tokens, stats.micro_batches) == (6, 18, 30, 2)
    assert stats.padding_share == pytest.approx(0.4)


def test_rows_of_one_length_have_no_padding(manifest: Manifest) -> None:
    stats = Stats()
    run_batch(Called(echo), [make_row(4, 1), make_row(4, 50)], shaped(manifest, "right"), [], stats)
    assert stats.padding_share == 0.0


def test_nothing_computed_is_nothing_padded() -> None:
    assert Stats().padding_share == 0.0


def test_a_run_that_fails_is_not_counted(manifest: Manifest) -> None:
    def broken(inputs: Arrays) -> Arrays:
        raise RuntimeError("broken")

    stats = Stats()
    with pytest.raises(RuntimeError, match="broken"):
        run_batch(Called(broken), ROWS, shaped(manifest, "right"), [], stats)
    assert stats == Stats()


def test_filled_rows_are_of_no_text_and_no_padding(manifest: Manifest) -> None:
    arrays = filled(shaped(manifest, "right"), 3, 7)
    assert list(arrays) == list(manifest.inputs)
    assert all(array.shape == (3, 7) and array.dtype == np.int64 for array in arrays.values())
    assert (arrays["input_ids"] == 9).all() and (arrays["attention_mask"] == 1).all()
    assert (arrays["token_type_ids"] == 0).all()
