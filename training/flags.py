"""Flags of a command out of the fields of dataclasses: a field with a help text is a flag, whose default it has."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, get_type_hints

from typer import Option

from training.options import HELP, option_classes

PANEL = "Options of methods (one that the chosen method does not read is refused)"
Command = Callable[..., None]


def flags_of(options: type[Any]) -> list[inspect.Parameter]:
    """Make a parameter of each field that has a help text; one without a default may be left out, and is None then."""
    kinds, flags = get_type_hints(options), []
    for field in dataclasses.fields(options):
        if HELP in field.metadata:
            must_be_given = field.default is dataclasses.MISSING
            kind = kinds[field.name] | None if must_be_given else kinds[field.name]
            default = None if must_be_given else field.default
            flags.append(_parameter(field.name, kind, default, field.metadata[HELP]))
    return flags


def flags_of_methods() -> list[inspect.Parameter]:
    """Make a parameter of each option that any method has; None is "not given", and the method's own default holds."""
    flags: dict[str, inspect.Parameter] = {}
    for options in option_classes():
        kinds = get_type_hints(options)
        for field in dataclasses.fields(options):
            if HELP in field.metadata and field.name not in flags:
                flags[field.name] = _parameter(
                    field.name, kinds[field.name] | None, None, field.metadata[HELP], panel=PANEL
                )
    return list(flags.values())


def _parameter(name: str, kind: Any, default: Any, text: str, panel: str | None = None) -> inspect.Parameter:
    annotation = Annotated[kind, Option(help=text, rich_help_panel=panel)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def parameters_of(command: Command) -> list[inspect.Parameter]:
    """List a command's parameters with their annotations evaluated, without the one that takes the rest (`**`)."""
    kinds = get_type_hints(command, include_extras=True)
    return [
        parameter.replace(annotation=kinds[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def add_flags(command: Command, flags: Sequence[inspect.Parameter]) -> None:
    """Give a command that takes the rest (`**`) these parameters, before `jobs` among its own, as Typer reads them."""
    own = parameters_of(command)
    place = next((number for number, parameter in enumerate(own) if parameter.name == "jobs"), len(own))
    parameters = [*own[:place], *flags, *own[place:]]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
