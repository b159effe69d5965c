"""Describe a transformers model as a `BaseSpec`: its linears, norms, layers, embedding and head by module name.

Works on any device, also on meta: weights are never read.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_store.base.identity import BaseUnavailableError
from adapters_store.base.spec import BaseSpec, KVShape, LayerSites, LinearSite, NormSite

# Names, in pre-norm models, of the norm before the feed-forward block, which reads the residual stream.
STREAM_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
NO_DECODER = "{} is no decoder of layers with causal attention and numbered positions, which a base must be ({})"


def describe(model: Any, name: str, identity: str, folder: Path) -> BaseSpec:
    """Build the spec of a decoder-only transformers model; `identity` and `folder` are stored in it unchanged.

    Raises `BaseUnavailableError` for a model that is no decoder whose layers attend.
    """
    try:
        spec = _describe(model, name, identity, folder)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BaseUnavailableError(NO_DECODER.format(type(model).__name__, error)) from error
    if not spec.layers:
        raise BaseUnavailableError(NO_DECODER.format(type(model).__name__, "no list of its layers attends"))
    return spec


def _describe(model: Any, name: str, identity: str, folder: Path) -> BaseSpec:
    config, sites = model.config.get_text_config(), {module: site for site, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return BaseSpec(
        name=name,
        identity=identity,
        architecture=type(model).__name__,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        max_positions=config.max_position_embeddings,
        linears={site: _linear_site(module) for site, module in linears(model).items()},
        norms={site: _norm_site(module) for site, module in norms(model).items()},
        layers=_layers(model, config.num_hidden_layers),
        kv=_kv_shapes(config),
        embedding=sites[embedding],
        embedding_size=embedding.weight.shape[1],
        embedding_scale=float(getattr(embedding, "scalar_embed_scale", 1.0)),
        head="" if head is None else sites[head],
        is_tied=head is not None and head.weight is embedding.weight,
        folder=str(folder),
    )


def end_token_ids(model: Any) -> list[int]:
    """Return the tokens that end an answer: those of the generation config and of the config."""
    configs = (model.generation_config, model.config, model.config.get_text_config())
    named = [getattr(config, "eos_token_id", None) for config in configs]
    ends = [[] if eos is None else [eos] if isinstance(eos, int) else eos for eos in named]
    return list(dict.fromkeys(token_id for tokens in ends for token_id in tokens))


def linears(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Return every linear layer (`nn.Linear` or `Conv1D`) by its site."""
    return {site: module for site, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return every norm by its site: a leaf module with a one-dimensional weight and "norm" in its class name."""
    return {site: module for site, module in model.named_modules() if _is_norm(module)}


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_leaf = not any(True for _ in module.children())
    return (
        is_leaf and isinstance(weight, nn.Parameter) and weight.dim() == 1 and "norm" in type(module).__name__.lower()
    )


def _linear_site(module: nn.Linear | Conv1D) -> LinearSite:
    has_bias = module.bias is not None
    if isinstance(module, Conv1D):
        return LinearSite(module.nx, module.nf, has_bias, is_transposed=True)
    return LinearSite(module.in_features, module.out_features, has_bias)


def _norm_site(module: Any) -> NormSite:
    has_bias = getattr(module, "bias", None) is not None
    return NormSite(module.weight.shape[0], has_bias, _offset(module))


def _offset(norm: Any) -> float:
    """Detect the constant that a norm adds to its weight (1 in Gemma, else 0) with a copy whose weight is zero."""
    trial = copy.deepcopy(norm).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in trial.parameters():
            parameter.zero_()
        is_silent = not bool(trial(torch.linspace(-1, 1, norm.weight.shape[0])[None, None]).any())
    return 0.0 if is_silent else 1.0


def _layers(model: nn.Module, num_layers: int) -> list[LayerSites]:
    """Return each decoder layer's sites, from the first module list of `num_layers` layers with attention."""
    for site, modules in model.named_modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == num_layers:
            layers = [_layer_sites(f"{site}.{at}", layer) for at, layer in enumerate(modules)]
            if all(layers):
                return [layer for layer in layers if layer]
    return []


def _layer_sites(site: str, layer: nn.Module) -> LayerSites | None:
    """Find a layer's blocks: attention has a `layer_idx`; the feed-forward block is the last other child with matrices.

    OPT's two linears are children of the layer itself: there the last of them ends the block.
    """
    children = dict(layer.named_children())
    attention = next((name for name, child in children.items() if hasattr(child, "layer_idx")), None)
    if attention is None:
        return None
    blocks = [name for name, child in children.items() if name != attention and _has_matrices(child)]
    if not blocks:
        return LayerSites(site, f"{site}.{attention}")
    is_whole = not isinstance(children[blocks[-1]], nn.Linear | Conv1D)
    is_post_norm = "post_feedforward_layernorm" in children and "pre_feedforward_layernorm" not in children  # OLMo 2
    norms = [] if is_post_norm or not is_whole else [name for name in STREAM_NORMS if name in children]
    return LayerSites(
        site, f"{site}.{attention}", f"{site}.{blocks[-1]}", is_whole, f"{site}.{norms[0]}" if norms else None
    )


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _kv_shapes(config: Any) -> list[KVShape]:
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return [KVShape(num_kv_heads, dim, dim)] * config.num_hidden_layers
