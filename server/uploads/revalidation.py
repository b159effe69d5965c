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
from server.uploads.validation import prove_stored

log = logging.getLogger(__name__)


async def find_unproved(state: ServerState) -> None:
    """At start: what is to be proved before it is worn. What the store has lost cannot pass."""
    unproved = await asyncio.to_thread(state.registry.unproved, state.ground)
    lost = await asyncio.to_thread(state.registry.digests) - await asyncio.to_thread(state.blobs.digests)
    state.unproved = dict.fromkeys([*unproved, *lost])


async def prove_all(state: ServerState) -> None:
    """One after another. What the engine has no time for now is proved when it is asked for."""
    for digest in list(state.unproved):
        with state.in_use.hold([digest]):
            try:
                await check_proved(state, digest)
            except EngineFailedError:
                pass  # it is in the log
            except ServerError as error:
                log.info("a stored adapter is proved later", extra={"digest": digest, "reason": str(error)})
            except Exception:
                log.exception("a stored adapter could not be proved", extra={"digest": digest})
        await state.bury([digest])


async def check_proved(state: ServerState, digest: str) -> None:
    """Return when an artifact of the store passed the proof. Raises `EngineFailedError` where it failed.

    Whoever else waits for the same has its outcome; `UnavailableError` is that of an engine that is away or busy.
    """
    if digest not in state.unproved:
        return
    async with state.proving:
        if (failure := state.unproved.get(digest)) is not None:
            raise EngineFailedError(failure)
        if digest not in state.unproved:
            return
        try:
            await prove_stored(state, digest)
        except ProbeLateError:
            raise ProbeLateError("a stored adapter waits to be proved, for the engine is busy", retry_after=5) from None
        except (ArtifactError, AbsentError) as error:
            raise EngineFailedError(_quarantine(state, digest, error)) from None
        await asyncio.to_thread(state.registry.set_proved, digest, state.ground)
        state.unproved.pop(digest, None)


def _quarantine(state: ServerState, digest: str, error: ArtifactError | AbsentError) -> EngineFailure:
    code = error.code if isinstance(error, ArtifactCorruptError) else "adapter_failed"
    failure = EngineFailure(code, f"adapter {digest[:12]} is not served: {error}; upload it again")
    if digest in state.unproved:  # else it was uploaded again meanwhile
        state.unproved[digest] = failure
    log.error("a stored adapter was quarantined", extra={"digest": digest, "reason": str(error)})
    return failure
