"""One place of bounded size where adapters are kept: host memory, or the slots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import inf


class MemoryTier:
    """Digests under a byte budget, least recently used first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0
        self.sizes: OrderedDict[str, int] = OrderedDict()

    def add(self, digest: str, num_bytes: int) -> None:
        """Take a digest in, as the last used."""
        self.sizes[digest] = num_bytes
        self.used += num_bytes

    def pop(self, digest: str) -> None:
        """Give a digest's bytes back."""
        self.used -= self.sizes.pop(digest)

    def touch(self, digest: str) -> None:
        """Make a digest the last used, if it is here."""
        if digest in self.sizes:
            self.sizes.move_to_end(digest)

    def victims(self, num_bytes: float, order: Mapping[str, int], is_kept: Callable[[str], bool]) -> list[str] | None:
        """Whom to evict so that `num_bytes` fit: first what is not wanted, then what is wanted last. None: no way."""
        missing = self.used + num_bytes - self.max_bytes
        chosen: list[str] = []
        for digest in sorted(self.sizes, key=lambda digest: -order.get(digest, inf)) if missing > 0 else ():
            if not is_kept(digest):
                chosen.append(digest)
                missing -= self.sizes[digest]
            if missing <= 0:
                break
        return chosen if missing <= 0 else None
