"""Compile an artifact to primitives for one base, within a device's limits."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch

from adapters_store.base.spec import BaseSpec, ItemBytes
from adapters_store.errors import ArtifactError, ArtifactTooLargeError, WrongBaseError
from adapters_store.format.folder import Artifact
from adapters_store.methods import Method, method_of
from adapters_store.primitives import Patch, PrefixEmbeds, PrefixKV, Primitive


@dataclass(frozen=True)
class Room:
    """A device's limits for a patch: bytes in all, bytes of a number, and the greatest value of a matrix."""

    num_bytes: int
    item_bytes: ItemBytes
    largest_value: float = inf


def compile_patch(artifact: Artifact, spec: BaseSpec, room: Room | None = None) -> Patch:
    """Compile an artifact for a base. Raises `ArtifactError` unless it was made for this base and fits it completely.

    A few numbers can compile to as many as the base has: compilation stops once they exceed `room`.
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
    primitives, num_bytes = list[Primitive](), 0
    for primitive in method.compile(artifact, spec):
        num_bytes += 0 if room is None else room.item_bytes.of(primitive)
        if room is not None and num_bytes > room.num_bytes:
            raise ArtifactTooLargeError(
                f"the adapter, compiled for {spec.name}, takes more than {room.num_bytes} bytes, which is all that "
                "this server keeps for adapters"
            )
        if room is not None and room.largest_value < torch.finfo(torch.float32).max:
            check_values(primitive, room.largest_value)
        primitives.append(primitive)
    return tuple(primitives)


def check_values(primitive: Primitive, largest: float) -> None:
    """Raise `ArtifactError` if a matrix has a value over `largest`, which a device that stores 16 bits cannot hold."""
    greatest = [float(matrix.detach().abs().max()) for matrix in primitive.matrices() if matrix.numel()]
    if isinstance(primitive, PrefixEmbeds | PrefixKV) or all(value <= largest for value in greatest):
        return
    raise ArtifactError(
        f"a value of {max(greatest):g} at {primitive.site} is over {largest:g}, the most that this server keeps of a "
        "matrix; with --precision fp32 it keeps more",
        primitive.site,
    )
