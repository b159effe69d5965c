"""Find the folder in which bases and compiled kernels are kept, also if the usual one cannot be written."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "MANYHATS_CACHE"  # `--cache`; a server's other processes inherit it


@dataclass(frozen=True)
class CacheFolder:
    """A folder to write to; None if there is none. `refused` is the one that was meant, if that cannot be written."""

    folder: Path | None
    refused: Path | None = None


def default_cache() -> Path:
    """Return the folder that MANYHATS_CACHE names, else ~/.cache/manyhats."""
    return Path(os.environ.get(VARIABLE) or home_cache())


def home_cache() -> Path:
    """Return ~/.cache/manyhats, of a user without a home the folder that stands in for it."""
    try:
        return Path.home() / ".cache" / "manyhats"
    except RuntimeError:
        return _spare()


def writable(cache: Path, part: str) -> CacheFolder:
    """Return a part of a cache, or the same part of a folder of this user's alone in the temporary folder."""
    if is_writable(cache / part):
        return CacheFolder(cache / part)
    spare = _spare()
    return CacheFolder(spare / part if _is_private(spare) and is_writable(spare / part) else None, cache / part)


def is_writable(folder: Path) -> bool:
    """Make a folder, if it is not there, and tell whether a file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _spare() -> Path:
    return Path(tempfile.gettempdir()) / f"manyhats-{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """Make a folder of this user's alone, or tell that it is another's: what lies there is loaded as code."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        return found.st_uid == os.getuid() and found.st_mode & 0o777 == 0o700 and not folder.is_symlink()
    except OSError:
        return False
