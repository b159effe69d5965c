"""The methods that can be trained: each gives a frozen base trainable parameters, and says what is written of them.

One line in `METHODS` registers a method. A method's options are the fields of its dataclass, in the field's words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from training.base import Base
from training.data.dataset import TokenizedRow
from training.errors import OptionError
from training.methods import adalora, bottleneck, ia3, lora, lora_variants, prefixes, selective, soft_prompts
from training.methods.trainable import TrainableAdapter


@dataclass(frozen=True)
class TrainingMethod:
    """`make(options, base, rows)` puts the method on; `lr` is the learning rate that does well by default.

    It `can_share` a pass with other hats where its layers only add to what the base's modules answer to their input.
    """

    options: type[Any]
    make: Callable[[Any, Base, Sequence[TokenizedRow]], TrainableAdapter]
    lr: float
    is_uploadable: bool = True
    can_share: bool = False


LORA, FIXED_SCALE = lora.LoraOptions, lora.FixedScaleOptions
METHODS: Mapping[str, TrainingMethod] = {
    "lora": TrainingMethod(LORA, lora.lora, lr=3e-3, can_share=True),
    "rslora": TrainingMethod(FIXED_SCALE, partial(lora.lora, use_rslora=True), lr=1e-3, can_share=True),
    "dora": TrainingMethod(LORA, partial(lora.lora, use_dora=True), lr=3e-3, can_share=True),
    "pissa": TrainingMethod(FIXED_SCALE, partial(lora.residual_lora, init="pissa_niter_16"), lr=1e-3),
    "olora": TrainingMethod(FIXED_SCALE, partial(lora.residual_lora, init="olora"), lr=1e-3),
    "adalora": TrainingMethod(adalora.AdaLoraOptions, adalora.adalora, lr=1e-2, can_share=True),
    "vera": TrainingMethod(lora_variants.VeraOptions, lora_variants.vera, lr=1e-1, can_share=True),
    "loha": TrainingMethod(
        lora_variants.LycorisOptions, partial(lora_variants.lycoris, kind="LoHaConfig"), lr=3e-2, can_share=True
    ),
    "lokr": TrainingMethod(
        lora_variants.LycorisOptions, partial(lora_variants.lycoris, kind="LoKrConfig"), lr=3e-2, can_share=True
    ),
    "miss": TrainingMethod(lora_variants.MissOptions, lora_variants.miss, lr=1e-3, can_share=True),
    "oft": TrainingMethod(lora_variants.OftOptions, lora_variants.oft, lr=3e-3),
    "bottleneck": TrainingMethod(bottleneck.BottleneckOptions, bottleneck.bottleneck, lr=3e-3, can_share=True),
    "ia3": TrainingMethod(ia3.IA3Options, ia3.ia3, lr=5e-2),
    "prompt_tuning": TrainingMethod(soft_prompts.PromptOptions, soft_prompts.prompt_tuning, lr=1e-2),
    "p_tuning": TrainingMethod(soft_prompts.PTuningOptions, soft_prompts.p_tuning, lr=1e-3),
    "multitask_prompt_tuning": TrainingMethod(soft_prompts.MultitaskOptions, soft_prompts.multitask, lr=1e-2),
    "cpt": TrainingMethod(soft_prompts.CptOptions, soft_prompts.cpt, lr=1e-2),
    "prefix_tuning": TrainingMethod(prefixes.PrefixOptions, prefixes.prefix_tuning, lr=3e-2),
    "cartridge": TrainingMethod(prefixes.CartridgeOptions, prefixes.cartridge, lr=3e-2),
    "bitfit": TrainingMethod(selective.LayerOptions, selective.bitfit, lr=1e-2),
    "beft": TrainingMethod(selective.BiasOptions, selective.beft, lr=1e-2, can_share=True),
    "ln_tuning": TrainingMethod(selective.LayerOptions, selective.ln_tuning, lr=1e-2),
    "trainable_tokens": TrainingMethod(selective.TokenOptions, selective.trainable_tokens, lr=3e-3),
    "selective": TrainingMethod(selective.SelectiveOptions, selective.selective, lr=3e-4),
    "full": TrainingMethod(selective.FullOptions, selective.full, lr=1e-4, is_uploadable=False),
}


def method_named(name: str) -> TrainingMethod:
    """Raises `OptionError` naming those that there are."""
    if name not in METHODS:
        raise OptionError(f"--method {name} is not known: take one of {', '.join(METHODS)}.")
    return METHODS[name]


def options_of(name: str, given: Mapping[str, Any]) -> Any:
    """A method's options with what was given. Raises `OptionError` naming an option that the method does not read."""
    method = method_named(name)
    known = [field.name for field in dataclasses.fields(method.options)]
    for option in given:
        if option not in known:
            reads = ", ".join(map(flag, known)) or "none of its own"
            raise OptionError(f"{flag(option)} is not an option of --method {name}, which reads {reads}.")
    return method.options(**given)


def flag(name: str) -> str:
    """An option as the command line has it."""
    return f"--{name.replace('_', '-')}"


def attach(name: str, options: Any, base: Base, rows: Sequence[TokenizedRow]) -> TrainableAdapter:
    """Put a method on a frozen base. Raises `OptionError`."""
    return METHODS[name].make(options, base, rows)
