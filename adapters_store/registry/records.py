"""Records that the registry returns: versions and their facts, tasks, usage."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import msgspec
from sqlalchemy import Row

from adapters_store.format.manifest import (
    GenerationDefaults,
    PromptFormat,
    ReasoningTexts,
    TaskForm,
    ToolFormatName,
    ToolTexts,
)
from adapters_store.registry.routes import Route


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The registry's record of an artifact's content.

    `num_parameters` were trained; `num_items` numbers are taken on the device, of which `num_matrix_items` are of
    matrices; `num_virtual` prefix tokens come before a prompt; `num_bytes` is the size of the files. An answer ends at
    the token ids `ends`, beside the base's.
    """

    digest: str
    method: str
    num_parameters: int
    num_items: int
    num_matrix_items: int
    num_virtual: int
    num_bytes: int
    prompt_format: PromptFormat | None = None
    ends: tuple[int, ...] = ()
    generation: GenerationDefaults | None = None
    form: TaskForm | None = None
    tools: ToolFormatName | ToolTexts | None = None
    reasoning: ReasoningTexts | None = None


@dataclass(frozen=True, kw_only=True)
class Version(Facts):
    """An immutable version of a task; `created` is in Unix seconds."""

    task: str
    number: int
    note: str
    created: float


@dataclass(frozen=True)
class Task:
    """A tenant's task: versions by number, route, and whether the routed versions are pinned to the device.

    A task of a page has its newest versions and those of its route only, of `num_versions`.
    """

    name: str
    versions: tuple[Version, ...]
    route: Route
    is_pinned: bool = False
    num_versions: int = 0


@dataclass(frozen=True)
class Usage:
    """The use of a task's version (0: the base): requests and tokens."""

    task: str
    version: int
    requests: int
    prompt_tokens: int
    completion_tokens: int


def version_of(task: str, row: Row[Any]) -> Version:
    """Convert a row of `versions` to a version of a task."""
    columns = {field.name: getattr(row, field.name) for field in fields(Version) if field.name != "task"}
    return msgspec.convert({"task": task, **columns}, Version)


def usage_of(row: Row[Any]) -> Usage:
    """Convert a row of `usage` to a record."""
    return Usage(row.task, row.version, row.requests, row.prompt_tokens, row.completion_tokens)
