"""Random bottleneck adapters in our PEFT-style folder, and the plain model that computes what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from adapters_store.base.describe import describe

PREFIX = "base_model.model."
ACTIVATIONS = ["relu", "gelu", "silu", "tanh", "swish", "gelu_new"]
SCALINGS: list[float | str] = [1.0, "channel", 0.5, "learned"]


def make_bottleneck(folder: Path, base: Path, seed: int, placement: str, strength: float = 1.0, **config: Any) -> Path:
    """Write one; what `config` does not say is chosen by the seed, every option at some seed."""
    generator = torch.Generator().manual_seed(seed)
    config = {
        "peft_type": "BOTTLENECK",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "placement": placement,
        "bottleneck_size": 3 + 5 * (seed % 4),
        "non_linearity": ACTIVATIONS[seed % len(ACTIVATIONS)],
        "scaling": SCALINGS[seed % len(SCALINGS)],
        "ln_before": seed % 3 == 1,
        "ln_after": seed % 5 == 3,
        **config,
    }
    tensors = {
        f"{PREFIX}{site}.{end}": _fill(shape, strength, end, generator)
        for site in _sites(base, placement, config.get("layers_to_transform"))
        for end, shape in _shapes(config, AutoConfig.from_pretrained(base).get_text_config().hidden_size).items()
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _sites(base: Path, placement: str, numbers: list[int] | None) -> list[str]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    layers = describe(model, base.name, "", base).layers
    chosen = [layers[number] for number in numbers] if numbers else layers
    wrapped = [(layer.attention, layer.mlp) if placement == "houlsby" else (layer.mlp,) for layer in chosen]
    return [site for sites in wrapped for site in sites if site]


def _shapes(config: Mapping[str, Any], hidden: int) -> dict[str, tuple[int, ...]]:
    size, shapes = config["bottleneck_size"], dict[str, tuple[int, ...]]()
    for name, rows, columns in (("bottleneck_down", size, hidden), ("bottleneck_up", hidden, size)):
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for end in ("before", "after"):
        if config[f"ln_{end}"]:
            shapes |= {f"bottleneck_norm_{end}.{part}": (hidden,) for part in ("weight", "bias")}
    if isinstance(config["scaling"], str):
        shapes["bottleneck_scaling"] = (hidden,) if config["scaling"] == "channel" else (1,)
    return shapes


def _fill(shape: tuple[int, ...], strength: float, end: str, generator: torch.Generator) -> Tensor:
    """Matrices keep the size of what they are fed; norms and scales lie around `strength`, biases around 0."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        root: float = shape[-1] ** 0.5
        return 2 * strength * noise / root
    return (0.0 if end.endswith("bias") else strength) + 0.2 * strength * noise


def adapted(base: Path, folder: Path) -> Any:
    """The stock model whose modules have the artifact's bottlenecks around them, written from the formulas alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = json.loads((folder / "adapter_config.json").read_text())
    by_site: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        site, _, end = name.removeprefix(PREFIX).partition(".bottleneck_")
        by_site.setdefault(site, {})[end] = tensor
    for site, tensors in by_site.items():
        _wrap(model.get_submodule(site), config, tensors)
    return model


def _wrap(module: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    stock: Any = module.forward

    def bottleneck(h: Tensor) -> Tensor:
        if config["ln_before"]:
            h = functional.layer_norm(h, h.shape[-1:], tensors["norm_before.weight"], tensors["norm_before.bias"])
        h = h @ tensors["down.weight"].T + tensors["down.bias"]
        h = ACT2FN[config["non_linearity"]](h) @ tensors["up.weight"].T + tensors["up.bias"]
        h = h * tensors.get("scaling", config["scaling"])
        if config["ln_after"]:
            h = functional.layer_norm(h, h.shape[-1:], tensors["norm_after.weight"], tensors["norm_after.bias"])
        return h

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        if config["placement"] == "parallel":
            return output + bottleneck(args[0])
        y = output[0] if isinstance(output, tuple) else output
        y = y + bottleneck(y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    module.forward = forward
