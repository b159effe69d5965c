"""Resolve the tasks that a request names to stored versions, once: the answer is of these, whatever is routed later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from adapters_store.format.manifest import GenerationDefaults, PromptFormat, TaskForm
from adapters_store.methods import is_kv
from adapters_store.registry.registry import UsageKey, Version
from adapters_store.tools.formats import ToolFormat, format_of
from server.errors import InvalidFieldError, NotFoundError, absent_is_404
from server.requests.spec import GenerationSpec
from server.schemas import BASE, MIN_TEMPERATURE
from server.stores import Stores

MAX_NAME = 63  # characters of a task's name
SEVERAL = "_several"  # no task can be named so


@dataclass(frozen=True)
class ResolvedAdapters:
    """The versions that a request uses, each with its weight; none is the base alone."""

    tenant: str
    task: str
    adapters: tuple[tuple[Version, float], ...] = ()

    @property
    def versions(self) -> list[Version]:
        """The versions without their weights."""
        return [version for version, _ in self.adapters]

    @property
    def prompt_format(self) -> PromptFormat | None:
        """The adapters' format of chat turns, if they have one. Raises `InvalidFieldError` if several disagree."""
        formats = [version.prompt_format for version in self.versions]
        if any(other != formats[0] for other in formats[1:]):
            raise InvalidFieldError(
                "these adapters were trained with different prompt formats: send a prompt", "messages"
            )
        return formats[0] if formats else None

    @property
    def tool_format(self) -> ToolFormat | None:
        """The format of tools that the adapters' manifests name, if any. Raises `InvalidFieldError` as above."""
        named = {version.tools for version in self.versions}
        if len(named) > 1:
            raise InvalidFieldError(
                "these adapters were trained with different formats of tools: send them apart", "tools"
            )
        tools = next(iter(named), None)
        return None if tools is None else format_of(tools)

    @property
    def reasoning(self) -> tuple[str, str] | None:
        """The texts around reasoning of these adapters, if a manifest names them."""
        found = next((version.reasoning for version in self.versions if version.reasoning is not None), None)
        return None if found is None else (found.before.strip(), found.after.strip())

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer of these adapters, beside the base's own."""
        return tuple(token_id for version in self.versions for token_id in version.ends)

    @property
    def form(self) -> TaskForm | None:
        """The form of their answers if a request names none: that of each of them, or none if they differ."""
        forms = [version.form for version in self.versions]
        return forms[0] if forms and all(other == forms[0] for other in forms) else None

    @property
    def lead(self) -> str:
        """The text that all of them were trained to write between a prompt and an answer."""
        leads = {"" if version.prompt_format is None else version.prompt_format.lead for version in self.versions}
        return leads.pop() if len(leads) == 1 else ""

    def defaults(self, named: frozenset[str]) -> dict[str, Any]:
        """The adapters' own sampling, by field, that a request does not name.

        Raises `InvalidFieldError` if several adapters disagree.
        """
        found: dict[str, Any] = {}
        for version in self.versions:
            for name, value in msgspec.structs.asdict(version.generation or GenerationDefaults()).items():
                if value is None or name in named:
                    continue
                if found.setdefault(name, value) != value:
                    raise InvalidFieldError(f"these adapters have different defaults of {name}: name one", name)
        if found.get("temperature", MIN_TEMPERATURE) < MIN_TEMPERATURE:
            found["temperature"] = 0.0
        return found

    @property
    def num_virtual(self) -> int:
        """Virtual tokens before every prompt."""
        return sum(version.num_virtual for version in self.versions)

    @property
    def label(self) -> str:
        """The task's name in metrics: all mixtures share one word, since there is no end of them."""
        return self.task if len(self.adapters) < 2 else SEVERAL

    @property
    def digests(self) -> list[str]:
        """Digests of the artifacts to keep while the request runs."""
        return [version.digest for version in self.versions]

    @property
    def usage_keys(self) -> list[UsageKey]:
        """Keys under which the request's usage is counted: each version, or the base as version 0."""
        keys = [(self.tenant, version.task, version.number) for version in self.versions]
        return keys or [(self.tenant, self.task, 0)]


class AdapterResolver:
    """Resolves tasks to versions by the registry's routes."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores

    async def resolve(self, spec: GenerationSpec) -> ResolvedAdapters:
        """The versions that a spec gets now. Raises `NotFoundError`, and `InvalidFieldError` for what cannot be."""
        if spec.adapters is not None:
            return await self._several(spec, spec.adapters)
        if spec.task == BASE:
            if spec.version is not None:
                raise InvalidFieldError("the base has no versions", "version")
            return ResolvedAdapters(spec.tenant, BASE)
        if len(spec.task) > MAX_NAME:
            raise NotFoundError(f"there is no task {spec.task[:MAX_NAME]}", "task")
        version = await self.version(spec.tenant, spec.task, spec.version, spec.user)
        return ResolvedAdapters(spec.tenant, spec.task, ((version, 1.0),))

    async def version(self, tenant: str, task: str, number: int | None, user: str | None) -> Version:
        """The named version of a task, or the one that its route gives `user`. Raises `NotFoundError`."""
        with absent_is_404("task"):
            return await self._stores.database.call(self._stores.registry.resolve, tenant, task, number, user)

    async def _several(self, spec: GenerationSpec, tasks: list[tuple[str, float]]) -> ResolvedAdapters:
        names = [task for task, _ in tasks]
        if BASE in names:
            raise InvalidFieldError("the base is always worn; list only adapters' tasks", "adapters")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InvalidFieldError(f"the task {twice} is listed twice: a request wears a task once", "adapters")
        adapters = [(await self.version(spec.tenant, task, None, spec.user), weight) for task, weight in tasks]
        _check_prefixes(adapters)
        return ResolvedAdapters(spec.tenant, "+".join(names), tuple(adapters))


def _check_prefixes(adapters: list[tuple[Version, float]]) -> None:
    """Raise `InvalidFieldError` for prefixes that do not compose: they stand one after another, each whole.

    Keys and values that are given, and not computed, would ignore the embeddings that stand before them.
    """
    computed: str | None = None
    for version, weight in adapters:
        if version.num_virtual and weight != 1.0:
            raise InvalidFieldError(
                f"the task {version.task} puts {version.num_virtual} virtual tokens before the prompt, which cannot be "
                f"weighed: give it the weight 1, not {weight:g}",
                "adapters",
            )
        if computed and is_kv(version.method):
            raise InvalidFieldError(
                f"the task {version.task} ({version.method}) brings keys and values of the first positions: list it "
                f"before the task {computed}",
                "adapters",
            )
        if version.num_virtual and not is_kv(version.method):
            computed = version.task
