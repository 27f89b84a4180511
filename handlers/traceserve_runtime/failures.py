"""The edge of one request: whatever it meets becomes an error of its own, and its neighbours are answered."""

from __future__ import annotations

import logging
import traceback
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, Sequence, Tuple, TypeVar, Union

from traceserve_runtime.errors import ModelFailure, TraceserveError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def contained(doing: str, act: Callable[[], Result]) -> Union[Result, TraceserveError]:
    """The result of `act`, or the error that it ends with."""
    try:
        with panics():
            return act()
    except TraceserveError as error:
        return error.with_traceback(None)  # whose frames hold what the request holds, until the batch is answered
    except Exception as error:  # the edge of one request
        return unexpected(error, doing)


@contextmanager
def panics() -> Iterator[None]:
    """Turn a panic of the package tokenizers into a RuntimeError, without its message, which may hold a text.

    pyo3, which connects Rust and Python, derives its PanicException from BaseException, and no module has it by name. Such
    a panic would end the worker.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError("the package tokenizers panicked").with_traceback(error.__traceback__) from None


def unexpected(error: Exception, doing: str) -> TraceserveError:
    """The answer to a request for which the worker failed; its message holds nothing of the request."""
    failure = TraceserveError(f"an unexpected error in the worker while {doing}; its log has the details")
    failure.__cause__ = error
    return failure


def of_the_model(error: Exception) -> ModelFailure:
    """The answer to a request on which the model failed: the last line of what it said, since the first is torch's own."""
    failure = ModelFailure(
        f"the model failed on this input: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"
    )
    failure.__cause__ = error
    return failure


def log(answers: Sequence[object]) -> None:
    """Log the types and tracebacks of what was not a client's fault, each kind once; no message, which may hold a text."""
    kinds: Dict[Tuple[str, str], List[TraceserveError]] = {}
    for answer in answers:
        if isinstance(answer, TraceserveError) and answer.status >= 500 and answer.__cause__ is not None:
            cause = answer.__cause__
            where = "".join(traceback.format_tb(cause.__traceback__))
            kinds.setdefault((type(cause).__name__, where), []).append(answer)
    for (name, where), failed in kinds.items():
        logger.error("traceserve: %s in %d of %d requests\n%s", name, len(failed), len(answers), where)
