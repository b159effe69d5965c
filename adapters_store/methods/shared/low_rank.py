"""Compile a linear trained by PEFT's LoRA family: its low-rank update, DoRA's magnitude, and its biases."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.base.weights import base_weight
from adapters_store.methods.shared.expect import finite
from adapters_store.primitives import Bias, LowRank, Primitive, Scale

MIN_ROUNDING = 1e-5  # relative: what a decomposition or a norm in fp32 is off by on another machine


@dataclass(frozen=True)
class LowRankUpdate:
    """A linear's update: A [r, in] and B [out, r] with the scale folded in, and optional vectors [out].

    `magnitude` is DoRA's (arXiv:2402.09353), `bias` is added by the update, `base_bias` replaces the base's.
    """

    site: str
    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    base_bias: Tensor | None = None


def compile_low_rank(update: LowRankUpdate, spec: BaseSpec) -> list[Primitive]:
    """Compile to `LowRank`; with a magnitude m also to `Scale(v)`, v = m / |W + B A| by rows; and to `Bias` if needed.

    PEFT's DoRA computes v (W + B A) x + b: the `Bias` restores the base's bias, which `Scale` multiplies too.
    Raises `ArtifactError` if a number is not finite.
    """
    site, v, b, primitives = update.site, None, update.b, list[Primitive]()
    if update.magnitude is not None:
        v = finite(update.magnitude.float() / _norms(update, spec), f"{site}.lora_magnitude_vector")
        v = torch.where((v - 1).abs() < MIN_ROUNDING, 1.0, v)  # or rounding would give the base's bias another
        b = finite(v[:, None] * b, f"{site}.lora_B")
        primitives.append(Scale(site, v))
    if len(update.a):  # AdaLoRA prunes some sites to rank 0
        primitives.append(LowRank(site, update.a, b))
    bias = _bias(update, v, spec)
    return primitives if bias is None else [*primitives, Bias(site, finite(bias, f"{site}.bias"))]


def linear_weight(spec: BaseSpec, site: str) -> Tensor:
    """Return the base's weight of a linear as [out, in], fp32."""
    weight = base_weight(spec, f"{site}.weight")
    return weight.T if spec.linears[site].is_transposed else weight


def _norms(update: LowRankUpdate, spec: BaseSpec) -> Tensor:
    norms: Tensor = torch.linalg.norm(linear_weight(spec, update.site) + update.b @ update.a, dim=1)
    return norms


def _bias(update: LowRankUpdate, v: Tensor | None, spec: BaseSpec) -> Tensor | None:
    """Compute the bias that turns v (W x + b) into v W x + b' + the update's own; None if there is nothing to add."""
    is_scaled = v is not None and spec.linears[update.site].has_bias
    if not is_scaled and update.base_bias is None and update.bias is None:
        return None
    change = torch.zeros(len(update.b)) if update.bias is None else update.bias.float()
    if is_scaled or update.base_bias is not None:
        base = base_weight(spec, f"{update.site}.bias")
        new = base if update.base_bias is None else update.base_bias.float()
        change = change + new - (base if v is None else v * base)
    return change
