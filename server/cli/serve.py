"""`manyhats serve`: the settings as flags, the start in its order, and the greeting."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.console import Console

from adapters_store.base.cache import VARIABLE
from adapters_store.base.identity import BaseUnavailableError
from adapters_store.base.resolve import resolve_base
from adapters_store.registry import DEFAULT_TENANT
from server import listen, logs, process_memory
from server.cli.errors import stop
from server.cli.kernels import compile_kernels
from server.engine.client import require_ready
from server.engine.process_client import ProcessEngineClient
from server.settings import PREFIX, Settings, SettingsError, check_environment

if TYPE_CHECKING:
    from server.state import ServerState

START = "cannot start:"
MAX_NAMED = 50  # tasks in the greeting


def run(flags: dict[str, Any]) -> None:
    """Serve with these settings until a signal; those that are None keep their variable or default."""
    began, console = time.monotonic(), logs.console()
    settings = _settings(flags, console)
    logs.install(settings.log_level, settings.log_format)
    console = logs.console(settings.log_format)
    os.environ[VARIABLE] = str(settings.cache)  # for the engine and its helpers, which load kernels from there
    with contextlib.ExitStack() as stack:
        try:
            sockets = [stack.enter_context(listener) for listener in listen.bind(settings.host, settings.port)]
            url = listen.address_of(settings.host, sockets)
            with console.status("finding the base"):
                folder = resolve_base(settings.base, settings.cache, lambda line: console.print(line, markup=False))
        except (BaseUnavailableError, OSError) as error:
            raise stop(str(error), START, console) from error
        if settings.device == "cpu":
            compile_kernels(settings.precision, console)
        is_loading = stack.enter_context(contextlib.ExitStack())
        is_loading.enter_context(process_memory.loading())

        def on_ready(state: ServerState) -> None:
            is_loading.close()
            _greet(state, url, console, time.monotonic() - began)

        failure = listen.run(_serve(settings, folder, sockets, on_ready), sockets)
    if failure is not None:
        raise stop(failure, START, console)


async def _serve(
    settings: Settings, folder: Path, sockets: list[socket], on_ready: Callable[[ServerState], None]
) -> str | None:
    """Start the engine, and import the API while it loads: that takes a second or two. Then serve until a signal.

    Returns why it could not start, in a sentence for the operator; None if it did.
    """
    engine = ProcessEngineClient(settings.engine_config(folder))
    starting = asyncio.create_task(engine.start())
    try:
        application = await asyncio.to_thread(import_module, "server.app")
        app = application.create_app(settings, folder, engine, on_ready)
        server = listen.DrainingServer(app, settings)
        with contextlib.suppress(SystemExit):  # it could not start
            await server.serve(sockets)
        failure: str | None = app.state.start_failure
        return None if server.is_start_given_up else failure
    finally:
        await engine.close()
        await asyncio.gather(starting, return_exceptions=True)


def _settings(flags: dict[str, Any], console: Console) -> Settings:
    """Flags over variables over defaults; a wrong one is a sentence, not a traceback."""
    try:
        check_environment()
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except SettingsError as error:
        raise stop(str(error), START, console) from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise stop("\n".join(lines), START, console) from error


def _greet(state: ServerState, url: str, console: Console, seconds: float) -> None:
    """Print the server's address and tasks, and a curl that works when pasted."""
    settings, ready = state.settings, require_ready(state.client)
    tasks = [name for name, _ in state.stores.registry.task_names(DEFAULT_TENANT, None, MAX_NAMED)]
    key = "" if settings.admin_key is None else f" -H 'Authorization: Bearer '\"${PREFIX}ADMIN_KEY\""
    task, body = ("banking77", BANKING77) if "banking77" in tasks else ("base", HELLO)
    console.print(
        f"\nmanyhats serves {ready.spec.name} ({ready.precision}) on {url}, ready after {seconds:.1f} s "
        f"(base loaded in {ready.load_seconds:.1f} s). Tasks: {', '.join(['base', *tasks])}\n\n"
        f"  curl -s '{url}/generate?task={task}'{key} -d '{body}'\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


HELLO = '{"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 32}'
BANKING77 = '{"messages": [{"role": "user", "content": "My card still has not arrived."}], "max_tokens": 16}'
