"""Random adapters, written by PEFT itself: the folders that users upload."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

NAME = "default"  # PEFT's name of the one adapter in a model


def make_lora(
    folder: Path,
    base_folder: Path,
    seed: int = 0,
    r: int = 8,
    lora_alpha: int = 16,
    target_modules: list[str] | str = "all-linear",
    strength: float = 0.5,
    **config: Any,
) -> Path:
    """Write a random LoRA of `base_folder` as a PEFT folder, the same bytes for the same arguments.

    `config` goes to `LoraConfig`. Both A and B are random: fed with x of scale 1, a site adds about `strength`,
    whatever its rank and alpha. The base's weights are never read (its modules live on the meta device).
    """
    lora = LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=lora_alpha, target_modules=target_modules, **config)
    model = _wrap(base_folder, lora)
    randomise(model, seed, strength)
    model.save_pretrained(folder, save_embedding_layers=False)
    sort_config(folder / "adapter_config.json")
    return folder


def _wrap(base_folder: Path, lora: LoraConfig) -> PeftModel:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base_folder))
    with warnings.catch_warnings():  # PEFT asks transformers for a property by its old name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(base, lora)


def randomise(model: PeftModel, seed: int, strength: float) -> None:
    """Fill A and B of every LoRA layer from the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in sorted(model.named_modules()):
        if isinstance(layer, LoraLayer) and NAME in layer.lora_A:
            _fill(layer, generator, strength)


def _fill(layer: LoraLayer, generator: torch.Generator, strength: float) -> None:
    down, up, rank = layer.lora_A[NAME], layer.lora_B[NAME], layer.r[NAME]
    gain = strength / (layer.scaling[NAME] * rank**0.5)
    a = torch.randn(down.weight.shape, generator=generator) / down.in_features**0.5
    b = torch.randn(up.weight.shape, generator=generator) * gain
    down.weight, up.weight = nn.Parameter(a), nn.Parameter(b)


def sort_config(path: Path) -> None:
    """PEFT writes some lists in the order of a set, which differs from run to run."""
    config = json.loads(path.read_text())
    for name in ("target_modules", "feedforward_modules"):
        if isinstance(config.get(name), list):
            config[name].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def zip_folder(folder: Path) -> bytes:
    """The body of an upload: the folder's files in a zip, the same bytes every time."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())
    return body.getvalue()


def tensors_digest(folder: Path) -> str:
    """sha256 over the names and bytes of a folder's tensors: notices drift of what is made from a seed."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.numpy())
    return digest.hexdigest()


Fill = Callable[[str, Tensor, torch.Generator], Tensor]  # name, initial value, generator -> value


def shake(strength: float) -> Fill:
    """Matrices anew, with rows of length `strength` on average; vectors changed by a fifth of `strength`."""

    def fill(_name: str, value: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(value.shape, generator=generator)
        return strength * noise / value.shape[-1] ** 0.5 if value.dim() > 1 else value + 0.2 * strength * noise

    return fill


def make_peft(folder: Path, base_folder: Path, config: PeftConfig, seed: int = 0, fill: Fill | None = None) -> Path:
    """Write a random artifact of any PEFT method, the same bytes for the same arguments, from the base's weights.

    Every trained parameter is filled by `fill`.
    """
    torch.manual_seed(seed)  # what PEFT initialises by itself and saves, a VeRA's projections for example
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32), config)
        generator, fill = torch.Generator().manual_seed(seed), fill or shake(1.0)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter.copy_(fill(name, parameter.detach().clone(), generator))
        model.save_pretrained(folder, save_embedding_layers=False)
    sort_config(folder / "adapter_config.json")
    return folder
