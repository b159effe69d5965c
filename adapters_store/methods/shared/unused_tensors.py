"""Which of an artifact's tensors act in what it compiles to: torch's own graph from them to the primitives tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from adapters_store.format.folder import Artifact
from adapters_store.primitives import Patch


def with_grad_tracking(artifact: Artifact) -> Artifact:
    """The same artifact, with tensors that leave a trace in all that is computed of them where gradients are on."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in artifact.tensors.items()}
    return dataclasses.replace(artifact, tensors=tensors)


def mark_redundant(tensor: Tensor) -> None:
    """Say of an artifact's tensor that it repeats the base or another, or is not read by PEFT: it need not act."""
    tensor.requires_grad_(False)


def unused_tensors(artifact: Artifact, patch: Patch) -> list[str]:
    """The names of a tracked artifact's tensors that neither act in its patch nor are settled. An empty one cannot."""
    reached = _leaves(tensor for primitive in patch.primitives for tensor in _tensors(primitive))
    left = {name: tensor for name, tensor in artifact.tensors.items() if tensor.requires_grad and tensor.numel()}
    return [name for name, tensor in left.items() if id(tensor) not in reached]


def _tensors(thing: Any) -> Iterator[Tensor]:
    """Those in a primitive's fields, in tuples too."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, tuple):
        for part in thing:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from _tensors(getattr(thing, field.name))


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """The ids of the leaves that tensors were computed from."""
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
