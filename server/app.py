"""The composition root: every room is made here, given what it needs, and put behind the routes."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI

from adapters_store.registry.registry import Registry
from adapters_store.registry.tenants import Tenants
from adapters_store.storage.bucket import open_blobs
from adapters_store.storage.directory import Blobs
from server.api import adapters, generate, health, openai, tasks, tenants
from server.api.middleware import HANDLERS, RequestLog
from server.engine.client import EngineClient
from server.engine.process_client import ProcessEngineClient
from server.metrics import Metrics
from server.requests.auth import Callers
from server.requests.tokenizer import Tokenizer
from server.settings import Settings
from server.state import ServerState
from server.uploads.preload import importing
from server.uploads.revalidation import find_unvalidated, validate_all
from server.uploads.validation import compute_validation_fingerprint

OnReady = Callable[[ServerState], None]
T = TypeVar("T")
U = TypeVar("U")


def create_app(
    settings: Settings, base_folder: Path, client: EngineClient | None = None, on_ready: OnReady = lambda _front: None
) -> FastAPI:
    """The application. `client` is the engine (by default a process of its own); `on_ready` is called before serving.

    Where it cannot start, `state.start_failure` is a sentence for the operator.
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
        openapi_url=None,  # these ask for a key, too: see health.py
        redirect_slashes=False,  # a redirect would name whatever host the request did
    )
    app.state.start_failure = None
    for room in (generate, openai, adapters, tasks, tenants, health):
        app.include_router(room.router)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(RequestLog)
    return app


async def _open(settings: Settings, base_folder: Path, engine: EngineClient, stack: AsyncExitStack) -> ServerState:
    """Start every room; `stack` ends them in the opposite order, also where a later one cannot start."""
    settings.data.mkdir(parents=True, exist_ok=True)
    stack.enter_context(alone_in(settings.data))
    registry = Registry(settings.registry or f"sqlite:///{settings.data / 'registry.db'}")
    stack.callback(registry.close)
    await asyncio.to_thread(registry.open)
    blobs = await asyncio.to_thread(_open_store, settings, registry)
    stack.push_async_callback(engine.close)
    _, tokenizer = await _both(engine.start(), asyncio.to_thread(Tokenizer, base_folder))
    metrics = Metrics(
        lambda: engine.stats,
        lambda: getattr(engine, "pid", None),
        lambda: None if engine.ready is None else engine.ready.forward,
    )
    store = Tenants(registry.engine)
    admin_key = None if settings.admin_key is None else settings.admin_key.get_secret_value()
    callers = Callers(store, admin_key, settings.host)
    validation_fingerprint = compute_validation_fingerprint(base_folder, settings.precision, settings.device)
    state = ServerState(
        settings,
        engine,
        registry,
        blobs,
        tokenizer,
        metrics,
        store,
        callers,
        validation_fingerprint=validation_fingerprint,
    )
    stack.push_async_callback(asyncio.to_thread, state.usage.flush, registry)
    await find_unvalidated(state)
    await stack.enter_async_context(_in_background(state.usage.keep_flushing(state.registry)))
    await stack.enter_async_context(importing(state, settings.import_))
    await state.sync_pinned()
    await stack.enter_async_context(_in_background(validate_all(state)))
    return state


def _open_store(settings: Settings, registry: Registry) -> Blobs:
    """The artifacts of this registry: what it does not refer to goes, unless they have only just become its own."""
    blobs = open_blobs(settings.store, settings.data / "artifacts")
    if blobs.claim(registry.identity()):
        blobs.sweep(registry.digests())
    return blobs


async def _both(one: Coroutine[Any, Any, T], other: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Both results. Where one fails the other is called off, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = group.create_task(one), group.create_task(other)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return tasks[0].result(), tasks[1].result()


@asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """While the block runs so does the work; at its end it is called off."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextmanager
def alone_in(data: Path) -> Iterator[None]:
    """Hold the data folder: a second server would sweep away what the first is about to keep. Raises `OSError`."""
    with (data / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another server uses the data folder {data}; give this one its own") from None
        yield
