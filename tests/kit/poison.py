"""Rows that raise at every place of a step: the places are found by watching one, and each raises for one sequence.

`Poison` makes a function of the source raise as soon as it is called for what is meant, by the interpreter's hook for
calls: nothing is replaced, so that a new function is a new place by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

from server.core import Row
from server.engine.messages import Submit
from server.engine.sequence import Sequence

ROOT = Path(__file__).parents[2]
Meant = Callable[[FrameType], bool]
Of = Row | Sequence | Submit


class PoisonError(RuntimeError):
    """What a poisoned place raises."""


class Poison:
    """A place that raises for what is meant; in the thread that arms it, and until the first raise after that."""

    def __init__(self, place: CodeType, is_meant: Meant) -> None:
        self.place, self.is_meant, self.num_raised = place, is_meant, 0

    def arm(self) -> None:
        """Raise from now on; what raises disarms it."""
        sys.setprofile(self._look)

    def _look(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code is self.place and self.is_meant(frame):
            self.num_raised += 1
            raise PoisonError(name_of(self.place))


@contextmanager
def armed(poison: Poison) -> Iterator[Poison]:
    """Arm a poison while the block runs."""
    poison.arm()
    try:
        yield poison
    finally:
        sys.setprofile(None)


@contextmanager
def watched_places(is_meant: Meant, *folders: str) -> Iterator[dict[CodeType, None]]:
    """The functions of some folders of the source that are called for what is meant while the block runs."""
    found: dict[CodeType, None] = {}
    roots = tuple(str(ROOT / folder) for folder in folders)

    def look(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event == "call" and code not in found and code.co_filename.startswith(roots) and is_meant(frame):
            found[code] = None

    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(None)


def name_of(place: CodeType) -> str:
    """The file and the name of a place."""
    return f"{Path(place.co_filename).relative_to(ROOT)}:{place.co_qualname}"


def is_for(first_token: int, but_not_in: Collection[str] = ()) -> Meant:
    """Whether a call is made for a sequence whose prompt begins with a token.

    A call is for what its arguments are, or those of the nearest caller that has a row or sequence among its own; one
    that is made for many is for each. What functions of the names in `but_not_in` call is not meant.
    """

    def is_meant(frame: FrameType) -> bool:
        here: FrameType | None = frame
        while here is not None:
            if found := _subjects(here):
                return any(_first_token(one) == first_token for one in found) and not is_within(here)
            here = here.f_back
        return False

    def is_within(frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code.co_qualname not in but_not_in:
            frame = frame.f_back
        return frame is not None

    return is_meant


def _subjects(frame: FrameType) -> list[Of]:
    """The rows and sequences among the arguments of a call: those that stand alone, or else those in lists."""
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    given = [frame.f_locals[name] for name in names if name in frame.f_locals]
    alone = [one for one in given if isinstance(one, Of)]
    return alone or [one for many in given if isinstance(many, list) for one in many if isinstance(one, Of)]


def _first_token(one: Of) -> int | None:
    match one:
        case Row():
            return one.history[0] if one.history else None
        case Submit():
            return one.prompt[0]
        case Sequence():
            return one.tokens[one.num_virtual]
