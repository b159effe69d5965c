"""Read the config that LoHa and LoKr share, which PEFT took from LyCORIS (arXiv:2309.14859)."""

from __future__ import annotations

from functools import cached_property
from typing import Any, TypeVar

import msgspec

from adapters_store.errors import MethodUnsupportedError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.targets import PatternTable, Targets, check_alphas, check_ranks

IGNORED_KEYS = {"init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"}
SERVED_VALUES: dict[str, tuple[Any, ...]] = {"modules_to_save": (None,)}
MAX_RANK, MAX_ALPHA = 1_000_000, 1e6  # in LyCORIS a rank beyond a layer's size selects full matrices


class LycorisConfig(Targets, kw_only=True, dict=True):
    """The keys of PEFT's LycorisConfig that change the computation."""

    r: int
    alpha: int | float
    rank_pattern: dict[str, int] = msgspec.field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = msgspec.field(default_factory=dict)

    def rank(self, site: str) -> int:
        """Return the rank r at a site."""
        return self._ranks[site]

    def scale(self, site: str) -> float:
        """Return the factor of a site's update, alpha / r."""
        return self._alphas[site] / self.rank(site)

    @cached_property
    def _ranks(self) -> PatternTable[int]:
        return PatternTable(self.rank_pattern, self.r)

    @cached_property
    def _alphas(self) -> PatternTable[int | float]:
        return PatternTable(self.alpha_pattern, self.alpha)


Config = TypeVar("Config", bound=LycorisConfig)


def read_lycoris(artifact: Artifact, schema: type[Config], method: str) -> Config:
    """Read a config, its numbers bounded. Raises `ArtifactError`, also if a tensor belongs to a convolution."""
    read = read_config(artifact, schema, method, IGNORED_KEYS, SERVED_VALUES)
    check_ranks("r", read.r, read.rank_pattern, MAX_RANK)
    check_alphas("alpha", read.alpha, read.alpha_pattern, MAX_ALPHA)
    if cores := [name for name in artifact.tensors if name.endswith((".hada_t1", ".hada_t2", ".lokr_t2"))]:
        raise MethodUnsupportedError(f"{method} of a convolution (Tucker's core) is not served: {cores[0]}", cores[0])
    return read
