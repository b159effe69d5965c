"""The command `manyhats`: its subcommands come from entry points; `serve` is ours."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.metadata import entry_points
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape

from adapters_store.base.cache import VARIABLE
from adapters_store.base.identity import BaseUnavailableError
from adapters_store.base.resolve import resolve_base
from server import listen, logs, process_memory
from server.cli.kernels import compile_kernels
from server.engine.client import require_ready
from server.engine.process_client import ProcessEngineClient
from server.settings import PREFIX, Settings, SettingsError, check_environment, flags_of, variable

if TYPE_CHECKING:
    from server.state import ServerState

log = logging.getLogger(__name__)

MAX_NAMED = 50  # tasks in the greeting
TRAINING = ("train", "compare")  # commands that need the extra `train`


def main() -> None:
    """Run a subcommand of whichever package has it."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
    app.callback()(_options)
    wanted = {entry.name: entry for entry in entry_points(group="manyhats.commands")}
    if sys.argv[1:2] != [] and sys.argv[1] in TRAINING and "--help" not in sys.argv:
        _require_extra("train", f"{sys.argv[1]}:")
    chosen = [wanted[word] for word in sys.argv[1:2] if word in wanted] or list(wanted.values())
    for entry in chosen:  # only what is run is imported: training's libraries take seconds
        command = entry.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
            continue
        app.command(entry.name, **getattr(command, "options", {}))(command)
    app()


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"manyhats {metadata.version('manyhats')}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Take the options that stand before a subcommand."""


def _require_extra(extra: str, what: str) -> None:
    """Exit with the command that installs an extra of ours, unless all of its packages are here."""
    lacking = []
    for line in metadata.requires("manyhats") or []:
        name, _, marker = line.partition(";")
        if extra in re.findall(r"extra == ['\"]([\w-]+)['\"]", marker):
            try:
                metadata.version(re.match(r"[\w.-]+", name)[0])  # type: ignore[index]
            except metadata.PackageNotFoundError:
                lacking.append(name.strip())
    if lacking:
        clone = Path(__file__).parents[2]
        project = f"-e '{clone}[{extra}]'" if (clone / "pyproject.toml").is_file() else f"'manyhats[{extra}]'"
        reason = f"{', '.join(lacking)} not installed; run: {sys.executable} -m pip install {project}"
        raise SystemExit(_stop(Console(stderr=True), reason, what).exit_code)


def bench(context: typer.Context) -> None:
    """Measure this server, and others beside it; it needs a clone of the repository."""
    clone = Path(__file__).parents[2]
    if not (clone / "tests" / "benchmarks" / "__main__.py").is_file():
        reason = "the benchmarks are not in the installed package; clone the repository and run `make bench` there"
        raise _stop(Console(stderr=True), reason, "bench:")
    command = [sys.executable, "-m", "tests.benchmarks", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=clone, check=False).returncode)  # noqa: S603 - our own module, no shell


# Every word goes to the bench itself, `--help` too.
bench.options = {  # type: ignore[attr-defined]
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
}


def serve(**flags: Any) -> None:
    """Serve one base and many adapters over HTTP."""
    began, console = time.monotonic(), logs.console()
    settings = _settings(flags, console)
    logs.install(settings.log_level)
    os.environ[VARIABLE] = str(settings.cache)  # for the engine and its helpers, which load kernels from there
    with contextlib.ExitStack() as stack:
        try:
            sockets = [stack.enter_context(listener) for listener in listen.bind(settings.host, settings.port)]
            url = listen.address_of(settings.host, sockets)
            with console.status("finding the base"):
                folder = resolve_base(settings.base, settings.cache, lambda line: console.print(line, markup=False))
        except (BaseUnavailableError, OSError) as error:
            raise _stop(console, str(error)) from error
        if settings.device == "cpu":
            compile_kernels(settings.precision, console)
        is_loading = stack.enter_context(contextlib.ExitStack())
        is_loading.enter_context(process_memory.loading())

        def on_ready(state: ServerState) -> None:
            is_loading.close()
            _greet(state, url, console, time.monotonic() - began)

        failure = listen.run(_serve(settings, folder, sockets, on_ready), sockets)
    if failure is not None:
        raise _stop(console, failure)


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
        raise _stop(console, str(error)) from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise _stop(console, "\n".join(lines)) from error


def _stop(console: Console, reason: str, what: str = "cannot start:") -> typer.Exit:
    console.print(f"[bold red]manyhats {what}[/] {escape(reason)}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


def _greet(state: ServerState, url: str, console: Console, seconds: float) -> None:
    """Print the server's address and tasks, and a curl that works when pasted."""
    from adapters_store.registry.registry import DEFAULT_TENANT  # by now it is here

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


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """The flag of a setting: text as it is typed; `Settings` itself reads and checks it."""
    option = typer.Option(
        " / ".join(flags_of(name, field)),
        help=f"{field.description} [{variable(name)}]",
        show_default=str(_default(field)),
    )
    kind = bool if field.annotation is bool else str
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _default(field: FieldInfo) -> object:
    default = field.get_default(call_default_factory=True)
    return default.human_readable() if hasattr(default, "human_readable") else default


def _with_flags(parameters: list[inspect.Parameter]) -> None:
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


# One source of truth: every field of Settings is a flag, but for the key, which a command line would show to all.
_with_flags([_flag(name, field) for name, field in Settings.model_fields.items() if name != "admin_key"])
