"""Read what clients of other servers call a model: a task, a task's version (`task@3`), or the base."""

from __future__ import annotations

import re
from typing import Any

from server.errors import InvalidFieldError
from server.schemas import BASE, WeightedTask

VERSIONED = re.compile(r"(.+)@([1-9][0-9]{0,17})", re.DOTALL)


def split_version(model: str) -> tuple[str, int | None]:
    """The task and the version that a model names; a name that has no version's form is a task's, whatever is in it."""
    found = VERSIONED.fullmatch(model)
    return (model, None) if found is None else (found[1], int(found[2]))


def adapters_of(model: str, version: int | None, adapters: list[WeightedTask] | None) -> dict[str, Any]:
    """The fields of a generation spec that say who answers. Raises `InvalidFieldError` if it is said twice."""
    if adapters is not None:
        if model != BASE or version is not None:
            raise InvalidFieldError(
                f"adapters: with several tasks send the model {BASE}, and no version: they say who answers", "adapters"
            )
        return {"task": BASE, "adapters": [(one.task, one.weight) for one in adapters]}
    task, number = split_version(model)
    if number is not None and version is not None:
        raise InvalidFieldError("version: the model names a version already: send one of the two", "version")
    return {"task": task, "version": version if number is None else number}
