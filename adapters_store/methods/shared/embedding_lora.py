"""Compile LoRA on the embedding, and check the copies of embedding and head that PEFT saves if one is a target.

The embedding of token t becomes W[t] + s (B A)[:, t], A [r, vocabulary], B [size, r]: changed rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.base.weights import base_weight
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.expect import PREFIX, finite
from adapters_store.methods.shared.full_modules import parameters, replace_embedding
from adapters_store.methods.shared.tensor_pool import TensorPool
from adapters_store.methods.shared.unused_tensors import mark_redundant
from adapters_store.primitives import Primitive

A_END, B_END = ".lora_embedding_A", ".lora_embedding_B"


def has_embedding_lora(artifact: Artifact, spec: BaseSpec) -> bool:
    """Tell if the artifact has a LoRA on the embedding."""
    return any(PREFIX + spec.embedding + end in artifact.tensors for end in (A_END, B_END))


def compile_embedding(pool: TensorPool, spec: BaseSpec, rank: int, scale: float) -> list[Primitive]:
    """Compile to `Rows` of the tokens whose embedding changes. Raises `ArtifactError`."""
    site = spec.embedding
    a = pool.pop(site + A_END, [rank, spec.vocab_size]).float()
    b = pool.pop(site + B_END, [spec.embedding_size, rank]).float() * scale
    return replace_embedding(spec, site, finite((b @ a).T + base_weight(spec, f"{site}.weight"), PREFIX + site + B_END))


def drop_copies(pool: TensorPool, spec: BaseSpec) -> None:
    """Drop the copies of embedding and head that PEFT saves. Raises `ArtifactError` unless they equal the base's."""
    for name, parameter, shape in _possible_copies(spec):
        if not pool.has(name):
            continue
        copy = pool.pop(name, shape)
        if not _is_equal(copy, base_weight(spec, parameter)):
            raise ArtifactError(
                f"{PREFIX}{name} is not as {spec.name} has it, and modules_to_save does not name it: "
                "the artifact was trained on a base with another embedding or head",
                PREFIX + name,
            )
        mark_redundant(copy)


def _possible_copies(spec: BaseSpec) -> Iterator[tuple[str, str, list[int]]]:
    """Yield the names under which PEFT may save embedding or head: name, the base's parameter, shape."""
    for site in filter(None, (spec.embedding, spec.head)):
        for end, shape in parameters(spec, site).items():
            yield f"{site}.base_layer.{end}", f"{site}.{end}", shape
            yield f"{site}.{end}", f"{site}.{end}", shape


def _is_equal(copy: Tensor, weight: Tensor) -> bool:
    """Compare in the copy's own precision, which may be lower than the base's."""
    return bool((weight.to(copy.dtype) == copy).all())
