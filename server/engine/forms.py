"""Forms: grammars that answers must fit, compiled beside the steps and asked in each step which tokens may follow.

What a hostile one costs is cut off (see `adapters_store.form`), and ends that sequence alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from llguidance import LLMatcher, LLTokenizer

from adapters_store.form import FormError, compile_grammar, error_of
from server.engine.adapters.load_queue import Spawner

T = TypeVar("T")
MAX_KEPT = 64  # compiled forms that are kept for the next sequence that has the same
MAX_FAST_FORWARD = 8  # tokens that follow a sampled one at once because the form allows no others


class FormMatcher:
    """A compiled form at its place in one answer, which ends at one of `ends` once it fits."""

    def __init__(self, matcher: LLMatcher, ends: Iterable[int]) -> None:
        self._matcher, self._ends = matcher, tuple(ends)
        self._mask: bytes | None = None  # of this place, once it is worked out

    def take(self, tokens: list[int]) -> None:
        """Go on over tokens of the answer, none of which ends it. Raises `FormError` if they do not fit."""
        self._mask = None
        if not self._matcher.consume_tokens(tokens):
            raise FormError(self._error("the answer does not fit its form"))

    def mask(self) -> bytes:
        """Say which tokens may follow, a bit each from the lowest up. Raises `FormError` if none may."""
        if self._mask is None:
            self._mask = self._next_mask()
        return self._mask

    def only_token(self) -> int | None:
        """Return the token that must follow; None if several may, or if none may, for which `mask` raises."""
        try:
            bits = int.from_bytes(self.mask(), "little")
        except FormError:
            return None
        return bits.bit_length() - 1 if bits.bit_count() == 1 else None

    def _next_mask(self) -> bytes:
        mask = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            raise FormError(self._error("the form is too complex at this place of the answer"))
        for token in self._ends if self._matcher.is_accepting() else ():
            mask[token // 8] |= 1 << token % 8
        if not any(mask):
            raise FormError("no token of the base fits the form at this place of the answer")
        return bytes(mask)

    def _error(self, otherwise: str) -> str:
        return error_of(self._matcher) or otherwise


@dataclass
class CompileResult(Generic[T]):
    """A form that was compiled for `owner`, or the reason why it could not be."""

    owner: T
    form: FormMatcher | None = None
    error: BaseException | None = None


class FormCompiler(Generic[T]):
    """Compiles forms in a spawner's thread, one at a time; `on_compiled` is called there after each.

    The spawner must have one thread alone: what is kept belongs to it.
    """

    def __init__(self, tokenizer: LLTokenizer, spawner: Spawner, on_compiled: Callable[[], None]) -> None:
        self._tokenizer, self._spawner, self._on_compiled = tokenizer, spawner, on_compiled
        self._results: SimpleQueue[CompileResult[T]] = SimpleQueue()
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()

    def start(self, owner: T, grammar: str, answered: list[int], ends: Iterable[int]) -> None:
        """Begin to compile a grammar for an answer of which the tokens `answered` are there already."""
        self._spawner.spawn(partial(self._run, owner, grammar, list(answered), frozenset(ends)))

    def results(self) -> Iterator[CompileResult[T]]:
        """Yield what was compiled since the last call."""
        try:
            while True:
                yield self._results.get_nowait()
        except Empty:
            return

    def _run(self, owner: T, grammar: str, answered: list[int], ends: frozenset[int]) -> None:
        result = CompileResult(owner)
        try:
            result.form = FormMatcher(self._matcher(grammar).deep_copy(), ends)
            result.form.take(answered)
        except BaseException as error:  # noqa: BLE001 - nothing that a request contains may end the thread
            result.error = error
        self._results.put(result)
        self._on_compiled()

    def _matcher(self, grammar: str) -> LLMatcher:
        """The compiled grammar at its beginning, which nobody moves."""
        if grammar not in self._kept:
            self._kept[grammar] = compile_grammar(self._tokenizer, grammar)
        self._kept.move_to_end(grammar)
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return self._kept[grammar]
