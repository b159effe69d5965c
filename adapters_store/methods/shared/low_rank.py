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
class Branch:
    """A [r, in] and B [out, r] with the scale folded in, and what the artifact has beside them, [out] each.

    `magnitude` is DoRA's (arXiv:2402.09353), `bias` is added by the branch, `base_bias` replaces the base's.
    """

    site: str
    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    base_bias: Tensor | None = None


def compile_branch(branch: Branch, spec: BaseSpec) -> list[Primitive]:
    """`LowRank`, with a magnitude m also `Scale(v)`, v = m / |W + B A|, by rows, and `Bias` where one is needed.

    PEFT's DoRA answers v (W + B A) x + b, so the base's bias, which `Scale` scales too, is made good by the `Bias`.
    Raises `ArtifactError` where a number is not finite.
    """
    site, v, b, made = branch.site, None, branch.b, list[Primitive]()
    if branch.magnitude is not None:
        v = finite(branch.magnitude.float() / _norms(branch, spec), f"{site}.lora_magnitude_vector")
        b = finite(v[:, None] * b, f"{site}.lora_B")
        made.append(Scale(site, v))
    if len(branch.a):  # AdaLoRA leaves some sites without a rank
        made.append(LowRank(site, branch.a, b))
    bias = _bias(branch, v, spec)
    return made if bias is None else [*made, Bias(site, finite(bias, f"{site}.bias"))]


def linear_weight(spec: BaseSpec, site: str) -> Tensor:
    """The base's weight at a linear as [out, in]."""
    weight = base_weight(spec, f"{site}.weight")
    return weight.T if spec.linears[site].is_transposed else weight


def _norms(branch: Branch, spec: BaseSpec) -> Tensor:
    norms: Tensor = torch.linalg.norm(linear_weight(spec, branch.site) + branch.b @ branch.a, dim=1)
    return norms


def _bias(branch: Branch, v: Tensor | None, spec: BaseSpec) -> Tensor | None:
    """What makes v (W x + b) into v W x + b' + the branch's own; None where that is nothing."""
    is_scaled = v is not None and spec.linears[branch.site].has_bias
    if not is_scaled and branch.base_bias is None and branch.bias is None:
        return None
    change = torch.zeros(len(branch.b)) if branch.bias is None else branch.bias.float()
    if is_scaled or branch.base_bias is not None:
        base = base_weight(spec, f"{branch.site}.bias")
        new = base if branch.base_bias is None else branch.base_bias.float()
        change = change + new - (base if v is None else v * base)
    return change
