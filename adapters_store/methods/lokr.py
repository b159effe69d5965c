"""Compile LoKr as PEFT writes it (arXiv:2309.14859): dW = s kron(W1, W2), s = alpha / r, each factor full or of rank r.

W1 [l, m] and W2 [k, n] with l k = out and m n = in, given by `factorization`. As kron(P Q, R S) = kron(P, R)
kron(Q, S), the rank of dW is that of W1 times that of W2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.expect import PREFIX, finite
from adapters_store.methods.shared.linears import is_low_rank, linears_of
from adapters_store.methods.shared.lycoris import LycorisConfig, read_lycoris
from adapters_store.primitives import Delta, LowRank

W1, W2 = ".lokr_w1", ".lokr_w2"
ENDS = tuple(matrix + part for matrix in (W1, W2) for part in ("", "_a", "_b"))


class LokrConfig(LycorisConfig, kw_only=True):
    """The keys of PEFT's LoKrConfig that change the computation."""

    decompose_both: bool = False
    decompose_factor: int = -1

    def shapes(self, site: str, linear: LinearSite) -> dict[str, list[int]]:
        """Return the shapes of a site's tensors, by the end of their names."""
        rank, (rows1, rows2) = self.rank(site), factorization(linear.out_features, self.decompose_factor)
        columns1, columns2 = factorization(linear.in_features, self.decompose_factor)
        is_whole = not self.decompose_both
        return _matrix(W1, rows1, columns1, rank, is_whole) | _matrix(W2, rows2, columns2, rank, is_whole=False)


def compile_lokr(artifact: Artifact, spec: BaseSpec) -> Iterator[LowRank | Delta]:
    """Compile to a `LowRank` per site, or a `Delta` if that has fewer numbers. Raises `ArtifactError`."""
    config = read_lycoris(artifact, LokrConfig, "LoKr")
    sites = linears_of(artifact, config, spec, ENDS, config.shapes)
    return (_update(artifact, site, config.scale(site), spec.linears[site]) for site in sites)


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Split a size into two factors, as PEFT does: `factor` comes first if it divides the size.

    Else the first is the greatest divisor up to `factor` (-1: any) and up to the square root.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    max_factor = math.isqrt(size) if factor == -1 else min(math.isqrt(size), max(factor, 1))
    first = next(divisor for divisor in range(max_factor, 0, -1) if size % divisor == 0)
    return first, size // first


def _matrix(end: str, rows: int, columns: int, rank: int, is_whole: bool) -> dict[str, list[int]]:
    if is_whole or rank >= max(rows, columns) / 2:
        return {end: [rows, columns]}
    return {f"{end}_a": [rows, rank], f"{end}_b": [rank, columns]}


def _update(artifact: Artifact, site: str, scale: float, linear: LinearSite) -> LowRank | Delta:
    tensors = {end: tensor.float() for end in ENDS if (tensor := artifact.tensors.get(PREFIX + site + end)) is not None}
    name = PREFIX + site + next(iter(tensors))
    if not is_low_rank(_rank(tensors, W1) * _rank(tensors, W2), linear):
        return Delta(site, finite(torch.kron(_whole(tensors, W1), _whole(tensors, W2)) * scale, name))
    (left1, right1), (left2, right2) = _factors(tensors, W1), _factors(tensors, W2)
    return LowRank(site, finite(torch.kron(right1, right2), name), finite(torch.kron(left1, left2) * scale, name))


def _rank(tensors: dict[str, Tensor], end: str) -> int:
    """Return an upper bound of a factor's rank."""
    return min(tensors[end].shape) if end in tensors else tensors[f"{end}_b"].shape[0]


def _whole(tensors: dict[str, Tensor], end: str) -> Tensor:
    return tensors[end] if end in tensors else tensors[f"{end}_a"] @ tensors[f"{end}_b"]


def _factors(tensors: dict[str, Tensor], end: str) -> tuple[Tensor, Tensor]:
    """Return a factor as [rows, rank] and [rank, columns]; a full matrix is paired with a unit matrix."""
    if end not in tensors:
        return tensors[f"{end}_a"], tensors[f"{end}_b"]
    whole = tensors[end]
    unit = torch.eye(min(whole.shape))
    return (unit, whole) if whole.shape[0] <= whole.shape[1] else (whole, unit)
