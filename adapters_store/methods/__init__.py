"""One file a method: its config, the tensors it must have, and how it compiles to primitives.

Registering one is one line in `METHODS`, keyed by PEFT's `peft_type`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf

import torch

from adapters_store.artifact import Artifact
from adapters_store.errors import ArtifactError, ArtifactTooLargeError, MethodUnsupportedError, WrongBaseError
from adapters_store.methods import (
    adalora,
    adapterhub,
    beft,
    bottleneck,
    cpt,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    oft,
    prefix_tuning,
    prompt_tuning,
    selective,
    trainable_tokens,
    vera,
)
from adapters_store.methods.refused import refusal
from adapters_store.patch import Bottleneck, Delta, LowRank, Patch, Primitive, Rows
from adapters_store.spec import BaseSpec, ItemBytes


@dataclass(frozen=True)
class Method:
    """`compile` checks that an artifact fits a base tensor for tensor, and compiles it; it raises `ArtifactError`.

    `is_kv` says that it compiles to keys and values (`PrefixKV`).
    """

    name: str
    compile: Callable[[Artifact, BaseSpec], Iterable[Primitive]]
    is_kv: bool = False


METHODS: Mapping[str, Method] = {
    "LORA": Method("lora", lora.compile_lora),
    "ADALORA": Method("adalora", adalora.compile_adalora),
    "BOTTLENECK": Method("bottleneck", bottleneck.compile_bottleneck),
    "CARTRIDGE": Method("cartridge", prefix_tuning.compile_cartridge, is_kv=True),
    "CPT": Method("cpt", cpt.compile_cpt),
    "MULTITASK_PROMPT_TUNING": Method("multitask_prompt_tuning", prompt_tuning.compile_multitask),
    "PREFIX_TUNING": Method("prefix_tuning", prefix_tuning.compile_prefix_tuning, is_kv=True),
    "PROMPT_TUNING": Method("prompt_tuning", prompt_tuning.compile_prompt_tuning),
    "P_TUNING": Method("p_tuning", prompt_tuning.compile_p_tuning),
    "IA3": Method("ia3", ia3.compile_ia3),
    "LOHA": Method("loha", loha.compile_loha),
    "LOKR": Method("lokr", lokr.compile_lokr),
    "VERA": Method("vera", vera.compile_vera),
    "SELECTIVE": Method("selective", selective.compile_selective),
    "TRAINABLE_TOKENS": Method("trainable_tokens", trainable_tokens.compile_trainable_tokens),
    "BEFT": Method("beft", beft.compile_beft),
    "MISS": Method("miss", miss.compile_miss),
    "OFT": Method("oft", oft.compile_oft),
    "LN_TUNING": Method("ln_tuning", ln_tuning.compile_ln_tuning),
}
ADAPTERHUB = Method("bottleneck", adapterhub.compile_adapterhub)  # its configs have no peft_type


def method_of(artifact: Artifact) -> Method:
    """The method that an artifact's config names. Raises `MethodUnsupportedError`."""
    peft_type = artifact.config.get("peft_type")
    if adapterhub.is_adapterhub(artifact.config):
        return ADAPTERHUB
    if not isinstance(peft_type, str):
        raise ArtifactError("adapter_config.json has no peft_type", "peft_type")
    if peft_type not in METHODS:
        raise MethodUnsupportedError(refusal(peft_type, METHODS), "peft_type")
    return METHODS[peft_type]


def is_kv(name: str) -> bool:
    """Whether the method of this name brings the keys and values of its virtual tokens."""
    return any(method.name == name and method.is_kv for method in METHODS.values())


@dataclass(frozen=True)
class Room:
    """What a device has for a patch: bytes, those of a number, and the largest value that it keeps of a matrix."""

    num_bytes: int
    item_bytes: ItemBytes
    largest_value: float = inf


def compile_patch(artifact: Artifact, spec: BaseSpec, room: Room | None = None) -> Patch:
    """Compile to primitives. Raises `ArtifactError` unless the artifact was made for this base and fits it whole.

    A few numbers can compile to as many as the base has: no more than there is `room` for are ever computed.
    """
    manifest, method = artifact.manifest, method_of(artifact)
    if manifest is not None and manifest.base.identity != spec.identity:
        raise WrongBaseError(
            f"the artifact was trained on {manifest.base.name} ({manifest.base.identity[:12]}), "
            f"this server's base is {spec.name} ({spec.identity[:12]})",
            "base",
        )
    if manifest is not None and manifest.method != method.name:
        raise ArtifactError(f"the manifest says {manifest.method}, the config {method.name}", "method")
    num_parameters = sum(tensor.numel() for tensor in artifact.tensors.values())
    return Patch(artifact.digest, method.name, _primitives(method, artifact, spec, room), num_parameters)


def _primitives(method: Method, artifact: Artifact, spec: BaseSpec, room: Room | None) -> tuple[Primitive, ...]:
    made, num_bytes = list[Primitive](), 0
    for primitive in method.compile(artifact, spec):
        num_bytes += 0 if room is None else room.item_bytes.of(primitive)
        if room is not None and num_bytes > room.num_bytes:
            raise ArtifactTooLargeError(
                f"the adapter, compiled for {spec.name}, takes more than {room.num_bytes} bytes, which is all that "
                "this server keeps for adapters"
            )
        if room is not None and room.largest_value < torch.finfo(torch.float32).max:
            check_values(primitive, room.largest_value)
        made.append(primitive)
    return tuple(made)


def check_values(primitive: Primitive, largest: float) -> None:
    """Raise `ArtifactError` where a matrix holds a value that the device, which may keep it in 16 bits, cannot."""
    match primitive:
        case LowRank(a=a, b=b) | Bottleneck(down=a, up=b):
            matrices = [a, b]
        case Delta(dw=matrix) | Rows(de=matrix):
            matrices = [matrix]
        case _:
            return
    found = max(float(matrix.detach().abs().max()) for matrix in matrices) if all(map(len, matrices)) else 0.0
    if not found <= largest:
        raise ArtifactError(
            f"a value of {found:g} at {primitive.site} is over {largest:g}, the most that this server keeps of a "
            "matrix; with --precision fp32 it keeps more",
            primitive.site,
        )
