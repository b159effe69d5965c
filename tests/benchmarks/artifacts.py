"""Different artifacts of one method, made fast: the family's maker writes a few, and their numbers are moved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.kit.adapters import make_lora
from tests.kit.families import FAMILIES, Maker
from tests.kit.families.bottleneck import make_bottleneck

NUM_MADE = 4  # options and ranks vary with the seed, and repeat after about as many
TENSORS = "adapter_model.safetensors"
MOVED = 0.01  # by so much of itself, at random
MAKERS: Mapping[str, Maker] = {  # first those of the figures to reach, of the size that is said there
    "lora-r8": lambda folder, base, seed: make_lora(folder, base, seed, r=8),
    "bottleneck-16": partial(
        make_bottleneck,
        placement="pfeiffer",
        bottleneck_size=16,
        non_linearity="relu",
        scaling=1.0,
        ln_before=False,
        ln_after=False,
    ),
    **FAMILIES,
}


def artifacts(method: str, base: Path, folder: Path, num: int) -> Iterator[Path]:
    """`num` PEFT folders of a method, each with other numbers, in `folder`; the same for the same arguments."""
    for number in range(num):
        path = folder / str(number)
        if number < NUM_MADE:
            yield MAKERS[method](path, base, number)
        else:
            yield moved(folder / str(number % NUM_MADE), path, number)


def moved(source: Path, folder: Path, seed: int) -> Path:
    """A copy whose every number differs by about 1%; tensors that were equal, as those of tied layers, stay so."""
    shutil.copytree(source, folder)
    tensors = {}
    for name, tensor in load_file(source / TENSORS).items():
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        tensors[name] = (tensor * (1 + MOVED * noise)).to(tensor.dtype)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return folder
