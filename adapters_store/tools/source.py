"""Text of an answer as it comes, read by generators that wait where more text decides.

A reader yields while it waits. What it decides depends on the text and its end alone, never on how it was cut.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

OPEN = "([{"
OUTSIDE = re.compile(r"""["'(){}\[\],]""")
INSIDE = {quote: re.compile(rf"\\[\s\S]|{quote}") for quote in "\"'"}


class NoCallError(Exception):
    """The text is no call; it stays content."""


class TextSource:
    """The text that has come, and the place up to which it was read."""

    def __init__(self, text: str = "", is_over: bool = False) -> None:
        self.text, self.at, self.is_over = text, 0, is_over

    def push(self, text: str) -> None:
        """Append what has come."""
        self.text += text

    def forget(self) -> None:
        """Drop what was read; no reader may be on its way."""
        self.text, self.at = self.text[self.at :], 0

    def more(self) -> Reading[bool]:
        """Wait for more text; False if there is none."""
        length = len(self.text)
        while not self.is_over and len(self.text) == length:
            yield
        return len(self.text) > length

    def peek(self) -> Reading[str]:
        """Return the next character, or nothing at the end."""
        while self.at == len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def skip(self, characters: str = " \t\r\n") -> Reading[None]:
        """Read on over some characters."""
        while (next_one := (yield from self.peek())) and next_one in characters:
            self.at += 1

    def take(self, text: str) -> Reading[bool]:
        """Read a text, if it is what comes next."""
        while True:
            here = self.text[self.at : self.at + len(text)]
            if here == text:
                self.at += len(text)
                return True
            if not text.startswith(here) or not (yield from self.more()):
                return False

    def expect(self, text: str) -> Reading[None]:
        """Read a text. Raises `NoCallError` if another comes."""
        if not (yield from self.take(text)):
            raise NoCallError

    def word(self) -> Reading[str]:
        """Read the name of a function or an argument. Raises `NoCallError` if there is none."""
        begin = self.at
        while (next_one := (yield from self.peek())) and (next_one.isalnum() or next_one in "_.-"):
            self.at += 1
        if begin == self.at:
            raise NoCallError
        return self.text[begin : self.at]

    def until(self, text: str) -> Reading[str]:
        """Read up to a text, and over it. Raises `NoCallError` if it never comes."""
        begin = place = self.at
        while (found := self.text.find(text, place)) < 0:
            place = max(begin, len(self.text) - len(text) + 1)
            if not (yield from self.more()):
                raise NoCallError
        self.at = found + len(text)
        return self.text[begin:found]

    def brackets(self, opening: str, quotes: str) -> Reading[str]:
        """Read what stands in brackets, with these around it. Raises `NoCallError` if they do not close.

        Brackets in quotes are text.
        """
        first = yield from self.peek()
        if not first or first not in opening:
            raise NoCallError
        begin, place, nesting = self.at, self.at, Nesting(quotes)
        while True:
            found = nesting.next_mark(self.text, place)
            if found is None:
                place = max(place, len(self.text) - self.text.endswith("\\"))
                if not (yield from self.more()):
                    raise NoCallError
                continue
            place = found.end()
            nesting.pass_over(found[0])
            if not nesting.depth:
                self.at = place
                return self.text[begin:place]


class Nesting:
    """The brackets and the quote that are open at a place of a text; brackets in quotes are text."""

    def __init__(self, quotes: str) -> None:
        self._quotes, self._quote, self.depth = quotes, "", 0

    def next_mark(self, text: str, place: int) -> re.Match[str] | None:
        """Find the next bracket, quote or comma that counts."""
        return (INSIDE[self._quote] if self._quote else OUTSIDE).search(text, place)

    def pass_over(self, mark: str) -> bool:
        """Take note of a mark; tell whether it is a comma outside of brackets and quotes."""
        if self._quote:
            self._quote = "" if mark == self._quote else self._quote
        elif mark in "\"'":
            self._quote = mark if mark in self._quotes else ""
        elif mark != ",":
            self.depth += 1 if mark in OPEN else -1
        else:
            return not self.depth
        return False


def parts_of(text: str, quotes: str) -> Iterator[str]:
    """Cut a text at the commas outside of brackets and quotes; one at the end, as Python allows it, cuts nothing."""
    begin, place, nesting = 0, 0, Nesting(quotes)
    while (found := nesting.next_mark(text, place)) is not None:
        place = found.end()
        if nesting.pass_over(found[0]):
            yield text[begin : place - 1]
            begin = place
    if text[begin:].strip():
        yield text[begin:]


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `mark`, and not all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
