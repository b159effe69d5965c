"""Import a tree of PEFT folders at start: each folder is a task by its name. A bad one is one line in the log."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from pathlib import Path

from adapters_store.errors import AbsentError, ArtifactError
from adapters_store.format.folder import CONFIG, find_parts, read_folder
from adapters_store.registry.registry import DEFAULT_TENANT
from server.schemas import BASE, NAME_PATTERN
from server.uploads.service import FOLDER, UploadService, UploadSpec

log = logging.getLogger(__name__)


async def import_tree(uploads: UploadService, tree: Path) -> None:
    """Make a task of every folder with an adapter_config.json that is none yet, after the same checks as an upload's.

    Deleted versions stay deleted: bytes that a task had and lost come back by an upload alone. Raises
    `NotADirectoryError` if `tree` is none; a folder that fails its checks is logged.
    """
    if not tree.is_dir():
        raise NotADirectoryError(f"{tree} is no folder: --import takes a folder of PEFT folders")
    for config in sorted(tree.glob(f"*/{CONFIG}")):
        try:
            await _import_folder(uploads, config.parent)
        except Exception as error:  # noqa: BLE001 - whatever a folder holds, the server starts
            log.error("an adapter was not taken in", extra={"folder": str(config.parent), "reason": str(error)})


async def _import_folder(uploads: UploadService, folder: Path) -> None:
    task = folder.name.lower()
    if not re.fullmatch(NAME_PATTERN, task) or task == BASE:
        raise ArtifactError(f"{folder.name} is no task name ({NAME_PATTERN})")
    try:
        uploads.registry.task(DEFAULT_TENANT, task)
    except AbsentError:
        with uploads.blobs.staging() as staging:
            copy = staging / FOLDER
            copy.mkdir()
            for name, path in find_parts(folder).items():
                shutil.copyfile(path, copy / name)
            digest = read_folder(copy).digest
            if await asyncio.to_thread(uploads.registry.was_removed, DEFAULT_TENANT, task, digest):
                log.info("an adapter was deleted here and stays so; upload it to have it back", extra={"task": task})
                return
            validated = await uploads.validator.validate(copy)
            spec = UploadSpec(DEFAULT_TENANT, task, note=f"imported from {folder.name}")
            await uploads.register(spec, copy, validated)
        log.info("an adapter was taken in", extra={"task": task, "digest": validated.facts.digest})
