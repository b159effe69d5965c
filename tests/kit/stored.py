"""Artifacts in a store without a server: what an upload would have put there."""

from __future__ import annotations

import shutil
from pathlib import Path

from adapters_store.format.folder import read_folder
from adapters_store.storage.directory import Blobs


def store(blobs: Blobs, folder: Path) -> str:
    """Put an artifact into the store; its digest."""
    digest = read_folder(folder).digest
    with blobs.staging() as area:
        shutil.copytree(folder, area / "artifact")
        blobs.put(area / "artifact", digest)
    return digest
