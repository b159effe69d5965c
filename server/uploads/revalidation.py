"""What is in the store at start, and was proved under another base or software, or never: it is put to the proof, too.

One after another, while requests are served already; whoever asks for one that is not proved yet waits for its proof.
What fails is quarantined with its reason: it is not served, it stays where it is, and the bytes uploaded again heal it.
"""

from __future__ import annotations

import asyncio
import logging

from adapters_store.errors import AbsentError, ArtifactCorruptError, ArtifactError
from server.core import EngineFailure
from server.errors import EngineFailedError, ProbeLateError, ServerError
from server.state import ServerState
from server.uploads.validation import validate_stored

log = logging.getLogger(__name__)


async def find_unvalidated(state: ServerState) -> None:
    """At start: what is to be proved before it is worn. What the store has lost cannot pass."""
    unvalidated = await asyncio.to_thread(state.registry.unvalidated, state.validation_fingerprint)
    lost = await asyncio.to_thread(state.registry.digests) - await asyncio.to_thread(state.blobs.digests)
    state.unvalidated = dict.fromkeys([*unvalidated, *lost])


async def validate_all(state: ServerState) -> None:
    """One after another. What the engine has no time for now is proved when it is asked for."""
    for digest in list(state.unvalidated):
        with state.in_use.hold([digest]):
            try:
                await ensure_validated(state, digest)
            except EngineFailedError:
                pass  # it is in the log
            except ServerError as error:
                log.info("a stored adapter is proved later", extra={"digest": digest, "reason": str(error)})
            except Exception:
                log.exception("a stored adapter could not be proved", extra={"digest": digest})
        await state.delete_if_unreferenced([digest])


async def ensure_validated(state: ServerState, digest: str) -> None:
    """Return when an artifact of the store passed the proof. Raises `EngineFailedError` where it failed.

    Whoever else waits for the same has its outcome; `UnavailableError` is that of an engine that is away or busy.
    """
    if digest not in state.unvalidated:
        return
    async with state.validating:
        if (failure := state.unvalidated.get(digest)) is not None:
            raise EngineFailedError(failure)
        if digest not in state.unvalidated:
            return
        try:
            await validate_stored(state, digest)
        except ProbeLateError:
            raise ProbeLateError("a stored adapter waits to be proved, for the engine is busy", retry_after=5) from None
        except (ArtifactError, AbsentError) as error:
            raise EngineFailedError(_quarantine(state, digest, error)) from None
        await asyncio.to_thread(state.registry.set_validated, digest, state.validation_fingerprint)
        state.unvalidated.pop(digest, None)


def _quarantine(state: ServerState, digest: str, error: ArtifactError | AbsentError) -> EngineFailure:
    code = error.code if isinstance(error, ArtifactCorruptError) else "adapter_failed"
    failure = EngineFailure(code, f"adapter {digest[:12]} is not served: {error}; upload it again")
    if digest in state.unvalidated:  # else it was uploaded again meanwhile
        state.unvalidated[digest] = failure
    log.error("a stored adapter was quarantined", extra={"digest": digest, "reason": str(error)})
    return failure
