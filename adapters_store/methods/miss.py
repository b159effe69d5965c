"""Compile MiSS as PEFT writes it (arXiv:2409.15371): y += M^T S x, S sums x over positions that are equal modulo r.

M is [r, out]; with init_weights="mini" it is [r, mini_r], repeated over the output. With "bat" M is [out / r, r, r],
a block for every r outputs, and W becomes W + W M + M, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.base.weights import base_weight
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import PREFIX, finite
from adapters_store.methods.shared.linears import is_low_rank, linears_of
from adapters_store.methods.shared.targets import Targets
from adapters_store.primitives import Delta, LowRank

END = ".miss_block"
IGNORED_KEYS = {"miss_dropout"}
SERVED_VALUES: dict[str, tuple[Any, ...]] = {"bias": ("none",), "modules_to_save": (None, [])}


class MissConfig(Targets, kw_only=True):
    """The keys of PEFT's MissConfig that change the computation."""

    r: int
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True

    def shapes(self, site: str, linear: LinearSite) -> dict[str, list[int]]:
        """Return the shape of a site's tensor by its name's end. Raises `ArtifactError` if r or mini_r does not fit."""
        if self.r > linear.in_features:
            raise ArtifactError(f"r has the rank {self.r}, but {site} has {linear.in_features} inputs", "r")
        if self.init_weights == "mini" and linear.out_features % self.mini_r:
            raise ArtifactError(f"mini_r is {self.mini_r}, which does not divide the outputs of {site}", "mini_r")
        if self.init_weights == "mini":
            return {END: [self.r, self.mini_r]}
        if self.init_weights != "bat":
            return {END: [self.r, linear.out_features]}
        if linear.in_features % self.r or linear.out_features % self.r:
            raise ArtifactError(f"r is {self.r}, which does not divide {site} into blocks", "r")
        return {END: [linear.out_features // self.r, self.r, self.r]}


def compile_miss(artifact: Artifact, spec: BaseSpec) -> Iterator[LowRank | Delta]:
    """Compile to a `LowRank` per site, or a `Delta` for "bat" or if that is smaller. Raises `ArtifactError`."""
    config = read_config(artifact, MissConfig, "MiSS", IGNORED_KEYS, SERVED_VALUES)
    for name, rank in (("r", config.r), ("mini_r", config.mini_r)):
        if rank < 1:
            raise ArtifactError(f"{name} has the rank {rank}, which is not at least 1", name)
    sites = linears_of(artifact, config, spec, (END,), config.shapes)
    make = _block_by_block if config.init_weights == "bat" else _sums
    return (make(artifact, site, spec) for site in sites)


def _sums(artifact: Artifact, site: str, spec: BaseSpec) -> LowRank | Delta:
    linear, block = spec.linears[site], artifact.tensors[PREFIX + site + END].float()
    sums = torch.eye(len(block)).repeat(1, -(-linear.in_features // len(block)))[:, : linear.in_features].contiguous()
    b = block.repeat(1, linear.out_features // block.shape[1]).T.contiguous()
    return LowRank(site, sums, b) if is_low_rank(len(block), linear) else Delta(site, b @ sums)


def _block_by_block(artifact: Artifact, site: str, spec: BaseSpec) -> Delta:
    name, weight = PREFIX + site + END, base_weight(spec, f"{site}.weight")
    block = artifact.tensors[name].float()
    size = block.shape[1]
    blocks = weight.reshape(len(block), size, -1, size).transpose(1, 2)  # [out / r, in / r, r, r]
    dw = blocks @ block[:, None] + block[:, None]
    return Delta(site, finite(dw.transpose(1, 2).reshape(weight.shape), name))
