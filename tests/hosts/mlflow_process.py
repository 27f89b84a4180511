"""An MLflow model in a process that is its user's own, such as a notebook; `run.py` runs this with the servers' packages.

    python mlflow_process.py MODEL COPY

COPY is a copy of the model's folder.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import sys
from typing import Any, Callable, List, Sequence

import mlflow
import pandas
from mlflow.exceptions import INTERNAL_ERROR, INVALID_PARAMETER_VALUE, ErrorCode, MlflowException

TEXTS = [f"This is text {i}." for i in range(600)]  # more than a request may have
INHERITED: List[Any] = []
HALF_A_PAIR, NULL = "\ud800", "a\0b"


def refused(asking: Callable[[], object], code: int = INVALID_PARAMETER_VALUE) -> str:
    """Return what MLflow is told of a refusal."""
    try:
        asking()
    except MlflowException as error:
        assert error.error_code == ErrorCode.Name(code), error.error_code
        return str(error)
    raise AssertionError("nothing was refused")


def table(texts: Sequence[object]) -> Any:
    return pandas.DataFrame({"text": pandas.Series(texts, dtype=object)})


def check_rows(model: Any) -> None:
    """Any number of rows, each with the answer that it has alone; a wrong one is named by its number."""
    answers = model.predict(table(TEXTS))
    assert len(answers) == len(TEXTS) and len({answer["score"] for answer in answers}) > 1
    for i in (0, 255, 256, 599):
        [alone] = model.predict(table([TEXTS[i]]))
        assert answers[i]["label"] == alone["label"] and abs(answers[i]["score"] - alone["score"]) < 1e-5, i
    assert model.predict(table([])) == []
    told = refused(lambda: model.predict(table([*TEXTS[:299], NULL, *TEXTS[:100]])))
    assert told.endswith("(at [299].text)"), told


def check_parameters(model: Any) -> None:
    """Parameters are the task's own, and checked."""
    all_labels = model.predict(table(TEXTS[:2]), params={"top_k": 2})
    assert [len(answer) for answer in all_labels] == [2, 2], all_labels
    assert model.predict(table(TEXTS[:2]), params={"top_k": None}) == model.predict(table(TEXTS[:2]))
    assert "(at parameters.top_k)" in refused(lambda: model.predict(table(TEXTS[:1]), params={"top_k": 0}))
    told = refused(lambda: model.predict(table(["Yes.", NULL]), params={"top_k": 1}))
    assert told.endswith("(at inputs[1].text)"), told


def check_refusals(model: Any) -> None:
    """What the service refuses is a wrong value; what failed is not."""
    own = model.unwrap_python_model()
    assert refused(lambda: own.predict(None, [HALF_A_PAIR])).endswith(
        "half a surrogate pair at character 0 (at [0].text)"
    )
    assert "different numbers of values" in refused(lambda: own.predict(None, {"text": ["a"], "text_pair": ["b", "c"]}))
    answer, own._service.answer = own._service.answer, lambda calls: [_failure() for _ in calls]
    assert refused(lambda: own.predict(None, ["Yes."]), INTERNAL_ERROR) == "it broke"
    own._service.answer = answer


def _failure() -> Any:
    from traceserve_runtime.service import Reply

    return Reply(b'{"error": {"type": "ModelFailure", "message": "it broke"}}', status=500)


def check_copies(model: Any, expected: object) -> None:
    """Copies answer, here and in forked processes, which lack the model's thread."""
    for copied in (copy.deepcopy(model.unwrap_python_model()), pickle.loads(pickle.dumps(model.unwrap_python_model()))):
        assert copied.predict(None, TEXTS[:2]) == expected
    INHERITED.append(model)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(ask_inherited, [TEXTS[:2]] * 4).get(30) == [expected] * 4


def ask_inherited(texts: Sequence[object]) -> object:
    """Ask the model that a forked process has; as an argument it would be a copy."""
    return INHERITED[0].predict(table(texts))


def main(folder: str, copied: str) -> None:
    before = dict(os.environ)
    model, other = mlflow.pyfunc.load_model(folder), mlflow.pyfunc.load_model(copied)
    assert gc.get_freeze_count() == 0 and not {
        name for name in set(os.environ) - set(before) if name.startswith("OMP_")
    }
    expected = model.predict(table(TEXTS[:2]))
    assert other.predict(table(TEXTS[:2])) == expected
    check_rows(model)
    check_parameters(model)
    check_refusals(model)
    check_copies(model, expected)


if __name__ == "__main__":
    main(*sys.argv[1:])
