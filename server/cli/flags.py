"""The flags of `manyhats serve`: every setting is one, but for the key, which a command line would show to all."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from server.settings import Settings, flags_of, variable


def parameters() -> list[inspect.Parameter]:
    """Make a parameter of each setting, as Typer reads them: one source of truth."""
    return [_flag(name, field) for name, field in Settings.model_fields.items() if name != "admin_key"]


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """The flag of a setting: text as it is typed; `Settings` itself reads and checks it."""
    option = typer.Option(
        " / ".join(flags_of(name, field)),
        help=f"{field.description} [{variable(name)}]",
        show_default=str(_default(field)),
    )
    kind: Any = bool if field.annotation is bool else str
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _default(field: FieldInfo) -> object:
    default = field.get_default(call_default_factory=True)
    return default.human_readable() if hasattr(default, "human_readable") else default
