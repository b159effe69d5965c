"""Tensors spoiled in every way, each of which the real intake must refuse by the tensor's name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.archive import unpack_upload
from adapters_store.format.folder import CONFIG, WEIGHTS, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import Patch
from tests.kit.forge import zip_of


def take_in(config: Mapping[str, Any], tensors: Mapping[str, Tensor], scratch: Path, spec: BaseSpec) -> Patch:
    """Do what an upload of these goes through."""
    scratch.mkdir(exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (scratch / "body").write_bytes(zip_of({CONFIG: json.dumps(config).encode(), WEIGHTS: save(whole)}))
    unpack_upload(scratch / "body", scratch, 2**30)
    return compile_patch(read_folder(scratch), spec)


def one_of_a_kind(tensors: Mapping[str, Tensor]) -> list[str]:
    """The first tensor of each name and shape, whichever layer it is of."""
    found: dict[tuple[str, torch.Size], str] = {}
    for name, tensor in tensors.items():
        found.setdefault((re.sub(r"\d+", "", name), tensor.shape), name)
    return list(found.values())


def spoiled(name: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor], str]]:
    """Yield the ways to spoil a tensor: all tensors then, and the name that a refusal must give."""
    tensor, others = tensors[name], {other: value for other, value in tensors.items() if other != name}
    yield "is missing", others, name
    for extra in (f"{name}.extra", f"extra.{name}", name.removeprefix("base_"), re.sub(r"\.[01]\.", ".9.", name)):
        if extra not in tensors:
            yield "is extra|has no site", {**tensors, extra: tensor.clone()}, extra
    for wrong in reshaped(tensor):
        need = re.escape(f"has shape {list(wrong.shape)}, this base and config need {list(tensor.shape)}")
        yield need, {**others, name: wrong}, name
    yield "has dtype I32", {**others, name: tensor.int()}, name
    for value in (float("nan"), float("inf")) if tensor.numel() else ():  # AdaLoRA has some of rank 0
        last = torch.arange(tensor.numel()).view_as(tensor) == tensor.numel() - 1
        yield "finite", {**others, name: tensor.masked_fill(last, value)}, name


def reshaped(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor transposed, of another size, of more and of fewer dimensions."""
    if tensor.dim() > 1 and tensor.shape[-1] != tensor.shape[-2]:
        yield tensor.mT
    for dim in range(tensor.dim()):
        yield torch.zeros([size + (at == dim) for at, size in enumerate(tensor.shape)])
        yield tensor.unsqueeze(dim)
    yield tensor.sum(0)
    if tensor.dim() > 1:
        yield tensor.flatten()


def assert_refused_by_name(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], scratch: Path, spec: BaseSpec, may_miss: str = "$^"
) -> None:
    """Assert that a spoiled artifact is refused with the tensor's name in text and `param`, a sound one accepted."""
    take_in(config, tensors, scratch, spec)
    for name in one_of_a_kind(tensors):
        for reason, wrong, named in spoiled(name, tensors):
            if reason == "is missing" and re.search(may_miss, name):
                take_in(config, wrong, scratch, spec)
                continue
            with pytest.raises(ArtifactError, match=rf"{re.escape(named)}\b") as caught:
                take_in(config, wrong, scratch, spec)
                pytest.fail(f"{name} was taken: {reason}")
            code = "method_unsupported" if "dtype" in reason else "artifact_invalid"
            assert (caught.value.param, caught.value.code) == (named, code), reason
            assert re.search(reason, str(caught.value)), (reason, str(caught.value))
