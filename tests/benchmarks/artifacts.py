"""Different artifacts of one method, made fast: the family's maker writes a few, and their numbers are moved."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.kit.families import FAMILIES

NUM_MADE = 4  # options and ranks vary with the seed, and repeat after about as many
TENSORS = "adapter_model.safetensors"
MOVED = 0.01  # by so much of itself, at random


def artifacts(method: str, base: Path, folder: Path, num: int) -> Iterator[Path]:
    """`num` PEFT folders of a method, each with other numbers, in `folder`; the same for the same arguments."""
    for number in range(num):
        path = folder / str(number)
        if number < NUM_MADE:
            yield FAMILIES[method](path, base, number)
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
