"""Isolates requests: any exception becomes an error of one request, and the others are answered."""

from __future__ import annotations

import logging
import traceback
from types import TracebackType
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Type, TypeVar, Union

from traceserve_runtime.errors import ModelFailure, TraceserveError, last_reason

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def contained(doing: str, act: Callable[[], Result]) -> Union[Result, TraceserveError]:
    """Return the result of `act`, or its error."""
    try:
        with panics():
            return act()
    except TraceserveError as error:
        if error.__cause__ is None:  # else `log` needs the frames
            _drop_frames(error)
        return error.with_traceback(None)
    except Exception as error:  # the edge of one request
        return unexpected(error, doing)


def _drop_frames(error: Optional[BaseException]) -> None:
    """Drop the frames of an error and of those that led to it.

    They and their callers hold the request, and the error itself: all of it would stay in memory until a full garbage collection.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class panics:
    """Turn a panic of tokenizers into a RuntimeError, without its message, which may contain a text.

    pyo3, which connects Rust and Python, derives its PanicException from BaseException, and no module exports it. Such
    a panic would end the worker. (A class: a generator takes longer, for every token.)
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        if kind is not None and kind.__name__ == "PanicException":
            raise RuntimeError("the package tokenizers panicked").with_traceback(traceback) from None


def unexpected(error: BaseException, doing: str) -> TraceserveError:
    """Return the error for a request on which the worker failed; its message contains nothing of the request."""
    failure = TraceserveError(f"an unexpected error in the worker while {doing}; its log has the details")
    failure.__cause__ = error
    return failure


def not_a_number() -> ModelFailure:
    """Return the error for a request for which the model gave something other than numbers."""
    return ModelFailure("the model gave a value that is not a number (NaN or infinite) for this input")


def of_the_model(error: Exception) -> ModelFailure:
    """Return the error for a request on which the model failed: the last line of the message, since the first is
    torch's."""
    failure = ModelFailure(f"the model failed on this input: {last_reason(error)}")
    failure.__cause__ = error
    return failure


def log(answers: Sequence[object]) -> None:
    """Log the types and tracebacks of server errors, each kind once; no message, since it may contain a text. Then the
    tracebacks are dropped."""
    kinds: Dict[Tuple[str, str], List[TraceserveError]] = {}
    for answer in answers:
        if isinstance(answer, TraceserveError) and answer.status >= 500 and answer.__cause__ is not None:
            cause = answer.__cause__
            where = "".join(traceback.format_tb(cause.__traceback__))
            kinds.setdefault((type(cause).__name__, where), []).append(answer)
    for (name, where), failed in kinds.items():
        logger.error("traceserve: %s in %d of %d requests\n%s", name, len(failed), len(answers), where)
    for answer in answers:
        if isinstance(answer, TraceserveError):
            _drop_frames(answer)
