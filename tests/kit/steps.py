"""Count the steps of a call instead of its seconds: the same number on every machine, whatever else it does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

ROOMS = ("adapters_store.", "server.", "training.")


class CountedText(str):
    """A text that counts how often it is compared: a search in a list is no instruction of ours."""

    __slots__ = ()
    num_compared: ClassVar[int] = 0

    def __eq__(self, other: object) -> bool:
        """Compare as any text does."""
        CountedText.num_compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def count_steps(call: Callable[[], object]) -> int:
    """The bytecode instructions of our own code that a call runs, and the comparisons of `CountedText`."""
    num_steps, before = 0, CountedText.num_compared

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal num_steps
        if not frame.f_globals.get("__name__", "").startswith(ROOMS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        num_steps += event == "opcode"
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(outer)
    return num_steps + CountedText.num_compared - before
