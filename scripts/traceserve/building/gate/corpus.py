"""Several hundred plain sentences, enough to distinguish few changed answers from none when judging a lower precision.

They are combined deterministically from parts: questions, wishes, complaints, reports and remarks of everyday life.
"""

from __future__ import annotations

from itertools import product
from typing import Iterator, Tuple

_THINGS = (
    ("my parcel", "is three days late"),
    ("the blue jacket", "does not fit"),
    ("the second invoice", "shows the wrong amount"),
    ("my new bank card", "was refused at the counter"),
    ("the train to the coast", "leaves from another platform"),
    ("the washing machine", "stops in the middle"),
    ("our hotel room", "looks out on a building site"),
    ("the payment of last Friday", "is still pending"),
    ("the app on my telephone", "asks for a code that never comes"),
    ("the garden behind the school", "has been flooded again"),
    ("this novel", "is far better than the film"),
    ("the soup of the day", "tastes of nothing but salt"),
    ("the exchange rate", "changed while I was paying"),
    ("my brother's passport", "expires in two weeks"),
    ("the concert in the old church", "sold out within an hour"),
    ("the new mayor", "promised lower rents before the election"),
)
_FRAMES = (
    "Why is it that {thing} {state}?",
    "{Thing} {state}, and nobody tells me why.",
    "I am writing because {thing} {state}. {wish}",
    "{wish} {Thing} {state}.",
    "Is it true that {thing} {state}, or did I misread that?",
    "hi, {thing} {state} :( {wish}",
    "{who} says that {thing} {state}, but I am not so sure.",
    "Last year nobody would have minded that {thing} {state}; today {who} calls it a scandal.",
)
_WISHES = (
    "Please send me a new one.",
    "Can I have my money back?",
    "What should I do now?",
    "Could somebody call me tomorrow morning?",
)
_OPENINGS = ("", "Good morning. ", "For the third time now: ", "Thanks for your help so far! ")
_WHO = ("Anna Kowalska of Gdansk", "The Times", "my neighbour", "Professor Okafor")


def sentences(count: int) -> Tuple[str, ...]:
    """Return the first `count` of 512 sentences, which rotate through frames and parts."""
    return tuple(text for _, text in zip(range(count), _all()))


def _all() -> Iterator[str]:
    for turn, ((thing, state), frame) in product(range(4), product(_THINGS, _FRAMES)):
        yield _OPENINGS[turn] + frame.format(
            thing=thing,
            Thing=thing[0].upper() + thing[1:],
            state=state,
            wish=_WISHES[turn],
            who=_WHO[(turn + len(thing)) % len(_WHO)],
        )
