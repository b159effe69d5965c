"""Compile VeRA as PEFT writes it (arXiv:2310.11454): y += b * (B (d * (A x))), A and B random and shared by all sites.

A [r, largest in] and B [largest out, r] are cut to each site's size; only d [r] and b [out] are trained. With
save_projection=false A and B are drawn again from projection_prng_key, as PEFT draws them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import PREFIX, expect_shape, finite
from adapters_store.methods.shared.linears import is_low_rank, linears_of
from adapters_store.methods.shared.targets import Targets
from adapters_store.primitives import Delta, LowRank

A_NAME, B_NAME = "base_model.vera_A", "base_model.vera_B"
B_END, D_END = ".vera_lambda_b", ".vera_lambda_d"
IGNORED_KEYS = {"d_initial", "fan_in_fan_out", "init_weights", "vera_dropout"}
SERVED_VALUES: dict[str, tuple[Any, ...]] = {"bias": ("none",), "modules_to_save": (None, [])}
MAX_RANK = 4096
SEEDS = range(-(2**63), 2**64)  # the range of torch's generators


class VeraConfig(Targets, kw_only=True):
    """The keys of PEFT's VeraConfig that change the computation."""

    r: int
    projection_prng_key: int = 0
    save_projection: bool = True


def compile_vera(artifact: Artifact, spec: BaseSpec) -> Iterator[LowRank | Delta]:
    """Compile to a `LowRank` per site, b and d folded in, or a `Delta` if that is smaller. Raises `ArtifactError`."""
    config = _read(artifact)
    trained = {name: tensor for name, tensor in artifact.tensors.items() if name not in (A_NAME, B_NAME)}

    def shapes(_site: str, linear: LinearSite) -> dict[str, list[int]]:
        return {B_END: [linear.out_features], D_END: [config.r]}

    alone = dataclasses.replace(artifact, tensors=trained)
    sites = linears_of(alone, config, spec, (B_END, D_END), shapes, takes_conv1d=True)
    width = max(spec.linears[site].in_features for site in sites)
    height = max(spec.linears[site].out_features for site in sites)
    a, b = _projections(artifact, config, width, height)
    return (_update(artifact, site, a, b, spec) for site in sites)


def draw_projections(key: int, rank: int, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Draw A [rank, width] and B [height, rank] from a seed, uniform, with PEFT's generator and in its order."""
    generator = torch.Generator("cpu").manual_seed(key)
    a_bound, b_bound = (math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in)) for fan_in in (width, rank))
    a = torch.empty(rank, width, dtype=torch.float32).uniform_(-a_bound, a_bound, generator=generator)
    b = torch.empty(height, rank, dtype=torch.float32).uniform_(-b_bound, b_bound, generator=generator)
    return a, b


def _projections(artifact: Artifact, config: VeraConfig, width: int, height: int) -> tuple[Tensor, Tensor]:
    if config.save_projection:
        a = expect_shape(artifact, A_NAME, [config.r, width])
        return a.float(), expect_shape(artifact, B_NAME, [height, config.r]).float()
    if extra := [name for name in (A_NAME, B_NAME) if name in artifact.tensors]:
        raise ArtifactError(f"the tensor {extra[0]} is extra: the config has save_projection=false", extra[0])
    return draw_projections(config.projection_prng_key, config.r, width, height)


def _update(artifact: Artifact, site: str, a: Tensor, b: Tensor, spec: BaseSpec) -> LowRank | Delta:
    linear, name = spec.linears[site], PREFIX + site + B_END
    trained_b, trained_d = artifact.tensors[name].float(), artifact.tensors[PREFIX + site + D_END].float()
    a, b = a[:, : linear.in_features].contiguous(), trained_b[:, None] * b[: linear.out_features] * trained_d
    if is_low_rank(len(a), linear):
        return LowRank(site, a, finite(b, name))
    return Delta(site, finite(b @ a, name))


def _read(artifact: Artifact) -> VeraConfig:
    read = read_config(artifact, VeraConfig, "VeRA", IGNORED_KEYS, SERVED_VALUES)
    if not 0 < read.r <= MAX_RANK:
        raise ArtifactError(f"r has the rank {read.r}, which is not between 1 and {MAX_RANK}", "r")
    if read.projection_prng_key not in SEEDS:
        raise ArtifactError("projection_prng_key is no seed: it has more than 64 bits", "projection_prng_key")
    return read
