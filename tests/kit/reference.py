"""A patch on a stock transformers model, by forward hooks in plain torch: the slow twin of the whole bank.

It knows nothing of the server: what it answers for a patch must be what PEFT answers for the artifact, and what the
server answers must be what it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adapters_store.primitives import (
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

RowAdapters = Sequence[tuple[Patch, float]]


@contextmanager
def dressed(model: Any, worn: RowAdapters) -> Iterator[None]:
    """Hooks for all primitives but prefixes, in the order that `adapters_store.primitives` gives; gone afterwards."""
    acting: dict[str, list[tuple[Primitive, float]]] = {}
    for patch, weight in worn:
        for primitive in patch.primitives:
            if not isinstance(primitive, PrefixEmbeds | PrefixKV):
                acting.setdefault(primitive.site, []).append((primitive, weight))
    streams: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site, primitives in acting.items():
            module = model.get_submodule(site)
            stack.enter_context(_removed(module.register_forward_pre_hook(_enter(primitives), with_kwargs=True)))
            stack.enter_context(
                _removed(module.register_forward_hook(_leave(site, primitives, streams), with_kwargs=True))
            )
            if any(isinstance(p, Bottleneck) and p.of == "stream" for p, _ in primitives):
                norm = model.get_submodule(stream_norm(model, site))
                stack.enter_context(_removed(norm.register_forward_pre_hook(_capture(site, streams))))
        yield


def stream_norm(model: nn.Module, site: str) -> str:
    """The norm that reads the residual stream for the feed-forward block at `site`."""
    layer = site.rpartition(".")[0]
    children = dict(model.get_submodule(layer).named_children())
    names = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
    return f"{layer}.{next(name for name in names if name in children)}"


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _capture(site: str, streams: dict[str, Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        streams[site] = args[0]

    return hook


def _enter(primitives: list[tuple[Primitive, float]]) -> Any:
    """Scale the input."""
    scales = [(p, weight) for p, weight in primitives if isinstance(p, Scale) and p.on == "input"]

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for scale, weight in scales:
            args = (args[0] * scale.factor(weight), *args[1:])
        return args, kwargs

    return hook


def _leave(site: str, primitives: list[tuple[Primitive, float]], streams: dict[str, Tensor]) -> Any:
    """Scale the output, add what is computed from the input, then what is computed from the output."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        for p, weight in primitives:
            if isinstance(p, Scale) and p.on == "output":
                y = y * p.factor(weight)
        for p, weight in primitives:
            if isinstance(p, Rows):
                y = _rows(p, x, y, weight)
            elif isinstance(p, LowRank | Bias | Delta):
                y = y + weight * p.update(x)
            elif isinstance(p, Bottleneck) and p.of != "output":
                y = y + weight * p.update(streams[site] if p.of == "stream" else x)
        for p, weight in primitives:
            if isinstance(p, Bottleneck) and p.of == "output":
                y = y + weight * p.update(y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook


def _rows(rows: Rows, x: Tensor, y: Tensor, weight: float) -> Tensor:
    y = y.clone()
    if x.is_floating_point():  # the head: hidden states in, logits out
        y[..., rows.ids] += weight * (x @ rows.de.T)
        return y
    for token, change in zip(rows.ids.tolist(), rows.de, strict=True):
        y[x == token] += weight * change
    return y


@torch.inference_mode()
def logits(model: Any, worn: RowAdapters, token_ids: Sequence[int]) -> Tensor:
    """Logits [T, vocabulary] of the real tokens, behind all virtual ones, which come in the order of the patches."""
    embed, cache = model.get_input_embeddings(), DynamicCache()
    with dressed(model, worn):
        at = 0
        for patch, _ in worn:
            at = _put_prefix(model, patch, cache, at)
        ids = torch.tensor([list(token_ids)])
        positions = torch.arange(at, at + ids.shape[1])[None]
        mask = torch.ones(1, at + ids.shape[1], dtype=torch.long)
        out = model(
            inputs_embeds=embed(ids), position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
    result: Tensor = out.logits[0].float()
    return result


def _put_prefix(model: Any, patch: Patch, cache: DynamicCache, at: int) -> int:
    prefix = patch.prefix
    if isinstance(prefix, PrefixKV):
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
    elif isinstance(prefix, PrefixEmbeds):
        positions = torch.arange(at, at + prefix.num_tokens)[None]
        mask = torch.ones(1, at + prefix.num_tokens, dtype=torch.long)
        model(
            inputs_embeds=prefix.embeds[None],
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
    return at + patch.num_virtual


def greedy(model: Any, worn: RowAdapters, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The greedy answer, without a cache: one forward a token."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits(model, worn, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
