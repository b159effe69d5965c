"""Compose the server: make every room, give it the rooms that it needs, and put all behind the routes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from adapters_store.errors import RegistryDownError, StoreDownError
from adapters_store.registry.database import NUM_CONNECTIONS
from adapters_store.registry.registry import Registry
from adapters_store.registry.tenants import Tenants
from adapters_store.storage.bucket import open_blobs
from adapters_store.storage.directory import CALL_WITHIN_S, Blobs
from adapters_store.storage.load_roots import open_roots
from server import logs
from server.api import (
    adapters,
    generate,
    health,
    openai,
    responses,
    score,
    tasks,
    tenants,
    text_generation,
    vllm,
    vllm_adapters,
)
from server.api.document import EVERYWHERE, describe_api, errors
from server.api.middleware import HANDLERS, CrossOrigin, RequestLog
from server.dependency import Dependency
from server.engine.client import EngineClient
from server.engine.process_client import ProcessEngineClient
from server.metrics import Metrics
from server.requests.auth import Callers
from server.requests.rate_limits import RateLimiter
from server.requests.service import GenerationService
from server.requests.tokenizer import Tokenizer
from server.requests.usage import UsageBuffer
from server.requests.version_stats import Recent
from server.settings import Settings
from server.state import ServerState
from server.stores import Stores
from server.tenant_work import TenantWork
from server.together import for_ever, together
from server.uploads.preload import TreeImport
from server.uploads.retention import ArtifactRetention
from server.uploads.revalidation import Revalidation
from server.uploads.service import UploadService
from server.uploads.validation import Validator, compute_validation_fingerprint

log = logging.getLogger(__name__)

HOUR_S, DAY_S = 3600.0, 86400.0
NUM_STORE_THREADS = 4  # calls of the store of artifacts at once
OnReady = Callable[[ServerState], None]
ROOMS = (
    generate, text_generation, score, openai, responses, vllm, vllm_adapters, adapters, tasks, tenants, health,
)  # fmt: skip


def create_app(
    settings: Settings, base_folder: Path, client: EngineClient | None = None, on_ready: OnReady = lambda _state: None
) -> FastAPI:
    """Make the application. `client` is the engine (by default a process of its own); `on_ready` runs before serving.

    If it cannot start, `app.state.start_failure` is a sentence for the operator. `app.state.engine` is the client.
    """
    engine = client or ProcessEngineClient(settings.engine_config(base_folder))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                app.state.server = await _open(settings, base_folder, engine, stack)
                on_ready(app.state.server)
            except Exception as error:
                app.state.start_failure = str(error) or type(error).__name__
                raise
            yield

    app = FastAPI(
        title="manyhats",
        summary="One frozen base model, many hats",
        lifespan=lifespan,
        openapi_url=None,  # it asks for a key, too: see health.py
        redirect_slashes=False,  # a redirect would name whatever host the request did
        responses=errors(*EVERYWHERE),
        generate_unique_id_function=lambda route: route.name,  # what generated clients call it
    )
    app.openapi = partial(describe_api, app, settings.admin_key is not None)  # type: ignore[method-assign]
    app.state.start_failure, app.state.engine = None, engine
    for room in ROOMS:
        app.include_router(room.router)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(RequestLog)
    if settings.origins:
        app.add_middleware(CrossOrigin, origins=settings.origins)
    return app


async def _open(settings: Settings, base_folder: Path, engine: EngineClient, stack: AsyncExitStack) -> ServerState:
    """Start every room; `stack` ends them in the opposite order, also if a later one cannot start."""
    stack.callback(os.umask, os.umask(0o077))  # nobody else reads what is written from now on
    settings.data.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # a volume's owner
        settings.data.chmod(0o700)
    stack.enter_context(alone_with(settings.data / "lock", f"data folder {settings.data}"))
    metrics = Metrics(
        lambda: engine.stats,
        lambda: getattr(engine, "pid", None),
        lambda: None if engine.ready is None else engine.ready.forward,
        settings.max_running,
    )
    stores = await _open_stores(settings, metrics, stack)
    stack.push_async_callback(engine.close)
    ready, tokenizer = await together(engine.start(), asyncio.to_thread(_open_tokenizer, settings, base_folder))
    rotary = "" if ready.forward is None else ready.forward.rotary
    fingerprint = compute_validation_fingerprint(base_folder, settings.precision, settings.device, rotary)
    tenant_work = TenantWork(settings.max_waiting)
    stack.callback(tenant_work.close)
    state = _assemble(settings, engine, stores, tokenizer, tenant_work, metrics, fingerprint)
    await _run_rooms(state, stack)
    return state


async def _run_rooms(state: ServerState, stack: AsyncExitStack) -> None:
    """Import, tell the engine what is pinned, and start what runs in the background."""
    stores = state.stores
    stack.push_async_callback(state.usage.close, stores)
    await state.revalidation.find_unvalidated()
    watches = {
        "the watch of the registry": stores.database.watch(stores.registry.check),
        "the watch of the store": stores.storage.watch(stores.blobs.check),
        "the writer of usage": state.usage.keep_flushing(stores),
        "the keeper of records": _keep_records_for(state.settings.keep_audit_days, stores),
    }
    for name, work in watches.items():
        await stack.enter_async_context(_in_background(work, name))
    await stack.enter_async_context(state.imports.running(state.settings.import_))
    await state.retention.sync_pinned()
    await stack.enter_async_context(_in_background(state.retention.keep_retrying(), "the deletion of artifacts"))
    await stack.enter_async_context(_in_background(state.revalidation.validate_all(), "the validation of artifacts"))


def _assemble(
    settings: Settings,
    client: EngineClient,
    stores: Stores,
    tokenizer: Tokenizer,
    tenant_work: TenantWork,
    metrics: Metrics,
    fingerprint: str,
) -> ServerState:
    """Make every room that only holds others, from the bottom up; nothing runs yet."""
    admin_key = None if settings.admin_key is None else settings.admin_key.get_secret_value()
    rate_limiter, usage, recent = RateLimiter(), UsageBuffer(metrics), Recent()
    retention = ArtifactRetention(stores, client, metrics, [rate_limiter, recent])
    validator = Validator(client, stores, retention, tenant_work)
    revalidation = Revalidation(stores, retention, validator, fingerprint)
    uploads = UploadService(stores, client, metrics, retention, validator, revalidation, tenant_work)
    generation = GenerationService(
        client, stores, tokenizer, tenant_work, metrics, usage, rate_limiter, recent, retention, revalidation,
        settings.tool_format,
    )  # fmt: skip
    return ServerState(
        settings,
        client,
        stores,
        tokenizer,
        tenant_work,
        metrics,
        Callers(stores, admin_key, settings.host, settings.origins),
        rate_limiter,
        usage,
        recent,
        retention,
        revalidation,
        generation,
        uploads,
        TreeImport(uploads, metrics),
        open_roots(settings.load_places),
    )


async def _open_stores(settings: Settings, metrics: Metrics, stack: AsyncExitStack) -> Stores:
    """Open the registry and the store of artifacts, each with threads of its own; `stack` closes them."""
    database = Dependency("registry", NUM_CONNECTIONS, CALL_WITHIN_S, RegistryDownError, metrics)
    stack.callback(database.close)
    storage = Dependency("store", NUM_STORE_THREADS, CALL_WITHIN_S, StoreDownError, metrics)
    stack.callback(storage.close)
    registry = Registry(settings.registry or f"sqlite:///{settings.data / 'registry.db'}")
    if registry.file is not None:
        stack.enter_context(
            alone_with(registry.file.with_name(f"{registry.file.name}.lock"), f"registry {registry.file}")
        )
    stack.callback(registry.close)
    await database.call_within(None, registry.open)
    blobs = await storage.call_within(None, partial(_open_blobs, settings, registry))
    return Stores(registry, Tenants(registry.engine), blobs, database, storage)


def _open_blobs(settings: Settings, registry: Registry) -> Blobs:
    """Open the store of artifacts; sweep those that the registry does not refer to, unless the store is new to it."""
    blobs = open_blobs(settings.store, settings.data / "artifacts")
    if blobs.claim(registry.identity()):
        blobs.sweep(registry.digests())
    return blobs


def _open_tokenizer(settings: Settings, base_folder: Path) -> Tokenizer:
    return Tokenizer(base_folder, has_control_prompts=settings.prompt_control_tokens)


async def _keep_records_for(days: int, stores: Stores) -> None:
    """Delete older changes from the log, and older usage of what was deleted, once an hour until cancelled."""
    while True:
        before = time.time() - days * DAY_S
        try:
            num_changes = await stores.database.call(stores.tenants.forget_changes, before)
            num_usages = await stores.database.call(stores.registry.forget_usage, before)
        except (OSError, RegistryDownError) as error:
            log.warning("old changes and usage were not deleted", extra=logs.cause_of(error))
        else:
            if num_changes or num_usages:
                told = {"num_changes": num_changes, "num_usages": num_usages, "keep_days": days}
                log.info("old changes and usage were deleted", extra=told)
        await asyncio.sleep(HOUR_S)


@asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run the work while the block runs, and cancel it at the end."""
    task = for_ever(work, name)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextmanager
def alone_with(lock: Path, what: str) -> Iterator[None]:
    """Hold what a lock file stands for: a second server would sweep away what the first is about to keep.

    Raises `OSError`.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another server uses the {what}; give this one its own") from None
        yield
