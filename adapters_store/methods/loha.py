"""Compile LoHa as PEFT writes it (FedPara, arXiv:2108.06098): dW = s (W1a W1b) * (W2a W2b), by elements, s = alpha / r.

Its rank is at most r^2: by the Khatri-Rao product of the factors' columns and rows, dW = s (W1a . W2a) (W1b . W2b).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.expect import PREFIX, finite
from adapters_store.methods.shared.linears import is_low_rank, linears_of
from adapters_store.methods.shared.lycoris import LycorisConfig, read_lycoris
from adapters_store.primitives import Delta, LowRank

ENDS = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")


class LohaConfig(LycorisConfig, kw_only=True):
    """The keys of PEFT's LoHaConfig that change the computation."""


def compile_loha(artifact: Artifact, spec: BaseSpec) -> Iterator[LowRank | Delta]:
    """Compile to a `LowRank` of rank r^2 per site, or a `Delta` if that has fewer numbers. Raises `ArtifactError`."""
    config = read_lycoris(artifact, LohaConfig, "LoHa")

    def shapes(site: str, linear: LinearSite) -> dict[str, list[int]]:
        a, b = [linear.out_features, config.rank(site)], [config.rank(site), linear.in_features]
        return dict(zip(ENDS, (a, b, a, b), strict=True))

    sites = linears_of(artifact, config, spec, ENDS, shapes)
    return (_update(artifact, site, config.rank(site), config.scale(site), spec) for site in sites)


def _update(artifact: Artifact, site: str, rank: int, scale: float, spec: BaseSpec) -> LowRank | Delta:
    names = [PREFIX + site + end for end in ENDS]
    a1, b1, a2, b2 = (artifact.tensors[name].float() for name in names)
    if not is_low_rank(rank**2, spec.linears[site]):
        return Delta(site, finite((a1 @ b1) * (a2 @ b2) * scale, names[0]))
    return LowRank(
        site, finite(_columns(b1.T, b2.T).T.contiguous(), names[1]), finite(_columns(a1, a2) * scale, names[0])
    )


def _columns(left: Tensor, right: Tensor) -> Tensor:
    """Multiply columns pairwise: [n, r] and [n, r] -> [n, r^2]; column i r + j is the product of columns i and j."""
    return (left[:, :, None] * right[:, None, :]).flatten(1)
