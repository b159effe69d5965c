"""Compile bottlenecks of AdapterHub's library `adapters`, saved by `save_adapter(folder, name, with_head=False)`.

With y a block's output, s the residual stream that it is added to and f the bottleneck, its code for the pre-norm
models of `ARCHITECTURES` computes (`adapters/methods/modeling.py`: `Adapter`, `ParallelAdapter`):

* `original_ln_before=False` (double_seq_bn, Houlsby):  s + y + f(y)       at the attention and feed-forward blocks
* `original_ln_before=True` (seq_bn, Pfeiffer; AdapterPlus):  s + y + f(s + y)   at the layer's end
* `is_parallel=True` (par_bn):                           s + y + f(s)       at the feed-forward block
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec, LayerSites
from adapters_store.errors import ArtifactError, MethodUnsupportedError, WrongBaseError
from adapters_store.format.folder import Artifact
from adapters_store.methods.bottleneck import MAX_SIZE, Names, Of, Place, compile_places, feed_forward, form_of
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.unused_tensors import mark_redundant
from adapters_store.primitives import Bottleneck

# Model types whose code in `adapters` follows the formulas above -> their architecture in transformers.
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
VERSION = "adapters."  # adapter-transformers, its predecessor, used names of activations differently
ATTENTION, OUTPUT = "attention_adapters", "output_adapters"  # the names of a layer's bottlenecks in `adapters`
NORM = "adapter_norm_before"
IGNORED_OUTER_KEYS = {"model_class", "model_name"}
IGNORED_KEYS = {
    "dropout",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",  # an option of inv_adapter
    "stochastic_depth",  # used in training only
    # options of phm_layer
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "shared_W_phm",
    "shared_phm_rule",
}
SERVED_VALUES: dict[str, tuple[Any, ...]] = {
    "architecture": (None,),  # set for other methods: lora, prefix_tuning, reft, union …
    "cross_adapter": (False,),
    "inv_adapter": (None,),
    "phm_layer": (False,),
    "use_gating": (False,),
}


class SavedConfig(msgspec.Struct, kw_only=True):
    """The outer keys of AdapterHub's config file: adapter name, model and version, around the method's `config`."""

    name: str
    model_type: str
    hidden_size: int
    version: str
    config: dict[str, Any]


class BnConfig(msgspec.Struct, kw_only=True):
    """The keys of AdapterHub's BnConfig that change the computation, with its defaults."""

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: int | float | dict[str, int | float]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    ln_before: bool = False
    ln_after: bool = False
    is_parallel: bool = False
    scaling: int | float | str = 1.0
    leave_out: list[int] = []


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Tell if a config is AdapterHub's: it has no peft_type, but a config within the config."""
    return "peft_type" not in config and "model_type" in config and isinstance(config.get("config"), dict)


def compile_adapterhub(artifact: Artifact, spec: BaseSpec) -> tuple[Bottleneck, ...]:
    """Compile to a `Bottleneck` per block that the config names. Raises `ArtifactError`."""
    saved = read_config(artifact, SavedConfig, "AdapterHub", IGNORED_OUTER_KEYS)
    _check_base(saved, spec)
    config = read_config(
        dataclasses.replace(artifact, config=saved.config),
        BnConfig,
        "AdapterHub's bottleneck",
        IGNORED_KEYS,
        SERVED_VALUES,
    )
    _check_residuals(config)
    left_out = frozenset(config.leave_out)
    if not left_out <= set(range(len(spec.layers))):
        raise ArtifactError(
            f"leave_out names a layer that is none of the {len(spec.layers)} of {spec.name}", "leave_out"
        )
    places = [
        Place(f"{start}.{block}.adapters.{saved.name}", site, of, _size(config, number, spec.hidden_size))
        for number, (start, layer) in enumerate(zip(_starts(artifact, spec), spec.layers, strict=True))
        if number not in left_out
        for block, site, of in _placed(config, layer)
    ]
    names = Names(f"adapter_down.{int(config.ln_before)}", "adapter_up", "scaling", NORM, "adapter_norm_after")
    form = form_of(names, config.non_linearity, config.scaling, config.ln_before, config.ln_after)
    if config.ln_before:
        artifact = dataclasses.replace(artifact, tensors=_without_twins(artifact.tensors))
    return compile_places(artifact, form, places, spec)


def _check_base(saved: SavedConfig, spec: BaseSpec) -> None:
    if not saved.version.startswith(VERSION):
        raise MethodUnsupportedError(
            f"version {saved.version[:40]} is not of the library adapters: load it there and save it again", "version"
        )
    if saved.model_type not in ARCHITECTURES:
        raise MethodUnsupportedError(
            f"AdapterHub's model_type {saved.model_type[:40]} is not served; served are {', '.join(ARCHITECTURES)}",
            "model_type",
        )
    if ARCHITECTURES[saved.model_type] != spec.architecture:
        raise WrongBaseError(
            f"the adapter's model_type is {saved.model_type}; {spec.name} is a {spec.architecture}", "model_type"
        )
    if saved.hidden_size != spec.hidden_size:
        raise WrongBaseError(
            f"the adapter's hidden_size is {saved.hidden_size}, that of {spec.name} {spec.hidden_size}", "hidden_size"
        )


def _check_residuals(config: BnConfig) -> None:
    """Raise unless the bottleneck's update is added exactly once to the base's output, as the formulas say."""
    is_once = config.original_ln_after
    if config.is_parallel or config.original_ln_before:
        mode = "is_parallel" if config.is_parallel else "original_ln_before"
        if config.mh_adapter:
            raise MethodUnsupportedError(f"mh_adapter with {mode} is not served", "mh_adapter")
    if not config.is_parallel:
        if config.residual_before_ln not in (True, False):
            raise _unserved(config, "residual_before_ln")
        if config.adapter_residual_before_ln and config.ln_after:
            raise _unserved(config, "adapter_residual_before_ln")
        # If the bottleneck's residual is taken after s was added, it includes s, which must not be added again.
        is_once = config.original_ln_after != (config.original_ln_before and not config.residual_before_ln)
    if not is_once:
        raise _unserved(config, "original_ln_after")


def _unserved(config: BnConfig, key: str) -> MethodUnsupportedError:
    others = ", ".join(f"{name}={getattr(config, name)}" for name in ("original_ln_before", "residual_before_ln"))
    return MethodUnsupportedError(f"{key}={str(getattr(config, key))[:40]} (with {others[:80]}) is not served", key)


def _size(config: BnConfig, layer: int, hidden: int) -> int:
    """Return the width of a layer's bottlenecks: hidden // reduction_factor, at least 1."""
    factor = config.reduction_factor
    if isinstance(factor, dict):
        if str(layer) not in factor and "default" not in factor:
            raise ArtifactError(f"reduction_factor has neither the layer {layer} nor a default", "reduction_factor")
        factor = factor.get(str(layer), factor.get("default", 1))
    if not factor >= hidden / MAX_SIZE:
        raise ArtifactError(
            f"reduction_factor is {factor:g}, which gives no width up to {MAX_SIZE}", "reduction_factor"
        )
    return max(1, int(hidden // factor))


def _starts(artifact: Artifact, spec: BaseSpec) -> list[str]:
    """Return the prefix of each layer's tensor names: its site, less the first word if saved without a head."""
    layers = [layer.layer for layer in spec.layers]
    if any(name.startswith(f"{layers[0].partition('.')[0]}.") for name in artifact.tensors):
        return layers
    return [layer.partition(".")[2] for layer in layers]


def _placed(config: BnConfig, layer: LayerSites) -> Iterator[tuple[str, str, Of]]:
    """Yield a layer's bottlenecks: AdapterHub's name of the place, the site, and the tensor that it reads."""
    if config.mh_adapter:
        yield ATTENTION, layer.attention, "output"
    if config.output_adapter and config.is_parallel:
        if layer.stream is None:
            raise MethodUnsupportedError(f"is_parallel needs {layer.layer} to read the residual stream", "is_parallel")
        yield OUTPUT, feed_forward(layer), "stream"
    elif config.output_adapter:
        yield OUTPUT, layer.layer if config.original_ln_before else feed_forward(layer), "output"


def _without_twins(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop duplicates: with ln_before a norm has two names, and safetensors keeps one or both. Keep `NORM`'s name."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        written = name.replace(".adapter_down.0.", f".{NORM}.")
        if not torch.equal(kept.setdefault(written, tensor), tensor):
            raise ArtifactError(f"{name} is not equal to its other name's, {written}", name)
        if kept[written] is not tensor:
            mark_redundant(tensor)
    return kept
