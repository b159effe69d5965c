"""From a checked request to what the engine is asked: who answers, the prompts' tokens, the sampling."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

from jinja2 import TemplateError

from adapters_store.format.manifest import PromptFormat
from adapters_store.methods import is_kv
from adapters_store.registry.registry import Version
from server.core import Sampling
from server.errors import BadRequestError, InvalidFieldError, NotFoundError
from server.schemas import BASE, Message, SamplingFields, WeightedTask
from server.state import ServerState

THREAD_CHARS = 4000  # longer texts are tokenised off the event loop
MIN_TEMPERATURE = 1e-3
MAX_NAME = 63  # characters of a task's name
SEVERAL = "_several"  # no task can be named so


@dataclass(frozen=True)
class ResolvedAdapters:
    """What a request wears: its tasks' versions with weights, resolved once, here. Nothing is the base."""

    tenant: str
    task: str
    adapters: tuple[tuple[Version, float], ...] = ()

    @property
    def prompt_format(self) -> PromptFormat | None:
        """How chat turns are written. Raises `InvalidFieldError` where several adapters disagree."""
        formats = [version.prompt_format for version, _ in self.adapters]
        if any(other != formats[0] for other in formats[1:]):
            raise InvalidFieldError(
                "these adapters were trained with different prompt formats: send a prompt", "messages"
            )
        return formats[0] if formats else None

    @property
    def num_virtual(self) -> int:
        """Virtual tokens before every prompt."""
        return sum(version.num_virtual for version, _ in self.adapters)

    @property
    def label(self) -> str:
        """What metrics call it: a task's name, or one word for all mixtures, of which there is no end."""
        return self.task if len(self.adapters) < 2 else SEVERAL

    @property
    def digests(self) -> list[str]:
        """The artifacts to keep while the request runs."""
        return [version.digest for version, _ in self.adapters]


def task_of(task: str | None) -> str:
    """The task that a request names. Raises `BadRequestError` where it names none: the base is asked for by name."""
    if not task:
        raise BadRequestError("name a task: POST /generate?task=NAME (task=base is the base itself)", "task")
    return task


async def resolve_adapter(
    state: ServerState, tenant: str, task: str, version: int | None = None, user: str | None = None
) -> ResolvedAdapters:
    """Resolve a task's name to a version. `base` is the base, and asked for by that name alone."""
    if task == BASE:
        if version is not None:
            raise InvalidFieldError("the base has no versions", "version")
        return ResolvedAdapters(tenant, BASE)
    if len(task) > MAX_NAME:
        raise NotFoundError(f"there is no task {task[:MAX_NAME]}", "task")
    return ResolvedAdapters(tenant, task, ((await state.resolve(tenant, task, version, user), 1.0),))


async def resolve_adapters(
    state: ServerState, tenant: str, tasks: list[WeightedTask], user: str | None = None
) -> ResolvedAdapters:
    """Resolve several hats that one request wears at once, unmerged."""
    if any(adapter.task == BASE for adapter in tasks):
        raise InvalidFieldError("the base is always worn; list only adapters' tasks", "adapters")
    names = [adapter.task for adapter in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidFieldError(f"the task {twice} is listed twice: a request wears a task once", "adapters")
    adapters = [(await state.resolve(tenant, adapter.task, None, user), adapter.weight) for adapter in tasks]
    _check_prefixes(adapters)
    return ResolvedAdapters(tenant, "+".join(names), tuple(adapters))


def _check_prefixes(adapters: list[tuple[Version, float]]) -> None:
    """Prefixes stand one after another, each whole. Raises `InvalidFieldError` for what does not compose so.

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


async def encode_prompts(state: ServerState, prompts: list[str]) -> list[list[int]]:
    """Tokens of texts."""
    if sum(map(len, prompts)) > THREAD_CHARS:
        return await asyncio.to_thread(lambda: [state.tokenizer.encode(prompt) for prompt in prompts])
    return [state.tokenizer.encode(prompt) for prompt in prompts]


async def encode_chat(state: ServerState, messages: list[Message], resolved: ResolvedAdapters) -> list[int]:
    """Tokens of chat turns, as the adapter, or else the base, writes them."""
    turns: list[tuple[str, str]] = [(message.role, message.content) for message in messages]
    if resolved.prompt_format is None and not state.tokenizer.has_chat_template:
        raise BadRequestError("this base has no chat template: send a prompt", "messages")
    try:
        return await asyncio.to_thread(state.tokenizer.encode_chat, turns, resolved.prompt_format)
    except TemplateError as error:  # many templates refuse turns that do not alternate, or a system turn
        raise BadRequestError(f"the base's chat template refuses these messages: {error}", "messages") from None


def to_sampling(state: ServerState, fields: SamplingFields, max_tokens: int, logprobs: int | None) -> Sampling:
    """The engine's form; a seed is drawn where none was given. Raises `InvalidFieldError` for unknown token ids.

    A temperature under `MIN_TEMPERATURE` is greedy: logits divided by less would not be finite.
    """
    ready = state.ready()
    bias = {int(token): value for token, value in fields.logit_bias.items()}
    if any(token >= ready.spec.vocab_size for token in bias):
        raise InvalidFieldError(f"logit_bias names a token over {ready.spec.vocab_size - 1}", "logit_bias")
    values = fields.model_dump(include=set(SamplingFields.model_fields)) | {"logit_bias": bias}
    values["seed"] = secrets.randbits(63) if fields.seed is None else fields.seed
    values["temperature"] = fields.temperature if fields.temperature >= MIN_TEMPERATURE else 0.0
    return Sampling(max_tokens=max_tokens, logprobs=logprobs, **values)


def check_length(state: ServerState, resolved: ResolvedAdapters, prompts: list[list[int]], max_tokens: int) -> None:
    """Refuse what could never fit, before anything queues. Virtual tokens take positions as a prompt's do."""
    ready = state.ready()
    for prompt in prompts:
        if not prompt:
            raise BadRequestError("the prompt has no tokens", "prompt")
        if max(prompt) >= ready.spec.vocab_size:
            raise InvalidFieldError(
                f"prompt_token_ids has a token over {ready.spec.vocab_size - 1}", "prompt_token_ids"
            )
        if len(prompt) + resolved.num_virtual + max_tokens > ready.max_sequence_tokens:
            virtual = (
                f", its adapters put {resolved.num_virtual} virtual tokens before it," if resolved.num_virtual else ""
            )
            raise BadRequestError(
                f"the prompt has {len(prompt)} tokens{virtual} and max_tokens is {max_tokens}; together they are over "
                f"this server's {ready.max_sequence_tokens}",
                "prompt",
            )
