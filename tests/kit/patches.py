"""Random patches straight from primitives: any kind at any site, without a method."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.primitives import (
    ACTIVATIONS,
    Bias,
    Bottleneck,
    Delta,
    LowRank,
    Patch,
    PrefixEmbeds,
    PrefixKV,
    Primitive,
    Rows,
    Scale,
)

Make = Callable[[BaseSpec, random.Random], list[Primitive]]
Of = Literal["input", "output", "stream"]
Kind = TypeVar("Kind", bound=Primitive)


def _normal(draw: random.Random, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(2**31)))


def _some_linears(spec: BaseSpec, draw: random.Random) -> list[str]:
    linears = list(spec.linears)
    return sorted(draw.sample(linears, max(2, len(linears) // 2)))


def low_rank(spec: BaseSpec, draw: random.Random) -> list[Primitive]:
    made: list[Primitive] = []
    for site in _some_linears(spec, draw):
        linear, rank = spec.linears[site], draw.randrange(1, 10)
        a = _normal(draw, rank, linear.in_features, scale=linear.in_features**-0.5)
        made.append(LowRank(site, a, _normal(draw, linear.out_features, rank, scale=0.3)))
    return made


def scale(spec: BaseSpec, draw: random.Random) -> list[Primitive]:
    made: list[Primitive] = []
    for site in _some_linears(spec, draw):
        linear = spec.linears[site]
        if draw.random() < 0.5:
            made.append(Scale(site, 1 + _normal(draw, linear.in_features, scale=0.3), "input"))
        if draw.random() < 0.7:
            made.append(Scale(site, 1 + _normal(draw, linear.out_features, scale=0.3)))
    return made


def bias(spec: BaseSpec, draw: random.Random) -> list[Primitive]:
    return [Bias(s, _normal(draw, spec.linears[s].out_features, scale=0.2)) for s in _some_linears(spec, draw)]


def norm(spec: BaseSpec, draw: random.Random) -> list[Primitive]:
    made: list[Primitive] = []
    for site, norm in spec.norms.items():
        made += [Scale(site, 1 + _normal(draw, norm.size, scale=0.4)), Bias(site, _normal(draw, norm.size, scale=0.2))]
    return made


def delta(spec: BaseSpec, draw: random.Random) -> list[Primitive]:
    made: list[Primitive] = []
    for site in _some_linears(spec, draw):
        linear = spec.linears[site]
        made.append(Delta(site, _normal(draw, linear.out_features, linear.in_features, scale=0.04)))
    return made


def rows(spec: BaseSpec, draw: random.Random) -> list[Primitive]:
    ids = torch.tensor(sorted(draw.sample(range(200), 40)))
    made: list[Primitive] = [Rows(spec.embedding, ids, _normal(draw, 40, spec.embedding_size))]
    if spec.head:
        made.append(Rows(spec.head, ids, _normal(draw, 40, spec.linears[spec.head].in_features, scale=0.2)))
    return made


def bottleneck(spec: BaseSpec, draw: random.Random) -> list[Primitive]:
    """Every placement at random, with and without norms and biases, of every activation."""
    made: list[Primitive] = []
    for layer in spec.layers:
        sites: list[tuple[str | None, Of]] = [
            (layer.layer, "output"),
            (layer.attention, "output"),
            (layer.mlp, "output"),
        ]
        sites += [(layer.mlp, "input")] if layer.is_mlp_whole else []
        sites += [(layer.mlp, "stream")] if layer.stream else []
        taken: set[str] = set()
        for site, of in draw.sample(sites, len(sites)):
            if site is not None and site not in taken and draw.random() < 0.8:
                taken.add(site)
                made.append(_one_bottleneck(spec.hidden_size, site, of, draw))
    return made


def _one_bottleneck(size: int, site: str, of: Of, draw: random.Random) -> Bottleneck:
    m = draw.randrange(3, 14)

    def maybe(*scales: float) -> tuple[Tensor, Tensor] | None:
        pair = (1 + _normal(draw, size, scale=scales[0]), _normal(draw, size, scale=scales[0]))
        return pair if draw.random() < 0.4 else None

    return Bottleneck(
        site,
        _normal(draw, m, size, scale=size**-0.5),
        _normal(draw, size, m, scale=0.3),
        draw.choice(list(ACTIVATIONS)),
        of,
        _normal(draw, m, scale=0.2) if draw.random() < 0.7 else None,
        _normal(draw, size, scale=0.1) if draw.random() < 0.7 else None,
        maybe(0.2),
        maybe(0.2),
    )


def prefix_embeds(spec: BaseSpec, draw: random.Random) -> list[Primitive]:
    return [PrefixEmbeds(_normal(draw, draw.randrange(1, 70), spec.embedding_size))]


def prefix_kv(spec: BaseSpec, draw: random.Random) -> list[Primitive]:
    n = draw.randrange(1, 50)
    keys = tuple(_normal(draw, n, shape.num_kv_heads, shape.key_dim) for shape in spec.kv)
    return [PrefixKV(keys, tuple(_normal(draw, n, shape.num_kv_heads, shape.value_dim) for shape in spec.kv))]


KINDS: Mapping[str, Make] = {
    "low_rank": low_rank,
    "scale": scale,
    "bias": bias,
    "norm": norm,
    "delta": delta,
    "rows": rows,
    "bottleneck": bottleneck,
    "prefix_embeds": prefix_embeds,
    "prefix_kv": prefix_kv,
}


def random_patch(spec: BaseSpec, kind: str, seed: int) -> Patch:
    """A patch of primitives of one kind, the same for the same arguments."""
    draw = random.Random(f"{kind} {seed}")
    return Patch(f"{kind}-{seed}", kind, tuple(KINDS[kind](spec, draw)))


def all_of(kind: type[Kind], patch: Patch) -> list[Kind]:
    """The primitives of a patch that has no other kind."""
    found: list[Kind] = [primitive for primitive in patch.primitives if isinstance(primitive, kind)]
    assert len(found) == len(patch.primitives), f"not all of {patch.primitives} are {kind.__name__}"
    return found
