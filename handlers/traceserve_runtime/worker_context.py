"""What TorchServe's worker passes to a handler: its own class has no types, and is imported nowhere."""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, Optional, Protocol


class WorkerContext(Protocol):
    """The context of a model and of a batch, whose requests are numbered from 0. What not every version of TorchServe
    has is read by `getattr`."""

    @property
    def system_properties(self) -> Mapping[str, Any]:
        """The archive's folder as `model_dir`, the assigned GPU as `gpu_id`, and others."""
        ...

    @property
    def request_ids(self) -> Dict[int, str]:
        """The requests that TorchServe waits for."""
        ...

    def get_request_id(self, idx: int) -> str: ...

    def get_all_request_header(self, idx: int) -> Optional[Mapping[str, object]]:
        """Return a request's headers, and a record of each part under the part's name."""
        ...

    def set_response_header(self, idx: int, key: str, value: str) -> object: ...

    def set_response_status(self, code: int, phrase: str, idx: int) -> object: ...


class JoiningContext(WorkerContext, Protocol):
    """The same with continuousBatching: TorchServe asks of each body whether it ends its stream; None for no stream."""

    stopping_criteria: Dict[int, Callable[[bytes], Optional[bool]]]
