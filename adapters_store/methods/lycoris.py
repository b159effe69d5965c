"""What LoHa and LoKr share, which PEFT took from LyCORIS (arXiv:2309.14859): their config and their sites."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

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
    expect_exactly,
    read_config,
)
from adapters_store.spec import BaseSpec, LinearSite

SILENT = {"init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"}
SERVED_VALUES: dict[str, tuple[Any, ...]] = {"modules_to_save": (None,)}
MAX_RANK, MAX_ALPHA = 1_000_000, 1e6  # a rank beyond a layer's size is LyCORIS's way to ask for whole matrices


class LycorisConfig(Targets, kw_only=True):
    """The keys of PEFT's LycorisConfig that say what to compute."""

    r: int
    alpha: int | float
    rank_pattern: dict[str, int] = msgspec.field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = msgspec.field(default_factory=dict)

    def rank(self, site: str) -> int:
        """The rank at a site."""
        return int(by_pattern(self.rank_pattern, site, self.r))

    def scale(self, site: str) -> float:
        """What a site's update is multiplied by."""
        return by_pattern(self.alpha_pattern, site, self.alpha) / self.rank(site)


Config = TypeVar("Config", bound=LycorisConfig)


def read_lycoris(artifact: Artifact, schema: type[Config], method: str) -> Config:
    """The config, its numbers bounded. Raises `ArtifactError`, also where a tensor is of a convolution."""
    read = read_config(artifact.config, schema, method, SILENT, SERVED_VALUES)
    check_patterns(read.rank_pattern, "rank_pattern")
    check_patterns(read.alpha_pattern, "alpha_pattern")
    for name, rank in [("r", read.r), *(("rank_pattern", rank) for rank in read.rank_pattern.values())]:
        if not 0 < rank <= MAX_RANK:
            raise ArtifactError(f"{name} has the rank {rank}, which is not between 1 and {MAX_RANK}", name)
    for name, alpha in [("alpha", read.alpha), *(("alpha_pattern", alpha) for alpha in read.alpha_pattern.values())]:
        if not 0 < abs(alpha) <= MAX_ALPHA:
            raise ArtifactError(f"{name} has the alpha {alpha:g}: it must not be 0, nor beyond {MAX_ALPHA:g}", name)
    if cores := [name for name in artifact.tensors if name.endswith((".hada_t1", ".hada_t2", ".lokr_t2"))]:
        raise MethodUnsupportedError(f"{method} of a convolution (Tucker's core) is not served: {cores[0]}", cores[0])
    return read


def sites_of(
    artifact: Artifact,
    config: LycorisConfig,
    spec: BaseSpec,
    ends: Collection[str],
    shapes: Callable[[str, LinearSite], dict[str, list[int]]],
) -> list[str]:
    """The sites of an artifact that has exactly the tensors whose ends and shapes `shapes` gives for each of them."""
    sites = by_site(artifact, tuple(ends), spec.linears, spec.name)
    if transposed := [site for site in sites if spec.linears[site].is_transposed]:
        name = next(name for name in artifact.tensors if name.startswith(f"{PREFIX}{transposed[0]}."))
        raise MethodUnsupportedError(f"{name} acts on a Conv1D, for which PEFT does not have this method", name)
    expected = {PREFIX + site + end: need for site in sites for end, need in shapes(site, spec.linears[site]).items()}
    expect_exactly(artifact, expected)

    def a_tensor(site: str) -> str:
        return PREFIX + site + next(iter(shapes(site, spec.linears[site])))

    check_targets(config, sites, spec.linears, spec, a_tensor)
    return list(sites)


def is_low_rank(rank: int, linear: LinearSite) -> bool:
    """Whether an update of a rank holds fewer numbers as two factors than whole."""
    return rank * (linear.in_features + linear.out_features) < linear.in_features * linear.out_features
