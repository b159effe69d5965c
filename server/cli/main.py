"""The command `manyhats`: its subcommands come from entry points, and each is imported when it is asked for."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from server.cli.errors import stop

HELP = "One frozen base model, many adapters: serve it, train for it, and operate what is served."
TRAINING = ("train", "compare")  # commands that need the extra `train`


class Commands(TyperGroup):
    """The subcommands of all packages. Their modules import what computes, serves or asks only when they run."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        entries = metadata.distribution("manyhats").entry_points  # reading those of all packages takes 85 ms
        self._entries = {entry.name: entry for entry in entries.select(group="manyhats.commands")}

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - as Typer calls it
        """List the names of all subcommands."""
        return [*self._entries]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a subcommand. For a name that is none all are imported, so that Typer finds one that is meant."""
        for name in {cmd_name} & self._entries.keys() or self._entries:
            if name not in self.commands:
                self.add_command(_command(self._entries[name]))
        return super().get_command(ctx, cmd_name)


def _command(entry: EntryPoint) -> Any:
    found = entry.load()
    command = typer.main.get_command(found) if isinstance(found, typer.Typer) else command_of(found)
    command.name = entry.name
    return command


def command_of(function: Callable[..., None]) -> Any:
    """Make the command that a function is, with the options that it names itself."""
    app = typer.Typer(add_completion=False)
    app.command(**getattr(function, "options", {}))(function)
    return typer.main.get_command(app)


def main() -> None:
    """Run a subcommand of whichever package has it."""
    if sys.argv[1:2] != [] and sys.argv[1] in TRAINING and "--help" not in sys.argv:
        _require_extra("train", f"{sys.argv[1]}:")
    app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, help=HELP)
    app.callback()(_options)
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
        raise SystemExit(stop(reason, what).exit_code)


def bench(context: typer.Context) -> None:
    """Measure this server, and others beside it; it needs a clone of the repository."""
    clone = Path(__file__).parents[2]
    if not (clone / "tests" / "benchmarks" / "__main__.py").is_file():
        reason = "the benchmarks are not in the installed package; clone the repository and run `make bench` there"
        raise stop(reason, "bench:")
    command = [sys.executable, "-m", "tests.benchmarks", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=clone, check=False).returncode)  # noqa: S603 - our own module, no shell


# Every word goes to the bench itself, `--help` too.
bench.options = {  # type: ignore[attr-defined]
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
}


def serve(**flags: Any) -> None:
    """Serve one base and many adapters over HTTP."""
    from server.cli.serve import run

    run(flags)


class ServeCommand(TyperCommand):
    """The command `manyhats serve`, whose flags are the settings: they are imported when its flags are asked for."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Give the flags of all settings and `--help`."""
        if not self.params:
            from server.cli.flags import parameters

            whole = command_of(with_flags(serve, parameters()))
            self.params, self.callback = whole.params, whole.callback
        return super().get_params(ctx)


def with_flags(command: Callable[..., None], flags: list[inspect.Parameter]) -> Callable[..., None]:
    """Give a command that takes the rest (`**`) these parameters, as Typer reads them."""
    command.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in flags}
    return command


with_flags(serve, [])
serve.options = {"cls": ServeCommand}  # type: ignore[attr-defined]
