"""Import a tree of folders at start: each one that has an adapter, at any depth, becomes a task of its name.

No client waits for these checks, so a slow machine gets the time that it needs. What fails for a passing reason (the
engine restarts or is late, the store does not answer) is tried again in the background while the server runs; what is
refused for good is logged once, with the reason.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from adapters_store.errors import AbsentError, ArtifactError, RegistryDownError
from adapters_store.format.folder import CONFIG, find_parts, read_folder
from adapters_store.format.selection import describe_ignored, find_adapter, find_ignored
from adapters_store.registry import DEFAULT_TENANT
from server.errors import ServerError
from server.metrics import Metrics
from server.schemas import BASE, NAME_PATTERN
from server.uploads.service import FOLDER, UploadService, UploadSpec

log = logging.getLogger(__name__)

FIRST_LIMIT_S = 900.0  # of one adapter's probes before the server listens
RETRY_LIMIT_S = 30.0  # of one adapter's probes afterwards, in which uploads wait for them
FIRST_WAIT_S = 1.0
MAX_WAIT_S = 60.0
MAX_TRIES = 60  # of one folder: about an hour


class TreeImport:
    """The import of one tree; `num_pending` folders failed for a passing reason and are tried again."""

    def __init__(self, uploads: UploadService, metrics: Metrics) -> None:
        self._uploads, self._metrics, self.num_pending = uploads, metrics, 0

    @asynccontextmanager
    async def running(self, tree: Path | None) -> AsyncIterator[None]:
        """Import a tree, and try again in the background what is pending, while the block runs. Raises as `begin`."""
        pending = [] if tree is None else await self.begin(tree)
        retrying = asyncio.create_task(self.retry(pending), name="imports")
        try:
            yield
        finally:
            retrying.cancel()
            await asyncio.gather(retrying, return_exceptions=True)

    async def begin(self, tree: Path) -> list[Path]:
        """Make a task of every folder with an adapter that is none yet, by the checks of an upload.

        Bytes that a task had and lost are left out: they come back by an upload alone. Returns the folders to try
        again, see `retry`. Raises `NotADirectoryError` if `tree` is no folder of folders.
        """
        if not tree.is_dir():
            raise NotADirectoryError(f"{tree} is no folder: --import takes a folder of PEFT folders")
        if (tree / CONFIG).exists():
            raise NotADirectoryError(f"{tree} is an adapter: --import takes the folder around it")
        folders = sorted(folder for folder in tree.iterdir() if folder.is_dir())
        pending = [folder for folder in folders if not await self._is_settled(folder, FIRST_LIMIT_S)]
        self.num_pending = len(pending)
        return pending

    async def retry(self, pending: list[Path]) -> None:
        """Try the pending folders again, with a growing wait between two rounds, until all are settled or given up."""
        wait_s = FIRST_WAIT_S
        for num_tries in range(2, MAX_TRIES + 1):
            if not pending:
                return
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_WAIT_S)
            is_last = num_tries == MAX_TRIES
            left = []
            for folder in pending:
                self._metrics.retries.labels("import").inc()
                if await self._is_settled(folder, RETRY_LIMIT_S, is_last):
                    self.num_pending -= 1
                else:
                    left.append(folder)
            pending = left

    async def _is_settled(self, folder: Path, limit_s: float, is_last: bool = False) -> bool:
        """Try one folder. Returns True if it was imported, needs no import, or is refused for good."""
        try:
            await self._import_folder(folder, limit_s)
        except Exception as error:  # noqa: BLE001 - whatever a folder holds, the server starts
            where = {"folder": str(folder), "reason": str(error)}
            if _is_passing(error) and not is_last:
                log.warning("an adapter was not taken in yet; it is tried again", extra=where)
                return False
            log.error("an adapter was not taken in", extra=where)
        return True

    async def _import_folder(self, folder: Path, limit_s: float) -> None:
        adapter = await asyncio.to_thread(find_adapter, folder)
        if adapter is None:
            return
        task = folder.name.lower()
        if not re.fullmatch(NAME_PATTERN, task) or task == BASE:
            raise ArtifactError(f"{folder.name} is no task name ({NAME_PATTERN})")
        if await self._is_task(task):
            return
        self._uploads.require_ready()  # before anything is copied
        with self._uploads.stores.blobs.staging() as staging:
            copy = staging / FOLDER
            copy.mkdir()
            await asyncio.to_thread(_copy_parts, adapter, copy)
            await self._import_copy(task, adapter, copy, limit_s)

    async def _import_copy(self, task: str, folder: Path, copy: Path, limit_s: float) -> None:
        """Validate and register a staged copy of a folder, unless the task had these bytes and lost them."""
        digest = (await asyncio.to_thread(read_folder, copy)).digest
        stores = self._uploads.stores
        if await stores.database.call(stores.registry.was_removed, DEFAULT_TENANT, task, digest):
            log.info("an adapter was deleted here and stays so; upload it to have it back", extra={"task": task})
            return
        validated = await self._uploads.validator.validate(copy, limit_s)
        if await self._is_task(task):  # somebody uploaded one meanwhile, and theirs is served
            return
        spec = UploadSpec(DEFAULT_TENANT, task, note=f"imported from {folder.name}")
        await self._uploads.register(spec, copy, validated)
        ignored = describe_ignored(await asyncio.to_thread(find_ignored, folder))
        log.info("an adapter was taken in", extra={"task": task, "digest": digest, "ignored": ignored})

    async def _is_task(self, task: str) -> bool:
        """Tell whether the default tenant has a task of this name."""
        try:
            await self._uploads.stores.database.call(self._uploads.stores.registry.task, DEFAULT_TENANT, task)
        except AbsentError:
            return False
        return True


def _is_passing(error: Exception) -> bool:
    """Tell whether the same folder may pass later: the engine, the registry or the store is at fault, or the time."""
    if isinstance(error, ServerError):
        return error.status in (503, 504, 507)
    return isinstance(error, OSError | RegistryDownError) and not isinstance(error, PermissionError)


def _copy_parts(folder: Path, copy: Path) -> None:
    for name, path in find_parts(folder).items():
        shutil.copyfile(path, copy / name)
