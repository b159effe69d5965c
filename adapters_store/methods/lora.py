"""LoRA as PEFT writes it (arXiv:2106.09685), with rsLoRA's scale (arXiv:2312.03732) and per-module patterns.

y += s B (A x), s = alpha / r, or alpha / sqrt(r) with use_rslora.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from adapters_store.artifact import Artifact
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.methods.common import (
    PREFIX,
    Targets,
    by_pattern,
    by_site,
    check_patterns,
    check_targets,
    expect_shape,
    finite,
    read_config,
)
from adapters_store.patch import LowRank
from adapters_store.spec import BaseSpec

A_END, B_END = ".lora_A.weight", ".lora_B.weight"
# These cannot change what a trained adapter answers.
SILENT = {
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}
# These change it, and only these values of them are served.
SERVED_VALUES: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "ensure_weight_tying": (False,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "modules_to_save": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # they leave the base's weights as they are
INITS_OF_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
MAX_RANK, MAX_ALPHA = 4096, 1e6


class LoraConfig(Targets, kw_only=True):
    """The keys of PEFT's LoraConfig that say what to compute."""

    r: int
    lora_alpha: int | float
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] = msgspec.field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = msgspec.field(default_factory=dict)
    init_lora_weights: bool | str | None = True

    def rank(self, site: str) -> int:
        """The rank at a site."""
        return int(by_pattern(self.rank_pattern, site, self.r))

    def scale(self, site: str) -> float:
        """The scale at a site."""
        alpha, rank = by_pattern(self.alpha_pattern, site, self.lora_alpha), self.rank(site)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def compile_lora(artifact: Artifact, spec: BaseSpec) -> tuple[LowRank, ...]:
    """One `LowRank` a site, the scale folded into B once, in fp32. Raises `ArtifactError`."""
    config = _read(artifact.config)
    if embedded := [name for name in artifact.tensors if "lora_embedding_" in name]:
        raise MethodUnsupportedError(f"LoRA on embeddings is not served: {embedded[0]}", embedded[0])
    sites = by_site(artifact, (A_END, B_END), spec.linears, spec.name)
    made = tuple(_low_rank(artifact, config, site, spec) for site in sites)
    check_targets(config, sites, spec.linears, spec, lambda site: PREFIX + site + A_END)
    return made


def _low_rank(artifact: Artifact, config: LoraConfig, site: str, spec: BaseSpec) -> LowRank:
    linear, rank = spec.linears[site], config.rank(site)
    a = expect_shape(artifact, PREFIX + site + A_END, [rank, linear.in_features])
    b = expect_shape(artifact, PREFIX + site + B_END, [linear.out_features, rank])
    return LowRank(site, a.float(), finite(b.float() * config.scale(site), PREFIX + site + B_END))


def _read(config: dict[str, Any]) -> LoraConfig:
    read = read_config(config, LoraConfig, "LoRA", SILENT, SERVED_VALUES)
    _check_init(read.init_lora_weights)
    check_patterns(read.rank_pattern, "rank_pattern")
    check_patterns(read.alpha_pattern, "alpha_pattern")
    for name, rank in [("r", read.r), *(("rank_pattern", rank) for rank in read.rank_pattern.values())]:
        if not 0 < rank <= MAX_RANK:
            raise ArtifactError(f"{name} has the rank {rank}, which is not between 1 and {MAX_RANK}", name)
    for name, alpha in [
        ("lora_alpha", read.lora_alpha),
        *(("alpha_pattern", alpha) for alpha in read.alpha_pattern.values()),
    ]:
        if not 0 < abs(alpha) <= MAX_ALPHA:
            raise ArtifactError(f"{name} has the alpha {alpha:g}: it must not be 0, nor beyond {MAX_ALPHA:g}", name)
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
