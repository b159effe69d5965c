"""Store an artifact and register it as a version."""

from __future__ import annotations

import asyncio
from pathlib import Path

from adapters_store.registry.registry import Version
from server.state import ServerState
from server.uploads.validation import ValidatedArtifact

FOLDER = "folder"  # of staging: where a body is unpacked


async def register_artifact(
    state: ServerState, tenant: str, task: str, folder: Path, validated: ValidatedArtifact, activate: bool, note: str
) -> tuple[Version, bool]:
    """Store and register; durable on return. Where that fails, nothing is kept."""
    facts, add = validated.facts, state.registry.add_version
    try:
        async with state.store_lock:
            await asyncio.to_thread(state.blobs.put, folder, facts.digest)
            version, is_new = await asyncio.to_thread(
                add, tenant, task, facts, note=note, activate=activate, validated=state.validation_fingerprint
            )
            state.unvalidated.pop(facts.digest, None)
            state.client.renew(facts.digest)
    except Exception:
        await state.mark_for_deletion([facts.digest])
        raise
    await state.sync_pinned()
    return version, is_new
