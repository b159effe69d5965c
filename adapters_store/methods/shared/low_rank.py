"""A trained linear of PEFT's LoRA family, as primitives: its low-rank branch, DoRA's magnitude, and its biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.base.weights import base_weight
from adapters_store.methods.shared.expect import finite
from adapters_store.primitives import Bias, LowRank, Primitive, Scale


@dataclass(frozen=True)
class LowRankUpdate:
    """A [r, in] and B [out, r] with the scale folded in, and what the artifact has beside them, [out] each.

    `magnitude` is DoRA's (arXiv:2402.09353), `bias` is added by the branch, `base_bias` replaces the base's.
    """

    site: str
    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    base_bias: Tensor | None = None


def compile_low_rank(update: LowRankUpdate, spec: BaseSpec) -> list[Primitive]:
    """`LowRank`, with a magnitude m also `Scale(v)`, v = m / |W + B A|, by rows, and `Bias` where one is needed.

    PEFT's DoRA answers v (W + B A) x + b, so the base's bias, which `Scale` scales too, is made good by the `Bias`.
    Raises `ArtifactError` where a number is not finite.
    """
    site, v, b, primitives = update.site, None, update.b, list[Primitive]()
    if update.magnitude is not None:
        v = finite(update.magnitude.float() / _norms(update, spec), f"{site}.lora_magnitude_vector")
        b = finite(v[:, None] * b, f"{site}.lora_B")
        primitives.append(Scale(site, v))
    if len(update.a):  # AdaLoRA leaves some sites without a rank
        primitives.append(LowRank(site, update.a, b))
    bias = _bias(update, v, spec)
    return primitives if bias is None else [*primitives, Bias(site, finite(bias, f"{site}.bias"))]


def linear_weight(spec: BaseSpec, site: str) -> Tensor:
    """The base's weight at a linear as [out, in]."""
    weight = base_weight(spec, f"{site}.weight")
    return weight.T if spec.linears[site].is_transposed else weight


def _norms(update: LowRankUpdate, spec: BaseSpec) -> Tensor:
    norms: Tensor = torch.linalg.norm(linear_weight(spec, update.site) + update.b @ update.a, dim=1)
    return norms


def _bias(update: LowRankUpdate, v: Tensor | None, spec: BaseSpec) -> Tensor | None:
    """What makes v (W x + b) into v W x + b' + the branch's own; None where that is nothing."""
    is_scaled = v is not None and spec.linears[update.site].has_bias
    if not is_scaled and update.base_bias is None and update.bias is None:
        return None
    change = torch.zeros(len(update.b)) if update.bias is None else update.bias.float()
    if is_scaled or update.base_bias is not None:
        base = base_weight(spec, f"{update.site}.bias")
        new = base if update.base_bias is None else update.base_bias.float()
        change = change + new - (base if v is None else v * base)
    return change
