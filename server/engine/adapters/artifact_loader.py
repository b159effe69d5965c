"""The load of one artifact: read it from the store, compile it for the base, and pack it in the layout of a slot."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactCorruptError
from adapters_store.format.folder import read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.storage.bucket import open_blobs
from server.model.precision import StorageDtypes
from server.model.slots.layout import PackedPatch, Sites, pack

DTYPE_OF_NAME = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class LoaderSetup(msgspec.Struct):
    """The store to read from, the base to compile for, and the dtypes to pack in (`str` of a torch dtype)."""

    store: str | None
    blobs: str
    spec: BaseSpec
    matrices: str
    others: str


class ArtifactLoader:
    """Loads artifacts for one base; usable in any process and any thread. Raises `StoreError` if there is no store."""

    def __init__(self, setup: LoaderSetup) -> None:
        self._blobs = open_blobs(setup.store, Path(setup.blobs))
        self._spec, self._sites = setup.spec, Sites(setup.spec)
        self._dtypes = StorageDtypes(DTYPE_OF_NAME[setup.matrices], DTYPE_OF_NAME[setup.others])

    def load(self, digest: str, folder: str | None) -> PackedPatch:
        """Load an artifact from a folder of the staging area, or from the store if that is None.

        Raises what the store and `compile_patch` raise, and `ArtifactCorruptError` if the folder holds another one.
        """
        artifact = self._blobs.read(digest) if folder is None else read_folder(Path(folder))
        if artifact.digest != digest:
            raise ArtifactCorruptError(f"the staged artifact {digest[:12]} is not what was checked")
        return pack(compile_patch(artifact, self._spec), self._sites, self._dtypes)
