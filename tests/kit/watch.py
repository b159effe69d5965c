"""What a piece of code touches, files, connections and processes, and what it costs."""

from __future__ import annotations

import os
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class")
PATHS = ("open", "os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.listdir", "os.scandir", "os.chmod")


@dataclass
class Touched:
    """`paths` that were opened, listed or changed; `events` that must not be; seconds of CPU and bytes."""

    paths: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0
    peak_bytes: int = 0

    def outside(self, *roots: Path) -> list[str]:
        """The paths below none of the roots."""
        allowed = [str(root.resolve()) for root in roots]
        return [path for path in self.paths if not any(path == root or path.startswith(f"{root}/") for root in allowed)]


_watching: list[Touched] = []  # an audit hook cannot be taken away: there is one, which asks who watches
_hooked: list[bool] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in FORBIDDEN:
        _watching[-1].events.append(f"{event} {args!r}"[:200])
    elif event in PATHS:
        _watching[-1].paths += [os.path.realpath(os.fsdecode(arg)) for arg in args[:2] if _is_path(arg)]


def _is_path(arg: object) -> bool:
    return isinstance(arg, str | bytes | os.PathLike) and arg not in ("r", "w", "rb", "wb", "x", "a", "r+")


@contextmanager
def watched(has_memory: bool = False) -> Iterator[Touched]:
    """Watch what this process does while the block runs; `has_memory` measures Python's allocations, which is slow."""
    if not _hooked:
        _hooked.append(True)
        sys.addaudithook(_hook)
    touched, began = Touched(), time.thread_time()
    if has_memory:
        tracemalloc.start()
    _watching.append(touched)
    try:
        yield touched
    finally:
        _watching.pop()
        touched.cpu_seconds = time.thread_time() - began
        if has_memory:
            touched.peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
