"""UploadService: takes an artifact in (received, unpacked, validated, stored, registered), and hands one out."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from weakref import WeakValueDictionary

from adapters_store.base.spec import ItemBytes
from adapters_store.errors import ArtifactError, QuotaError, RegistryDownError
from adapters_store.format.archive import unpack_upload
from adapters_store.format.selection import describe_ignored
from adapters_store.format.zip_outline import ZipOutline
from adapters_store.registry.registry import Version
from adapters_store.registry.tenants import TenantLimits
from adapters_store.storage.directory import limit_s
from server.dependency import Dependency
from server.engine.client import EngineClient, require_ready
from server.engine.messages import Ready
from server.errors import ArtifactRefusedError, ServerError, StoreUnavailableError, UnavailableError, absent_is_404
from server.metrics import Metrics
from server.stores import Stores
from server.tenant_work import TenantWork
from server.uploads.retention import ArtifactRetention
from server.uploads.revalidation import Revalidation
from server.uploads.validation import Check, ValidatedArtifact, Validator, check

FOLDER = "folder"  # of staging: the body is unpacked into it
INTAKE_WITHIN_S = 60.0
PACKING_BYTES = 64 * 2**10  # that a body may have beyond a tenant's bytes: an archive has more than its files
MAX_INTAKES = 2  # uploads that are unpacked and checked at once: each is in memory whole


@dataclass(frozen=True)
class UploadSpec:
    """An upload that one caller asks for: how large it may be, how long it waits, and the version to make of it."""

    tenant: str
    task: str
    max_bytes: int = 0  # unpacked
    is_activated: bool = True
    note: str = ""
    limits: TenantLimits = field(default_factory=TenantLimits)
    timeout_s: float | None = None  # for its probes, on an engine that may be busy; by default `PROBE_WITHIN_S`


@dataclass(frozen=True)
class RegisteredArtifact:
    """A version of an uploaded artifact; `is_new` is False if the task had these bytes already."""

    version: Version
    is_new: bool
    checks: list[Check]


@dataclass(frozen=True)
class Download:
    """An artifact on its way out, which stays in the store until `close`."""

    digest: str
    outline: ZipOutline
    _storage: Dependency
    _kept: AsyncExitStack

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Read the zip a chunk at a time, each only when it is asked for.

        Raises `StoreUnavailableError`, or what the store raises.
        """
        for piece in self.outline.pieces:
            if isinstance(piece, bytes):
                yield piece
                continue
            for start, stop in piece.ranges():
                chunk = await self._storage.call(piece.read, start, stop)
                if len(chunk) != stop - start:
                    raise StoreUnavailableError(f"{piece.name} of {self.digest[:12]} was cut off while it was sent")
                yield chunk

    async def close(self) -> None:
        """Let the artifact go."""
        await self._kept.aclose()


class UploadService:
    """Stores validated artifacts as versions of tasks."""

    def __init__(
        self,
        stores: Stores,
        client: EngineClient,
        metrics: Metrics,
        retention: ArtifactRetention,
        validator: Validator,
        revalidation: Revalidation,
        tenant_work: TenantWork,
    ) -> None:
        self.stores, self.validator, self._tenant_work = stores, validator, tenant_work
        self._client, self._metrics = client, metrics
        self._retention, self._revalidation = retention, revalidation
        self._intake = asyncio.Semaphore(MAX_INTAKES)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of waiting for it, by tenant
        self._last_item_bytes: ItemBytes | None = None
        self._staged: Counter[str] = Counter()  # bytes of uploads on their way, by tenant
        self._staged_lock = threading.Lock()

    @property
    def item_bytes(self) -> ItemBytes | None:
        """Bytes of a number in a slot, which stay so while this server runs; None before an engine was there."""
        if self._client.ready is not None:
            self._last_item_bytes = self._client.ready.item_bytes
        return self._last_item_bytes

    def require_ready(self) -> Ready:
        """Return what the engine says of its base. Raises `UnavailableError` while there is no engine."""
        return require_ready(self._client)

    async def accept(self, spec: UploadSpec, body: AsyncIterator[bytes]) -> RegisteredArtifact:
        """Receive a body, validate it, store and register it; durable on return. A refused one leaves nothing behind.

        Raises `ServerError`, which is that of `body` too, or `OSError` of the disk.
        """
        self.require_ready()  # or 503, before a long body comes
        self.stores.require_up()
        with self._counted(), self.stores.blobs.staging() as staging, self._on_its_way(spec) as count:
            await _receive(body, staging / "body", count)
            count_unpacked = partial(_count_excess, count, (staging / "body").stat().st_size)
            unpack = partial(unpack_upload, staging / "body", max_bytes=spec.max_bytes, count=count_unpacked)
            return await self._take_in(spec, staging / FOLDER, unpack)

    async def load(self, spec: UploadSpec, copy: Callable[[Path, Callable[[int], None]], None]) -> RegisteredArtifact:
        """Take in the artifact whose files `copy` writes into a folder, counting bytes before it does.

        Raises as `accept` does.
        """
        self.require_ready()
        self.stores.require_up()
        with self._counted(), self.stores.blobs.staging() as staging, self._on_its_way(spec) as count:

            def fill(folder: Path) -> list[str]:
                copy(folder, count)
                return []

            return await self._take_in(spec, staging / FOLDER, fill)

    async def _take_in(self, spec: UploadSpec, folder: Path, fill: Callable[[Path], list[str]]) -> RegisteredArtifact:
        """Validate and register what `fill` writes into a new folder; it returns the names that it left out."""
        async with self._intake_slot(spec.tenant):
            folder.mkdir()
            ignored = await self._tenant_work.run(fill, folder)
            validated = await self.validator.validate(folder, spec.timeout_s)
            if ignored:
                validated.checks.insert(0, check("ignored", len(ignored), describe_ignored(ignored)))
            return await self.register(spec, folder, validated)

    async def register(self, spec: UploadSpec, folder: Path, validated: ValidatedArtifact) -> RegisteredArtifact:
        """Store and register a validated folder; durable on return. If that fails, nothing is kept."""
        facts, stores, digest = validated.facts, self.stores, validated.facts.digest
        try:
            async with self._retention.store_lock:
                await stores.storage.call_within(limit_s(facts.num_bytes), partial(stores.blobs.put, folder, digest))
                with absent_is_404("X-Tenant"):  # the tenant was deleted meanwhile
                    version, is_new = await stores.database.call(
                        stores.registry.add_version,
                        spec.tenant,
                        spec.task,
                        facts,
                        note=spec.note,
                        activate=spec.is_activated,
                        validated=self._revalidation.fingerprint,
                    )
                self._revalidation.mark_validated(digest)
                self._client.renew(digest)
        except Exception:
            await self._retention.mark_for_deletion([digest])
            raise
        await self._retention.sync_pinned()
        return RegisteredArtifact(version, is_new, validated.checks)

    async def download(self, tenant: str, task: str, number: int) -> Download:
        """A version's PEFT folder as a zip, verified, to be read and closed by the caller; it is kept until then.

        Raises `NotFoundError`, or `ArtifactRefusedError` if the stored bytes are not whole.
        """
        with absent_is_404("task"):
            version = await self.stores.database.call(self.stores.registry.resolve, tenant, task, number, None)
            try:
                async with AsyncExitStack() as kept:
                    await kept.enter_async_context(self._retention.using(tenant, [version]))
                    read = partial(self.stores.blobs.outline, version.digest)
                    outline = await self.stores.storage.call_within(limit_s(version.num_bytes), read)
                    return Download(version.digest, outline, self.stores.storage, kept.pop_all())
            except ArtifactError as error:
                raise ArtifactRefusedError(error) from error

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count an upload as taken, refused (its own fault) or failed (ours); say the store's refusals as ours."""
        count = self._metrics.uploads
        try:
            yield
        except ArtifactError as error:
            count.labels("refused").inc()
            raise ArtifactRefusedError(error) from None
        except QuotaError:
            count.labels("refused").inc()
            raise
        except ServerError as error:
            count.labels("refused" if error.status < 500 else "failed").inc()
            raise
        except (OSError, RegistryDownError):
            count.labels("failed").inc()
            raise
        count.labels("taken").inc()

    @contextmanager
    def _on_its_way(self, spec: UploadSpec) -> Iterator[Callable[[int], None]]:
        """Give a function, for any thread, that counts bytes of a tenant's staging until the block ends.

        It raises `QuotaError` once all uploads of the tenant that are on their way have more than it may hold.
        """
        num_bytes, max_bytes = 0, spec.limits.max_bytes

        def count(more: int) -> None:
            nonlocal num_bytes
            with self._staged_lock:
                num_bytes += more
                self._staged[spec.tenant] += more
                staged = self._staged[spec.tenant]
            if max_bytes is not None and staged > max_bytes + PACKING_BYTES:
                raise QuotaError(
                    f"uploads of the tenant {spec.tenant} on their way have more than its {max_bytes} bytes"
                )

        try:
            yield count
        finally:
            with self._staged_lock:
                self._staged[spec.tenant] -= num_bytes
                self._staged += Counter()  # drops the zeros

    @asynccontextmanager
    async def _intake_slot(self, tenant: str) -> AsyncIterator[None]:
        """Take one of the few slots for checking an upload. Of a tenant one waits for it, and its others behind that.

        So tenants take turns. Raises `UnavailableError` if too many wait.
        """
        turn = self._turns.setdefault(tenant, asyncio.Lock())
        try:
            async with asyncio.timeout(INTAKE_WITHIN_S), turn:
                await self._intake.acquire()
        except TimeoutError:
            message = "too many uploads wait to be checked; nothing was stored"
            raise UnavailableError(message, retry_after=self.validator.retry_after_s(len(self._turns))) from None
        try:
            yield
        finally:
            self._intake.release()


def _count_excess(count: Callable[[int], None], body_bytes: int, num_unpacked: int) -> None:
    """Count what is unpacked beyond the bytes of its body, which are counted already."""
    count(max(0, num_unpacked - body_bytes))


async def _receive(body: AsyncIterator[bytes], path: Path, count: Callable[[int], None]) -> None:
    with path.open("wb") as file:
        async for part in body:
            count(len(part))
            await asyncio.to_thread(file.write, part)
