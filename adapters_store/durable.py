"""Make files and folders durable with fsync."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Sync every file of a folder to disk, then the folder. Raises `OSError`."""
    for file in folder.iterdir():
        fsync(file)
    fsync(folder)


def fsync(path: Path) -> None:
    """Sync a file's bytes, or a directory's entries, to disk. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
