"""Compile AdaLoRA as PEFT writes it (arXiv:2303.10512): LoRA by singular values, with a rank per site set in training.

y += alpha / (init_r + 1e-5) B (E * (A x)), A [rank, in], E [rank, 1], B [out, rank]. `rank_pattern` says, for each
site's E, which of its init_r values were kept.
"""

from __future__ import annotations

from typing import Any

import msgspec
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.methods import lora
from adapters_store.methods.lora import MAX_ALPHA, MAX_RANK
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import PREFIX, by_site, expect_shape, finite
from adapters_store.methods.shared.extras import ExtrasConfig, split_extras
from adapters_store.methods.shared.low_rank import LowRankUpdate, compile_low_rank
from adapters_store.methods.shared.targets import check_targets
from adapters_store.primitives import Primitive

ENDS = A_END, B_END, E_END = ".lora_A", ".lora_B", ".lora_E"
# PEFT's AdaLoRA ignores these of LoRA's keys; the others describe training.
IGNORED_KEYS = lora.IGNORED_KEYS | {
    "alpha_pattern",
    "beta1",
    "beta2",
    "deltaT",
    "fan_in_fan_out",
    "init_lora_weights",
    "orth_reg_weight",
    "r",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
    "use_rslora",
}
SERVED_VALUES: dict[str, tuple[Any, ...]] = {**lora.SERVED_VALUES, "lora_bias": (False,), "use_dora": (False,)}
EPS = 1e-5  # PEFT adds it to the rank that alpha is divided by


class AdaLoraConfig(ExtrasConfig, kw_only=True):
    """The keys of PEFT's AdaLoraConfig that change the computation."""

    lora_alpha: int | float
    init_r: int
    rank_pattern: dict[str, list[bool]] = msgspec.field(default_factory=dict)

    def rank(self, site: str) -> int:
        """Return the rank that is left at a site after pruning."""
        return sum(self.rank_pattern.get(site + E_END, [True] * self.init_r))

    def scale(self, site: str) -> float:
        """Return the factor of a site's update: alpha by the initial rank, whatever rank is left."""
        return (self.lora_alpha if self.lora_alpha > 0 else self.rank(site)) / (self.init_r + EPS)


def compile_adalora(artifact: Artifact, spec: BaseSpec) -> tuple[Primitive, ...]:
    """Compile to a `LowRank` per site that has a rank left, and the extras' primitives. Raises `ArtifactError`."""
    config = read_config(artifact, AdaLoraConfig, "AdaLoRA", IGNORED_KEYS, SERVED_VALUES)
    _check_numbers(config)
    parts = split_extras(artifact, config, spec, *ENDS)
    sites = by_site(parts.low_rank, ENDS, parts.sites, spec.name)
    if unknown := sorted(config.rank_pattern.keys() - {site + E_END for site in sites}):
        raise ArtifactError(f"rank_pattern has {unknown[0][:200]}, which is no tensor's name", "rank_pattern")
    updates = [_update(artifact, config, site, spec, parts.biases.get(site)) for site in sites]
    check_targets(config, sites, parts.sites, spec, lambda site: PREFIX + site + A_END)
    primitives = [primitive for update in updates for primitive in compile_low_rank(update, spec)]
    return (*primitives, *parts.primitives)


def _update(
    artifact: Artifact, config: AdaLoraConfig, site: str, spec: BaseSpec, base_bias: Tensor | None
) -> LowRankUpdate:
    linear, rank, name = spec.linears[site], config.rank(site), PREFIX + site
    a = expect_shape(artifact, name + A_END, [rank, linear.in_features]).float()
    b = expect_shape(artifact, name + B_END, [linear.out_features, rank]).float()
    e = expect_shape(artifact, name + E_END, [rank, 1]).float()
    return LowRankUpdate(
        site, finite(a * e, name + A_END), finite(b * config.scale(site), name + B_END), base_bias=base_bias
    )


def _check_numbers(config: AdaLoraConfig) -> None:
    if not 0 < config.init_r <= MAX_RANK:
        raise ArtifactError(f"init_r is {config.init_r}, which is not between 1 and {MAX_RANK}", "init_r")
    if abs(config.lora_alpha) > MAX_ALPHA:
        raise ArtifactError(f"lora_alpha is {config.lora_alpha:g}, beyond {MAX_ALPHA:g}", "lora_alpha")
    if wrong := [name for name, kept in config.rank_pattern.items() if len(kept) != config.init_r]:
        raise ArtifactError(f"rank_pattern has not init_r={config.init_r} values for {wrong[0][:200]}", "rank_pattern")
