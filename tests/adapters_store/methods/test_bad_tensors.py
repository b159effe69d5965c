"""Every method through the real intake: each kind of tensor spoiled in every way is refused by the tensor's name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.archive import ZIP_TYPE, unpack_upload
from adapters_store.format.folder import CONFIG, WEIGHTS, find_parts, read_folder
from adapters_store.methods import METHODS
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import Patch
from tests.golden.make_adapterhub import HERE as ADAPTERHUB
from tests.kit.families import FAMILIES, FAMILIES_OF_BIASED
from tests.kit.forge import spec_of, zip_of

Tensors = dict[str, Tensor]
NAMES = [*FAMILIES, *FAMILIES_OF_BIASED]
SEEDS = (0, 1)  # every family's options vary with it
HUBS = ["houlsby-norms", "pfeiffer-norm", "parallel-norms"]


def take_in(config: dict[str, Any], tensors: Tensors, scratch: Path, spec: BaseSpec) -> Patch:
    """What an upload of these goes through."""
    scratch.mkdir(exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (scratch / "body").write_bytes(zip_of({CONFIG: json.dumps(config).encode(), WEIGHTS: save(whole)}))
    unpack_upload(scratch / "body", ZIP_TYPE, scratch, 2**30)
    return compile_patch(read_folder(scratch), spec)


def one_of_a_kind(tensors: Tensors) -> list[str]:
    """The first tensor of each name and shape, whichever layer it is of."""
    found: dict[tuple[str, torch.Size], str] = {}
    for name, tensor in tensors.items():
        found.setdefault((re.sub(r"\d+", "", name), tensor.shape), name)
    return list(found.values())


def spoiled(name: str, tensors: Tensors) -> Iterator[tuple[str, Tensors, str]]:
    """How one tensor can be wrong, all tensors then, and the name that a refusal must have."""
    tensor, others = tensors[name], {other: value for other, value in tensors.items() if other != name}
    yield "missing", others, name
    for extra in (f"{name}.extra", f"extra.{name}", re.sub(r"\.[01]\.", ".9.", name)):
        if extra not in tensors:
            yield "extra", {**tensors, extra: tensor.clone()}, extra
    if tensor.dim() > 1 and tensor.shape[-1] != tensor.shape[-2]:
        yield "transposed", {**others, name: tensor.mT}, name
    for dim in range(tensor.dim()):
        one_more = torch.zeros([size + (at == dim) for at, size in enumerate(tensor.shape)])
        yield "of another rank", {**others, name: one_more}, name
        yield "of a dimension more", {**others, name: tensor.unsqueeze(dim)}, name
    yield "of a dimension less", {**others, name: tensor.sum(0)}, name
    for value in (float("nan"), float("inf")) if tensor.numel() else ():  # AdaLoRA has some of rank 0
        last = torch.arange(tensor.numel()).view_as(tensor) == tensor.numel() - 1
        yield "not finite", {**others, name: tensor.masked_fill(last, value)}, name


def assert_refused_by_name(config: dict[str, Any], tensors: Tensors, scratch: Path, spec: BaseSpec) -> None:
    """All that is spoiled is refused, its tensor named in sentence and `param`; what is sound is taken."""
    take_in(config, tensors, scratch, spec)
    for name in one_of_a_kind(tensors):
        for how, wrong, named in spoiled(name, tensors):
            with pytest.raises(ArtifactError, match=rf"{re.escape(named)}\b") as caught:
                take_in(config, wrong, scratch, spec)
                pytest.fail(f"{name} was taken {how}")
            assert (caught.value.param, caught.value.code) == (named, "artifact_invalid"), how


def test_every_method_has_a_family(artifact: Callable[[str, int], Path]) -> None:
    """No method that is served is left out below."""
    configs = (json.loads((artifact(name, 0) / CONFIG).read_text()) for name in NAMES)
    assert {config["peft_type"] for config in configs} == set(METHODS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", NAMES)
def test_a_spoiled_tensor_is_refused_by_its_name(
    family: str, seed: int, biased_base: Path, artifact: Callable[[str, int], Path], tmp_path: Path
) -> None:
    """Missing, extra, transposed, of wrong rank or dimensions, not finite: for each kind of tensor of each method."""
    folder = artifact(family, seed)
    config = json.loads((folder / CONFIG).read_text())
    assert_refused_by_name(config, load_file(folder / WEIGHTS), tmp_path / "in", spec_of(biased_base))


@pytest.mark.parametrize("name", HUBS)
def test_a_spoiled_tensor_of_adapterhub_is_refused_by_its_name(
    name: str, tiny_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same for the folders that AdapterHub saves."""
    parts = find_parts(ADAPTERHUB / "llama" / name)
    config = json.loads(parts[CONFIG].read_text())
    twins, tensors = (".adapter_down.0.", ".adapter_norm_before."), load_file(parts[WEIGHTS])
    for name in [name for name in tensors if twins[0] in name and name.replace(*twins) in tensors]:
        del tensors[name]  # the norm before has two names, and either will do
    assert_refused_by_name(config, tensors, tmp_path / "in", spec_of(tiny_of("llama")))
