"""Re-validate stored adapters after start-up: each one last validated under another base, precision or version.

One after another, while requests are served already; a request for one that is not validated yet waits for it. One
that fails is quarantined with its reason: it stays in the store unserved, and the same bytes uploaded again heal it.
"""

from __future__ import annotations

import asyncio
import logging

from adapters_store.errors import AbsentError, ArtifactCorruptError, ArtifactError, RegistryDownError
from server.core import EngineFailure
from server.errors import EngineFailedError, ProbeLateError, ServerError
from server.logs import cause_of
from server.stores import Stores
from server.uploads.retention import ArtifactRetention
from server.uploads.validation import Validator

log = logging.getLogger(__name__)


class Revalidation:
    """Knows which stored artifacts are not validated here yet, and validates them before they are served.

    `fingerprint` is what a validation holds for (see `compute_validation_fingerprint`).
    """

    def __init__(self, stores: Stores, retention: ArtifactRetention, validator: Validator, fingerprint: str) -> None:
        self._stores, self._retention, self._validator = stores, retention, validator
        self.fingerprint = fingerprint
        self._lock = asyncio.Lock()  # one stored artifact at a time is validated
        self._unvalidated: dict[str, EngineFailure | None] = {}  # by digest; why one may not be served

    @property
    def num_pending(self) -> int:
        """Stored artifacts that are neither validated nor quarantined yet."""
        return sum(failure is None for failure in self._unvalidated.values())

    def is_quarantined(self, digest: str) -> bool:
        """Whether a stored artifact failed its validation, and is not served."""
        return self._unvalidated.get(digest) is not None

    def mark_unvalidated(self, digest: str) -> None:
        """Validate a stored artifact before it is served again."""
        self._unvalidated[digest] = None

    def mark_validated(self, digest: str) -> None:
        """Serve an artifact from now on: it passed as an upload, also if it was quarantined."""
        self._unvalidated.pop(digest, None)

    async def find_unvalidated(self) -> None:
        """List the artifacts to validate before they are served, at start. One that the store has lost cannot pass."""
        database, registry = self._stores.database, self._stores.registry
        unvalidated = await database.call(registry.unvalidated, self.fingerprint)
        stored = await self._stores.storage.call_within(None, self._stores.blobs.digests)
        self._unvalidated = dict.fromkeys([*unvalidated, *(await database.call(registry.digests) - stored)])

    async def validate_all(self) -> None:
        """Validate one after another. One that the engine has no time for is validated when it is asked for."""
        for digest in list(self._unvalidated):
            with self._retention.hold([digest]):
                try:
                    await self.ensure_validated(digest)
                except EngineFailedError:
                    pass  # it is in the log
                except ServerError as error:
                    log.info("a stored adapter is proved later", extra={"digest": digest, "reason": str(error)})
                except (OSError, RegistryDownError) as error:
                    log.warning("a stored adapter is proved later", extra=cause_of(error, digest=digest))
                except Exception:
                    log.exception("a stored adapter could not be proved", extra={"digest": digest})
            await self._retention.delete_if_unreferenced([digest])

    async def ensure_validated(self, digest: str) -> None:
        """Return once a stored artifact is validated. Raises `EngineFailedError` if it failed, now or before.

        Requests for the same artifact share one outcome. Raises `UnavailableError` if the engine is away or busy.
        """
        if digest not in self._unvalidated:
            return
        async with self._lock:
            if (failure := self._unvalidated.get(digest)) is not None:
                raise EngineFailedError(failure)
            if digest not in self._unvalidated:
                return
            try:
                await self._validator.validate_stored(digest)
            except ProbeLateError as error:
                message = "a stored adapter waits to be proved, for the engine is busy"
                raise ProbeLateError(message, retry_after=error.retry_after) from None
            except (ArtifactError, AbsentError) as error:
                raise EngineFailedError(self._quarantine(digest, error)) from None
            await self._stores.database.call(self._stores.registry.set_validated, digest, self.fingerprint)
            self.mark_validated(digest)

    def _quarantine(self, digest: str, error: ArtifactError | AbsentError) -> EngineFailure:
        code = error.code if isinstance(error, ArtifactCorruptError) else "adapter_failed"
        failure = EngineFailure(code, f"adapter {digest[:12]} is not served: {error}; upload it again")
        if digest in self._unvalidated:  # else it was uploaded again meanwhile
            self._unvalidated[digest] = failure
        log.error("a stored adapter was quarantined", extra={"digest": digest, "reason": str(error)})
        return failure
