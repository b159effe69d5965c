"""Store an artifact and register it as a version."""

from __future__ import annotations

import asyncio
from pathlib import Path

from adapters_store.registry.registry import Version
from server.state import Front
from server.uploads.validation import Proved

FOLDER = "folder"  # of staging: where a body is unpacked


async def keep(
    front: Front, tenant: str, task: str, folder: Path, proved: Proved, activate: bool, note: str
) -> tuple[Version, bool]:
    """Store and register; durable on return. Where that fails, nothing is kept."""
    facts, add = proved.facts, front.registry.add_version
    try:
        async with front.store_lock:
            await asyncio.to_thread(front.blobs.put, folder, facts.digest)
            version, is_new = await asyncio.to_thread(
                add, tenant, task, facts, note=note, activate=activate, proved=front.ground
            )
            front.unproved.pop(facts.digest, None)
            front.client.renew(facts.digest)
    except Exception:
        await front.give_up([facts.digest])
        raise
    await front.keep_pinned()
    return version, is_new
