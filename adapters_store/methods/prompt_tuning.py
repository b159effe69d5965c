"""Compile soft prompts as PEFT writes them: virtual tokens before the prompt, given by their input embeddings.

Prompt tuning (arXiv:2104.08691); p-tuning (arXiv:2103.10385), whose encoder PEFT folds when saving: the file has the
encoder's output; multitask prompt tuning (arXiv:2303.02861): E * (C R), with C and R of a single task.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

import msgspec

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError, MethodUnsupportedError, WrongBaseError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import expect_exactly, finite
from adapters_store.primitives import PrefixEmbeds

EMBEDDINGS, COLS, ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
MAX_RANKS = 4096
SERVED_VALUES: dict[str, tuple[Any, ...]] = {"modules_to_save": (None, [])}
# Initialisation does not change a trained prompt, and embeddings have no heads.
PROMPT_IGNORED_KEYS = {
    "num_attention_heads",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
}
ENCODER_IGNORED_KEYS = {
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
    "num_attention_heads",
}
MULTITASK_IGNORED_KEYS = {*PROMPT_IGNORED_KEYS, "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"}


class VirtualTokens(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The keys of PEFT's PromptLearningConfig that change the computation."""

    num_virtual_tokens: int
    num_transformer_submodules: int = 1
    num_layers: int | None = None
    token_dim: int | None = None


class MultitaskConfig(VirtualTokens, kw_only=True):
    """The keys of PEFT's MultitaskPromptTuningConfig that change the computation."""

    num_tasks: int = 1
    num_ranks: int = 1


T = TypeVar("T", bound=VirtualTokens)


def compile_prompt_tuning(artifact: Artifact, spec: BaseSpec) -> tuple[PrefixEmbeds, ...]:
    """Compile to the saved embeddings, a `PrefixEmbeds`. Raises `ArtifactError`."""
    return compile_embeds(artifact, spec, "prompt tuning", PROMPT_IGNORED_KEYS)


def compile_p_tuning(artifact: Artifact, spec: BaseSpec) -> tuple[PrefixEmbeds, ...]:
    """Compile to the encoder's saved output, a `PrefixEmbeds`. Raises `ArtifactError`."""
    return compile_embeds(artifact, spec, "p-tuning", ENCODER_IGNORED_KEYS)


def compile_embeds(
    artifact: Artifact, spec: BaseSpec, method: str, ignored: Collection[str]
) -> tuple[PrefixEmbeds, ...]:
    """Compile a method whose only tensor is its tokens' embeddings [T, embedding_size]. Raises `ArtifactError`."""
    config = read_virtual_tokens(artifact, spec, VirtualTokens, method, ignored)
    _check_width(config, spec)
    expect_exactly(artifact, {EMBEDDINGS: [config.num_virtual_tokens, spec.embedding_size]})
    return (PrefixEmbeds(artifact.tensors[EMBEDDINGS].float()),)


def compile_multitask(artifact: Artifact, spec: BaseSpec) -> tuple[PrefixEmbeds, ...]:
    """Compile E * (C R): E [T, embedding_size], C [1, T, ranks], R [1, ranks, embedding_size].

    Raises `ArtifactError`.
    """
    config = read_virtual_tokens(artifact, spec, MultitaskConfig, "multitask prompt tuning", MULTITASK_IGNORED_KEYS)
    if config.num_tasks != 1:
        raise MethodUnsupportedError(
            f"num_tasks={config.num_tasks}: an adapter is of one task; save that task's item of {COLS} and {ROWS} "
            "with num_tasks=1",
            "num_tasks",
        )
    _check_width(config, spec)
    num_tokens, num_ranks, size = config.num_virtual_tokens, config.num_ranks, spec.embedding_size
    if not 0 < num_ranks <= MAX_RANKS:
        raise ArtifactError(f"num_ranks={num_ranks} is not between 1 and {MAX_RANKS}", "num_ranks")
    shapes = {EMBEDDINGS: [num_tokens, size], COLS: [1, num_tokens, num_ranks], ROWS: [1, num_ranks, size]}
    expect_exactly(artifact, shapes)
    embeds, cols, rows = (artifact.tensors[name].float() for name in shapes)
    return (PrefixEmbeds(finite(embeds * (cols[0] @ rows[0]), EMBEDDINGS)),)


def read_virtual_tokens(
    artifact: Artifact, spec: BaseSpec, schema: type[T], method: str, ignored: Collection[str]
) -> T:
    """Read the config of a method with virtual tokens, and check it against the base. Raises `ArtifactError`."""
    config = read_config(artifact, schema, method, ignored, SERVED_VALUES)
    if not 0 < config.num_virtual_tokens < spec.max_positions:
        raise ArtifactError(
            f"num_virtual_tokens={config.num_virtual_tokens}: {spec.name} has {spec.max_positions} positions, "
            "and some must be left for a prompt",
            "num_virtual_tokens",
        )
    if config.num_transformer_submodules != 1:
        raise MethodUnsupportedError(
            f"num_transformer_submodules={config.num_transformer_submodules}: a decoder-only base has 1",
            "num_transformer_submodules",
        )
    expect_of_base("num_layers", config.num_layers, spec.num_layers, spec)
    return config


def expect_of_base(key: str, stated: int | None, real: int, spec: BaseSpec) -> None:
    """Raise `WrongBaseError` if a config's number differs from the base's; None is accepted, as PEFT fills it in."""
    if stated is not None and stated != real:
        raise WrongBaseError(f"{key}={stated}: {spec.name} has {real}; the artifact is of another base", key)


def _check_width(config: VirtualTokens, spec: BaseSpec) -> None:
    expect_of_base("token_dim", config.token_dim, spec.embedding_size, spec)
