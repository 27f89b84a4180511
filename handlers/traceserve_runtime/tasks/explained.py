"""A task whose answers are explained: the parameters that choose what of them, and how."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple, Type

from traceserve_runtime.errors import InvalidRequest, NotOffered
from traceserve_runtime.explaining.answers import METHODS
from traceserve_runtime.explaining.integrated_gradients import MOST_STEPS, STEPS
from traceserve_runtime.tasks.contract import Request, Task
from traceserve_runtime.tasks.parameters import Parameter

LABEL = Parameter("label", str, "the label to explain; by default the answer's own")
START_PARAMETER = Parameter(
    "start", int, "the first character of what is explained; by default the answer's own", least=0
)
END_PARAMETER = Parameter("end", int, "the character behind what is explained; by default one behind start", least=1)
DOCUMENT = Parameter(
    "document", int, "the index of the document whose score is explained; by default the best", least=0
)
PARAMETERS: Tuple[Parameter, ...] = (
    Parameter(
        "method",
        str,
        "how: integrated_gradients, where the archive has the model's gradients, or occlusion, which hides words; by "
        "default the first that is possible",
        METHODS,
    ),
    Parameter(
        "steps",
        int,
        "points on the way from the text without its words to the text; for occlusion, the most groups of words to hide",
        least=2,
        most=MOST_STEPS,
        default=STEPS,
    ),
    Parameter(
        "seconds",
        float,
        "the most time that the explanation may take, waiting for predictions included; the server's explain_seconds "
        "are the default and the most",
        least=0.01,
        most=3600,
    ),
)


def label_index(label: str, labels: Sequence[str]) -> int:
    """Return a label's number; raises InvalidRequest if there is no such label."""
    if label not in labels:
        shown = ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
        raise InvalidRequest(f"there is no such label; there are {shown}", "parameters.label")
    return list(labels).index(label)


def asked_characters(request: Request) -> Optional[Tuple[int, int]]:
    """Return the characters [start, end) to explain, if the request names some; raises InvalidRequest."""
    start, end = (request.parameters.get(name) for name in (START_PARAMETER.name, END_PARAMETER.name))
    if start is None:
        if end is not None:
            raise InvalidRequest(
                "end is the character behind what begins at start, and there is no start", "parameters.end"
            )
        return None
    end = start + 1 if end is None else end
    if end <= start:
        raise InvalidRequest(f"end should be above start, {start:,}, and not {end:,}", "parameters.end")
    return start, end


def explained(task: Type[Task]) -> Type[Task]:
    """Return the task with the parameters of explanations beside its own; raises NotOffered if it has none."""
    if task.explains is None:
        raise NotOffered(
            f"answers of the task {task.name} are not explained; ask for a prediction at /predictions/NAME"
        )
    parameters = (*task.parameters, *task.explains, *PARAMETERS)
    return type(task.__name__, (task,), {"parameters": parameters, "__doc__": task.__doc__})
