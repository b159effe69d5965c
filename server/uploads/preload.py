"""Import a tree of PEFT folders at start: each folder becomes a task of its name.

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
from adapters_store.registry.registry import DEFAULT_TENANT
from server.errors import ServerError
from server.schemas import BASE, NAME_PATTERN
from server.state import ServerState
from server.uploads.register import FOLDER, register_artifact
from server.uploads.validation import validate

log = logging.getLogger(__name__)

FIRST_LIMIT_S = 900.0  # of one adapter's probes before the server listens
RETRY_LIMIT_S = 120.0  # of one adapter's probes afterwards, in which uploads wait for them
FIRST_WAIT_S = 1.0
MAX_WAIT_S = 60.0
MAX_TRIES = 60  # of one folder: about an hour


async def import_tree(state: ServerState, tree: Path) -> list[Path]:
    """Make a task of every folder with an adapter_config.json that is no task yet, by the same checks as an upload's.

    Bytes that a task had and lost are left out: they come back by an upload alone. Returns the folders to try again,
    see `retry_imports`. Raises `NotADirectoryError` if `tree` is no folder.
    """
    if not tree.is_dir():
        raise NotADirectoryError(f"{tree} is no folder: --import takes a folder of PEFT folders")
    folders = [config.parent for config in sorted(tree.glob(f"*/{CONFIG}"))]
    pending = [folder for folder in folders if not await _is_settled(state, folder, FIRST_LIMIT_S)]
    state.num_imports_pending = len(pending)
    return pending


async def retry_imports(state: ServerState, pending: list[Path]) -> None:
    """Try the pending folders again, with a growing wait between two rounds, until all are settled or given up."""
    wait_s = FIRST_WAIT_S
    for num_tries in range(2, MAX_TRIES + 1):
        if not pending:
            return
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, MAX_WAIT_S)
        is_last = num_tries == MAX_TRIES
        pending = [folder for folder in pending if not await _is_settled(state, folder, RETRY_LIMIT_S, is_last)]
        state.num_imports_pending = len(pending)


@asynccontextmanager
async def importing(state: ServerState, tree: Path | None) -> AsyncIterator[None]:
    """Import a tree, and try again in the background what is pending, while the block runs. Raises as `import_tree`."""
    pending = [] if tree is None else await import_tree(state, tree)
    retrying = asyncio.create_task(retry_imports(state, pending), name="imports")
    try:
        yield
    finally:
        retrying.cancel()
        await asyncio.gather(retrying, return_exceptions=True)


async def _is_settled(state: ServerState, folder: Path, limit_s: float, is_last: bool = False) -> bool:
    """Try one folder. Returns True if it was imported, needs no import, or is refused for good."""
    try:
        await _import_folder(state, folder, limit_s)
    except Exception as error:  # noqa: BLE001 - whatever a folder holds, the server starts
        where = {"folder": str(folder), "reason": str(error)}
        if _is_passing(error) and not is_last:
            log.warning("an adapter was not taken in yet; it is tried again", extra=where)
            return False
        log.error("an adapter was not taken in", extra=where)
    return True


def _is_passing(error: Exception) -> bool:
    """Tell whether the same folder may pass later: the engine, the registry or the store is at fault, or the time."""
    if isinstance(error, ServerError):
        return error.status in (503, 504, 507)
    return isinstance(error, OSError | RegistryDownError)


async def _import_folder(state: ServerState, folder: Path, limit_s: float) -> None:
    task = folder.name.lower()
    if not re.fullmatch(NAME_PATTERN, task) or task == BASE:
        raise ArtifactError(f"{folder.name} is no task name ({NAME_PATTERN})")
    if await _is_task(state, task):
        return
    state.ready()  # raises without an engine, before anything is copied
    with state.blobs.staging() as staging:
        copy = staging / FOLDER
        copy.mkdir()
        for name, path in find_parts(folder).items():
            shutil.copyfile(path, copy / name)
        await _import_copy(state, task, folder, copy, limit_s)


async def _import_copy(state: ServerState, task: str, folder: Path, copy: Path, limit_s: float) -> None:
    """Validate and register a staged copy of a folder, unless the task had these bytes and lost them."""
    digest = read_folder(copy).digest
    if await asyncio.to_thread(state.registry.was_removed, DEFAULT_TENANT, task, digest):
        log.info("an adapter was deleted here and stays so; upload it to have it back", extra={"task": task})
        return
    validated = await validate(state, copy, limit_s)
    if await _is_task(state, task):  # somebody uploaded one meanwhile, and theirs is served
        return
    await register_artifact(state, DEFAULT_TENANT, task, copy, validated, True, f"imported from {folder.name}")
    log.info("an adapter was taken in", extra={"task": task, "digest": digest})


async def _is_task(state: ServerState, task: str) -> bool:
    """Tell whether the default tenant has a task of this name."""
    try:
        await asyncio.to_thread(state.registry.task, DEFAULT_TENANT, task)
    except AbsentError:
        return False
    return True
