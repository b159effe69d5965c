"""The methods that can be trained: each turns a frozen base into one with a few trainable parameters, through PEFT.

One line in `METHODS` registers a method.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from training.errors import OptionError


@dataclass(frozen=True)
class MethodOptions:
    """What a user can say of a method, in the field's words. A method reads those that it has.

    `target_modules` is `all-linear` or names joined by commas; `layers` is `all`, `last:N`, or numbers and ranges
    (`0,4-7`).
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str = "all-linear"
    layers: str = "last:10"


def attach(method: str, model: Any, options: MethodOptions, base_name: str) -> Any:
    """Freeze `model` and give it the method's trainable parameters: a PeftModel. Raises `OptionError`."""
    from peft import get_peft_model

    if method not in METHODS:
        raise OptionError(f"--method {method} is not known: take one of {', '.join(METHODS)}.")
    config = METHODS[method](options, model)
    with warnings.catch_warnings():  # PEFT reads a property of transformers by its old name
        warnings.simplefilter("ignore", FutureWarning)
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:
            raise OptionError(f"PEFT refuses the options of {method}: {error}") from error
    _settle(peft_model.peft_config["default"], base_name)
    return peft_model


def _settle(config: Any, base_name: str) -> None:
    """Name the base as the user does, not by a path in a cache; write sets in one order."""
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)


def lora(options: MethodOptions, model: Any) -> Any:
    """y += (alpha / r) B (A x) at the linear layers; alpha / sqrt(r) with rsLoRA (arXiv:2106.09685, 2312.03732)."""
    from peft import LoraConfig

    if options.r < 1:
        raise OptionError(f"--r must be at least 1, not {options.r}.")
    num_layers = model.config.num_hidden_layers
    layers = parse_layers(options.layers, num_layers)
    return LoraConfig(
        r=options.r,
        lora_alpha=int(options.alpha) if options.alpha == int(options.alpha) else options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.use_rslora,
        target_modules=_targets(options.target_modules, model),
        layers_to_transform=layers if len(layers) < num_layers else None,
        task_type="CAUSAL_LM",
    )


METHODS: Mapping[str, Callable[[MethodOptions, Any], Any]] = {
    "lora": lora,
}


def parse_layers(text: str, num_layers: int) -> list[int]:
    """The layers that `all`, `last:N` or `0,4-7` name, in order. Raises `OptionError`."""
    if text == "all":
        return list(range(num_layers))
    if match := re.fullmatch(r"last:(\d+)", text):
        return list(range(max(0, num_layers - int(match[1])), num_layers))
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise OptionError(f"--layers {text!r}: write all, last:N, or numbers and ranges like 0,4-7.")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not layers or max(layers) >= num_layers:
        raise OptionError(f"--layers {text!r}: the base has {num_layers} layers, 0 to {num_layers - 1}.")
    return sorted(layers)


def _targets(text: str, model: Any) -> list[str]:
    """The names of modules; `all-linear` is written out, for PEFT takes no choice of layers beside the word."""
    names = sorted({name.strip() for name in text.split(",") if name.strip()})
    if not names:
        raise OptionError("--target-modules names no module: write all-linear, or names like q_proj,v_proj.")
    if names != ["all-linear"]:
        return names
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and module is not head
        }
    )
