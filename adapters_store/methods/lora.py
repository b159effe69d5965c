"""Compile LoRA as PEFT writes it (arXiv:2106.09685): with rsLoRA's scale, DoRA's magnitudes, biases, saved modules.

y += s (B (A x) + b), s = alpha / r, or alpha / sqrt(r) with use_rslora (arXiv:2312.03732).
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import Any

import msgspec
import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import MethodUnsupportedError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.embedding_lora import A_END as EMBEDDING_A_END
from adapters_store.methods.shared.embedding_lora import compile_embedding, has_embedding_lora
from adapters_store.methods.shared.expect import PREFIX, by_site, expect_shape, finite
from adapters_store.methods.shared.extras import ExtrasConfig, saved_sites, split_extras
from adapters_store.methods.shared.init_residual import check_init_residual, init_residual
from adapters_store.methods.shared.low_rank import LowRankUpdate, compile_low_rank
from adapters_store.methods.shared.targets import PatternTable, check_alphas, check_ranks, check_targets
from adapters_store.methods.shared.tensor_pool import TensorPool
from adapters_store.primitives import Primitive

A_END, B_END = ".lora_A.weight", ".lora_B.weight"
BIAS_END, MAGNITUDE_END = ".lora_B.bias", ".lora_magnitude_vector"
# Keys that cannot change a trained adapter's output.
IGNORED_KEYS = {
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}
# Keys that change it -> the values that are served.
SERVED_VALUES: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "use_qalora": (False,),
    "velora_config": (None,),
}
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # leave the base's weights unchanged
EXACT_INITS = ("pissa", "olora")  # subtract a part of the base's weights that can be recomputed
INITS_OF_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MAX_RANK, MAX_ALPHA = 4096, 1e6


class LoraConfig(ExtrasConfig, kw_only=True, dict=True):
    """The keys of PEFT's LoraConfig that change the computation."""

    r: int
    lora_alpha: int | float
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, int] = msgspec.field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = msgspec.field(default_factory=dict)
    init_lora_weights: bool | str | None = True

    def rank(self, site: str) -> int:
        """Return the rank r at a site."""
        return self._ranks[site]

    def scale(self, site: str) -> float:
        """Return the factor s of a site's update."""
        alpha, rank = self._alphas[site], self.rank(site)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @cached_property
    def _ranks(self) -> PatternTable[int]:
        return PatternTable(self.rank_pattern, self.r)

    @cached_property
    def _alphas(self) -> PatternTable[int | float]:
        return PatternTable(self.alpha_pattern, self.lora_alpha)

    @property
    def residual_init(self) -> str:
        """Name the initialisation that subtracted a part of the base's weights ("pissa", "olora"); else ""."""
        init = str(self.init_lora_weights)
        return "olora" if init.lower() == "olora" else init if init in EXACT_INITS else ""

    @property
    def ends(self) -> tuple[str, ...]:
        """Return the ends of the names of a site's tensors."""
        ends = {BIAS_END: self.lora_bias, MAGNITUDE_END: self.use_dora}
        return (A_END, B_END, *(end for end, is_used in ends.items() if is_used))


def compile_lora(artifact: Artifact, spec: BaseSpec) -> tuple[Primitive, ...]:
    """Compile to a `LowRank` per site, s folded into B in fp32, and the extras' primitives. Raises `ArtifactError`."""
    config, pool = _read(artifact), TensorPool(artifact)
    at_embedding = [spec.embedding] if has_embedding_lora(artifact, spec) else []
    rows = _rows(config, pool, spec) if at_embedding else []
    parts = split_extras(pool.remaining(), config, spec, *config.ends)
    is_alone = at_embedding and not parts.low_rank.tensors
    sites = {} if is_alone else by_site(parts.low_rank, config.ends, parts.sites, spec.name)
    updates = [_update(artifact, config, site, spec, parts.biases.get(site)) for site in sites]
    can_have = [*parts.sites, *_embedding(config, spec)]
    check_targets(config, [*sites, *at_embedding], can_have, spec, lambda site: _a_name(site, spec))
    if config.residual_init:
        check_init_residual(spec, sites, config.residual_init)
        updates = [_without_init_residual(update, config, spec) for update in updates]
    primitives = [primitive for update in updates for primitive in compile_low_rank(update, spec)]
    return (*primitives, *rows, *parts.primitives)


def _rows(config: LoraConfig, pool: TensorPool, spec: BaseSpec) -> list[Primitive]:
    """Compile a LoRA on the embedding. Raises `MethodUnsupportedError` if another option acts on the embedding too."""
    extras = {
        "ensure_weight_tying": config.ensure_weight_tying,
        "init_lora_weights": bool(config.residual_init),
        "lora_bias": config.lora_bias,
        "modules_to_save": spec.embedding in saved_sites(config, spec),
        "trainable_token_indices": config.trainable_token_indices is not None,
        "use_dora": config.use_dora,
    }
    for key, is_used in extras.items():
        if is_used:
            raise MethodUnsupportedError(f"LoRA on the embedding is not served beside {key}: {spec.embedding}", key)
    return compile_embedding(pool, spec, config.rank(spec.embedding), config.scale(spec.embedding))


def _embedding(config: LoraConfig, spec: BaseSpec) -> list[str]:
    """List the embedding if it may have a LoRA, else nothing."""
    is_taken = config.trainable_token_indices is not None or spec.embedding in saved_sites(config, spec)
    return [] if is_taken or not spec.embedding else [spec.embedding]


def _a_name(site: str, spec: BaseSpec) -> str:
    return PREFIX + site + (EMBEDDING_A_END if site == spec.embedding else A_END)


def _update(
    artifact: Artifact, config: LoraConfig, site: str, spec: BaseSpec, base_bias: Tensor | None
) -> LowRankUpdate:
    linear, rank, scale = spec.linears[site], config.rank(site), config.scale(site)
    size = [linear.out_features]
    a = expect_shape(artifact, PREFIX + site + A_END, [rank, linear.in_features])
    b = expect_shape(artifact, PREFIX + site + B_END, [*size, rank])
    bias = expect_shape(artifact, PREFIX + site + BIAS_END, size).float() * scale if config.lora_bias else None
    magnitude = expect_shape(artifact, PREFIX + site + MAGNITUDE_END, size) if config.use_dora else None
    return LowRankUpdate(site, a.float(), finite(b.float() * scale, PREFIX + site + B_END), magnitude, bias, base_bias)


def _without_init_residual(update: LowRankUpdate, config: LoraConfig, spec: BaseSpec) -> LowRankUpdate:
    """Subtract from the update what initialisation took off the base's weight; the rank doubles."""
    a, b = init_residual(spec, update.site, config.residual_init, config.rank(update.site), config.scale(update.site))
    return dataclasses.replace(update, a=torch.cat([update.a, a]), b=torch.cat([update.b, -b], dim=1))


def _read(artifact: Artifact) -> LoraConfig:
    read = read_config(artifact, LoraConfig, "LoRA", IGNORED_KEYS, SERVED_VALUES)
    if read.lora_bias and (read.use_dora or read.residual_init):
        raise MethodUnsupportedError("PEFT has no lora_bias with use_dora, pissa or olora", "lora_bias")
    if not read.residual_init:
        _check_init(read.init_lora_weights)
    check_ranks("r", read.r, read.rank_pattern, MAX_RANK)
    check_alphas("lora_alpha", read.lora_alpha, read.alpha_pattern, MAX_ALPHA)
    return read


def _check_init(init: bool | str | None) -> None:
    if init in INITS:
        return
    if str(init).lower().startswith(INITS_OF_ANOTHER_BASE):
        raise MethodUnsupportedError(
            f"init_lora_weights={str(init)[:40]} is relative to a changed base; "
            "save with path_initial_model_for_weight_conversion to get a plain LoRA",
            "init_lora_weights",
        )
    raise MethodUnsupportedError(f"init_lora_weights={str(init)[:40]} is not known", "init_lora_weights")
