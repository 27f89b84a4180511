"""Our own protocol: a text, an object or a list, answered by the answer or a list of answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Sequence


class Model(NamedTuple):
    """What is served, as V2 names it in its answers."""

    name: str
    version: str


@dataclass(frozen=True)
class Plain:
    """Our own protocol."""

    is_list: bool

    def document(self, answers: Sequence[Any], model: Model) -> Any:
        """What the client gets for the answers to all that it asked."""
        return list(answers) if self.is_list else answers[0]

    def place(self, index: int, where: str, name: Optional[str]) -> Optional[str]:
        """The path in the client's body of the field `name` of the request `index`, which stands at `where`."""
        return ".".join(part for part in (where, name) if part) or None
