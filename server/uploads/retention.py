"""Keep artifacts that are in use, delete those that nothing refers to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

MAX_RECENTLY_DELETED = 4096  # far more than go between a request's resolution and its start


class InUse:
    """How many running requests wear each digest. An artifact goes only when the last one has ended."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @contextmanager
    def hold(self, digests: list[str]) -> Iterator[None]:
        """Keep digests while the block runs."""
        self._counts.update(digests)
        try:
            yield
        finally:
            self._counts.subtract(digests)
            self._counts += Counter()  # drops the zeros

    def is_held(self, digest: str) -> bool:
        """Whether some request wears it."""
        return digest in self._counts
