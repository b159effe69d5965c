"""The methods that can be trained: each adds trainable parameters to a frozen base, and writes them as an artifact.

To register a method, add a line to `METHODS`. Its options are the fields of a class in `training.options`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from training import options
from training.base import Base
from training.data.dataset import TokenizedRow
from training.errors import OptionError
from training.methods import adalora, bottleneck, ia3, lora, lora_variants, prefixes, selective, soft_prompts
from training.methods.served import check_served
from training.methods.trainable import TrainableAdapter
from training.options import MethodOptions, flag


@dataclass(frozen=True)
class TrainingMethod:
    """A method: the class of its options, the function that attaches it, and its default learning rate `lr`.

    `make(options, base, rows)` may change the base's model. A method is uploadable if the server takes its artifact,
    and `can_share` a pass with other adapters if its layers only add to the outputs of the base's modules.
    """

    options: type[MethodOptions]
    make: Callable[[Any, Base, Sequence[TokenizedRow]], TrainableAdapter]
    lr: float
    is_uploadable: bool = True
    can_share: bool = False


LORA, FIXED_SCALE, LYCORIS = options.LoraOptions, options.FixedScaleOptions, options.LycorisOptions
METHODS: Mapping[str, TrainingMethod] = {
    "lora": TrainingMethod(LORA, lora.lora, lr=3e-3, can_share=True),
    "rslora": TrainingMethod(FIXED_SCALE, partial(lora.lora, use_rslora=True), lr=1e-3, can_share=True),
    "dora": TrainingMethod(LORA, partial(lora.lora, use_dora=True), lr=3e-3, can_share=True),
    "pissa": TrainingMethod(FIXED_SCALE, partial(lora.residual_lora, init="pissa_niter_16"), lr=1e-3),
    "olora": TrainingMethod(FIXED_SCALE, partial(lora.residual_lora, init="olora"), lr=1e-3),
    "adalora": TrainingMethod(options.AdaLoraOptions, adalora.adalora, lr=1e-2, can_share=True),
    "vera": TrainingMethod(options.VeraOptions, lora_variants.vera, lr=1e-1, can_share=True),
    "loha": TrainingMethod(LYCORIS, partial(lora_variants.lycoris, kind="LoHaConfig"), lr=3e-2, can_share=True),
    "lokr": TrainingMethod(LYCORIS, partial(lora_variants.lycoris, kind="LoKrConfig"), lr=3e-2, can_share=True),
    "miss": TrainingMethod(options.MissOptions, lora_variants.miss, lr=1e-3, can_share=True),
    "oft": TrainingMethod(options.OftOptions, lora_variants.oft, lr=3e-3),
    "bottleneck": TrainingMethod(options.BottleneckOptions, bottleneck.bottleneck, lr=3e-3, can_share=True),
    "ia3": TrainingMethod(options.IA3Options, ia3.ia3, lr=5e-2),
    "prompt_tuning": TrainingMethod(options.PromptOptions, soft_prompts.prompt_tuning, lr=1e-2),
    "p_tuning": TrainingMethod(options.PTuningOptions, soft_prompts.p_tuning, lr=1e-3),
    "multitask_prompt_tuning": TrainingMethod(options.MultitaskOptions, soft_prompts.multitask, lr=1e-2),
    "cpt": TrainingMethod(options.CptOptions, soft_prompts.cpt, lr=1e-2),
    "prefix_tuning": TrainingMethod(options.PrefixOptions, prefixes.prefix_tuning, lr=3e-2),
    "cartridge": TrainingMethod(options.CartridgeOptions, prefixes.cartridge, lr=3e-2),
    "bitfit": TrainingMethod(options.LayerOptions, selective.bitfit, lr=1e-2),
    "beft": TrainingMethod(options.BiasOptions, selective.beft, lr=1e-2, can_share=True),
    "ln_tuning": TrainingMethod(options.LayerOptions, selective.ln_tuning, lr=1e-2),
    "trainable_tokens": TrainingMethod(options.TokenOptions, selective.trainable_tokens, lr=3e-3),
    "selective": TrainingMethod(options.SelectiveOptions, selective.selective, lr=3e-4),
    "full": TrainingMethod(MethodOptions, selective.full, lr=1e-4, is_uploadable=False),
}


def method_named(name: str) -> TrainingMethod:
    """Return a method by its name. Raises `OptionError` that names the methods there are."""
    if name not in METHODS:
        raise OptionError(f"--method {name} is not known: take one of {', '.join(METHODS)}.")
    return METHODS[name]


def options_of(name: str, given: Mapping[str, Any]) -> MethodOptions:
    """Return a method's options with those given. Raises `OptionError` naming an option that the method does not read.

    The others keep the method's defaults.
    """
    kind = method_named(name).options
    for option in given:
        if option not in kind.names():
            reads = ", ".join(map(flag, kind.names())) or "none of its own"
            raise OptionError(f"{flag(option)} is not an option of --method {name}, which reads {reads}.")
    return kind(**given)


def attach(name: str, options: MethodOptions, base: Base, rows: Sequence[TokenizedRow], seed: int) -> TrainableAdapter:
    """Attach a method to a frozen base, with initial values by the seed.

    Raises `OptionError` for an option's value that cannot be used, or if the server would not take the artifact.
    """
    torch.manual_seed(seed)
    method = METHODS[name]
    adapter = method.make(options, base, rows)
    if method.is_uploadable:
        check_served(adapter, base.spec)
    return adapter
