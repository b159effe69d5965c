"""Read the base's own weights from its folder, one tensor at a time, for methods whose update depends on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.safetensors_header import trusted_entries

OLD_NAMES = {"lm_head.weight": "embed_out.weight"}  # GPT-NeoX's head is renamed by transformers on load and save


def base_weight(spec: BaseSpec, name: str) -> Tensor:
    """Return a parameter of the base in fp32 by its dotted name. Raises `ArtifactError` if there is none.

    The head of a tied base is the embedding. Checkpoints that were saved without the head name their tensors without
    the first word (`h.0.…` for `transformer.h.0.…`).
    """
    if spec.is_tied and name == f"{spec.head}.weight":
        name = f"{spec.embedding}.weight"
    for written in (name, name.partition(".")[2], OLD_NAMES.get(name, name)):
        for file in _files_with(spec, written):
            with safe_open(file, "pt") as opened:
                tensor: Tensor = opened.get_tensor(written)
                return tensor.to(torch.float32)
    raise ArtifactError(f"{spec.name} keeps no weight named {name}, which this method's update depends on", name)


def _files_with(spec: BaseSpec, name: str) -> Iterator[Path]:
    for file in sorted(Path(spec.folder).glob("*.safetensors")) if spec.folder else ():
        if name in trusted_entries(file):
            yield file
