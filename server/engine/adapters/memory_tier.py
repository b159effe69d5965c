"""A tier of adapter memory with a byte budget: host memory, or the slots on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import inf


class MemoryTier:
    """Counts the bytes of the digests in a tier of `max_bytes`, least recently used first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used = max_bytes, 0
        self.sizes: OrderedDict[str, int] = OrderedDict()

    def add(self, digest: str, num_bytes: int) -> None:
        """Count a digest as the most recently used."""
        self.sizes[digest] = num_bytes
        self.used += num_bytes

    def pop(self, digest: str) -> None:
        """Free the bytes of a digest."""
        self.used -= self.sizes.pop(digest)

    def touch(self, digest: str) -> None:
        """Make a digest the most recently used, if it is in this tier."""
        if digest in self.sizes:
            self.sizes.move_to_end(digest)

    def victims(self, num_bytes: float, order: Mapping[str, int], is_kept: Callable[[str], bool]) -> list[str] | None:
        """List the digests to evict so that `num_bytes` more fit; None if evicting all that may go is not enough.

        Digests that are not in `order` (digest -> place among those wanted) go first, the least recently used before
        others, then those with the last places. `is_kept` tells which must stay.
        """
        missing = self.used + num_bytes - self.max_bytes
        chosen: list[str] = []
        for digest in sorted(self.sizes, key=lambda digest: -order.get(digest, inf)) if missing > 0 else ():
            if not is_kept(digest):
                chosen.append(digest)
                missing -= self.sizes[digest]
            if missing <= 0:
                break
        return chosen if missing <= 0 else None
