"""Make files and folders durable: fsync of a file and of a folder."""

from __future__ import annotations

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """fsync every file of a folder, then the folder."""
    for file in folder.iterdir():
        fsync(file)
    fsync(folder)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
