"""Find an artifact's tensors that its primitives do not depend on, by torch's autograd graph from one to the other.

A tensor that changes nothing hints at an adapter that is served differently from how it was trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from adapters_store.format.folder import Artifact
from adapters_store.primitives import Patch


def with_grad_tracking(artifact: Artifact) -> Artifact:
    """Return the artifact with tensors that require gradients, so that autograd records what depends on them."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in artifact.tensors.items()}
    return dataclasses.replace(artifact, tensors=tensors)


def mark_redundant(tensor: Tensor) -> None:
    """Exempt a tensor from the unused-tensor check: it duplicates the base or another tensor, or PEFT ignores it."""
    tensor.requires_grad_(False)


def unused_tensors(artifact: Artifact, patch: Patch) -> list[str]:
    """Return the names of a tracked artifact's non-empty tensors that neither its patch depends on nor are exempt."""
    reached = _leaves(tensor for primitive in patch.primitives for tensor in _tensors(primitive))
    left = {name: tensor for name, tensor in artifact.tensors.items() if tensor.requires_grad and tensor.numel()}
    return [name for name, tensor in left.items() if id(tensor) not in reached]


def _tensors(thing: Any) -> Iterator[Tensor]:
    """Yield the tensors in a primitive's fields, also those within tuples."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, tuple):
        for part in thing:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from _tensors(getattr(thing, field.name))


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """Return the ids of the leaf tensors that `tensors` were computed from."""
    leaves, seen, left = set[int](), set[Any](), list[Any]()
    for tensor in tensors:
        if tensor.grad_fn is not None:
            left.append(tensor.grad_fn)
        elif tensor.requires_grad:
            leaves.add(id(tensor))
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        leaves.update({id(node.variable)} if hasattr(node, "variable") else ())
        left += [before for before, _ in node.next_functions if before is not None]
    return leaves
