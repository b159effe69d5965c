"""A forge of artifacts: any header, any zip, and sound LoRA folders to spoil one thing at a time."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from adapters_store.base.describe import describe
from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.format.folder import CONFIG, WEIGHTS, Artifact, read_folder, write_folder
from adapters_store.format.manifest import BaseRef, Manifest

IDENTITY, OTHER_IDENTITY, WEIGHTS_DIGEST = "a" * 64, "b" * 64, "c" * 64
SITE = "model.layers.{}.self_attn.{}"
PREFIX = "base_model.model."
RANK = 2


def spec_of(folder: Path) -> BaseSpec:
    """What a compiler must know of a base's folder."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return describe(model, folder.name, IDENTITY, folder)


def toy_spec(num_layers: int = 2) -> BaseSpec:
    """A base of two projections a layer (q: 8 -> 8, k: 8 -> 4) and a head (8 -> 16)."""
    linears = {"lm_head": LinearSite(8, 16)}
    for layer in range(num_layers):
        linears[SITE.format(layer, "q_proj")] = LinearSite(8, 8)
        linears[SITE.format(layer, "k_proj")] = LinearSite(8, 4)
    return BaseSpec("toy", IDENTITY, "ToyForCausalLM", 16, 8, num_layers, 64, linears)


def toy_config(**changes: Any) -> dict[str, Any]:
    """The config of a LoRA on both projections of both layers."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 4}
    return {**config, "target_modules": ["q_proj", "k_proj"], **changes}


def toy_tensors(seed: int = 0, **changes: Tensor | None) -> dict[str, Tensor]:
    """Its tensors, A and B random; `changes` replace tensors by name, None takes one away."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for site, linear in toy_spec().linears.items():
        if site != "lm_head":
            tensors[f"{PREFIX}{site}.lora_A.weight"] = torch.randn(RANK, linear.in_features, generator=generator)
            tensors[f"{PREFIX}{site}.lora_B.weight"] = torch.randn(linear.out_features, RANK, generator=generator)
    return {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}


def a_name(layer: int = 0, projection: str = "q_proj", matrix: str = "A") -> str:
    """The name of one of its tensors."""
    return f"{PREFIX}{SITE.format(layer, projection)}.lora_{matrix}.weight"


def toy_manifest(**changes: Any) -> Manifest:
    """A manifest that fits the toy base."""
    values = {"format_version": 1, "method": "lora", "base": BaseRef("toy", IDENTITY, WEIGHTS_DIGEST), **changes}
    return Manifest(**values)


def toy_artifact(
    config: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    manifest: Manifest | None = None,
) -> Artifact:
    """An artifact that never was on disk."""
    config = toy_config() if config is None else config
    return Artifact(config, toy_tensors() if tensors is None else tensors, manifest, "d" * 64, 0)


def toy_folder(folder: Path, seed: int = 0, manifest: Manifest | None = None, **changes: Any) -> Path:
    """A sound PEFT folder of the toy base."""
    write_folder(folder, toy_config(**changes), save(toy_tensors(seed)), manifest)
    return folder


def digest_of(folder: Path) -> str:
    """A folder's digest."""
    return read_folder(folder).digest


def raw(header: Any, body: bytes = b"") -> bytes:
    """A safetensors file of any header: a thing to write as JSON, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: Any, begin: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def zip_of(members: dict[str, bytes] | list[tuple[str | zipfile.ZipInfo, bytes]], compress: bool = False) -> bytes:
    """A zip of any members, also of the same name twice."""
    out, kind = io.BytesIO(), zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, data)
    return out.getvalue()


def tar_of(
    members: dict[str, bytes] | list[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT
) -> bytes:
    """A gzipped tar of any members, of the form of GNU or of POSIX."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:", format=form) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return gzip.compress(out.getvalue(), 1)


def tar_link(name: str, kind: bytes = tarfile.SYMTYPE, target: str = "/etc/passwd") -> tarfile.TarInfo:
    """A member that is no plain file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def sound_members() -> dict[str, bytes]:
    """The files of a sound PEFT folder."""
    return {CONFIG: json.dumps(toy_config()).encode(), WEIGHTS: save(toy_tensors())}
