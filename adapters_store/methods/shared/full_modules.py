"""Compile modules that an artifact has in full (linears, norms, the embedding) to updates of the base's own.

Parameters have the shapes of transformers (`parameters`); None stands for the base's. A parameter that equals the
base's compiles to no primitive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.base.weights import base_weight
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.methods.shared.expect import finite
from adapters_store.methods.shared.unused_tensors import mark_redundant
from adapters_store.primitives import Bias, Delta, Primitive, Rows, Scale


def parameters(spec: BaseSpec, site: str) -> dict[str, list[int]]:
    """Return the shapes of a site's parameters by name; empty if the site is no linear, norm or embedding."""
    if site in spec.linears:
        linear = spec.linears[site]
        sizes = [linear.out_features, linear.in_features]
        return _with_bias(sizes[::-1] if linear.is_transposed else sizes, linear.out_features, linear.has_bias)
    if site in spec.norms:
        norm = spec.norms[site]
        return _with_bias([norm.size], norm.size, norm.has_bias)
    return {"weight": [spec.vocab_size, spec.embedding_size]} if site == spec.embedding else {}


def replace_module(spec: BaseSpec, site: str, weight: Tensor | None, bias: Tensor | None) -> list[Primitive]:
    """Compile to updates that give the module at a site these parameters. Raises `ArtifactError`."""
    if site in spec.linears:
        primitives = replace_linear(spec, site, weight, bias)
    elif site in spec.norms:
        primitives = replace_norm(spec, site, weight, bias)
    else:
        primitives = [] if weight is None else replace_embedding(spec, site, weight)
    kinds = {type(primitive) for primitive in primitives}
    if weight is not None and kinds <= {Bias}:  # equal to the base's
        mark_redundant(weight)
    if bias is not None and Bias not in kinds:
        mark_redundant(bias)
    return primitives


def require_changes(primitives: list[Primitive], spec: BaseSpec) -> tuple[Primitive, ...]:
    """Return an artifact's primitives. Raises `ArtifactError` if there are none: it would answer as the base does."""
    if not primitives:
        raise ArtifactError(f"every tensor is as {spec.name} has it: the artifact changes nothing")
    return tuple(primitives)


def replace_linear(spec: BaseSpec, site: str, weight: Tensor | None, bias: Tensor | None) -> list[Primitive]:
    """Compile to `Delta(W' - W)` and `Bias(b' - b)`; W' as the base stores it, [in, out] if it is transposed."""
    primitives: list[Primitive] = []
    if weight is not None:
        dw = _change(spec, f"{site}.weight", weight)
        if bool(dw.any()):
            primitives.append(Delta(site, dw.T.contiguous() if spec.linears[site].is_transposed else dw))
    return primitives + _bias(site, None if bias is None else _change(spec, f"{site}.bias", bias))


def replace_norm(spec: BaseSpec, site: str, weight: Tensor | None, bias: Tensor | None) -> list[Primitive]:
    """Compile to `Scale(v)`, v = (offset + w') / (offset + w), and `Bias(b' - v b)`.

    Raises `MethodUnsupportedError` if the base multiplies by exactly 0 and the artifact does not.
    """
    norm, primitives, v = spec.norms[site], list[Primitive](), torch.tensor(1.0)
    if weight is not None:
        v = _ratio(spec, site, norm.offset, weight)
        if bool((v != 1).any()):
            primitives.append(Scale(site, v))
    if not norm.has_bias:
        return primitives
    base = base_weight(spec, f"{site}.bias")
    return primitives + _bias(site, finite((base if bias is None else bias.float()) - v * base, f"{site}.bias"))


def replace_embedding(spec: BaseSpec, site: str, weight: Tensor) -> list[Primitive]:
    """Compile to `Rows` of the tokens whose rows differ, times `embedding_scale`; a tied head is left unchanged."""
    de = _change(spec, f"{site}.weight", weight)
    ids = de.any(dim=1).nonzero()[:, 0]
    return [Rows(site, ids, finite(de[ids] * spec.embedding_scale, f"{site}.weight"))] if len(ids) else []


def _ratio(spec: BaseSpec, site: str, offset: float, weight: Tensor) -> Tensor:
    base, new = offset + base_weight(spec, f"{site}.weight"), offset + weight.float()
    if bool(((base == 0) & (new != 0)).any()):
        raise MethodUnsupportedError(
            f"{site}.weight is not 0 where {spec.name} multiplies by 0: no scale makes that of it", f"{site}.weight"
        )
    return finite(torch.where(base == 0, 1.0, new / base), f"{site}.weight")


def _change(spec: BaseSpec, name: str, new: Tensor) -> Tensor:
    base = base_weight(spec, name)
    if base.shape != new.shape:
        raise ArtifactError(f"{name} has shape {list(new.shape)}, {spec.name} has {list(base.shape)}", name)
    if torch.equal(new, base.to(new.dtype)):  # the base's, in fewer bits perhaps
        return torch.zeros_like(base)
    return finite(new.float() - base, name)


def _bias(site: str, change: Tensor | None) -> list[Primitive]:
    return [Bias(site, change)] if change is not None and bool(change.any()) else []


def _with_bias(weight: list[int], size: int, has_bias: bool) -> dict[str, list[int]]:
    return {"weight": weight, "bias": [size]} if has_bias else {"weight": weight}
