"""Take tensors out of an artifact one by one, and return the rest."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.expect import PREFIX, expect_shape


class TensorPool:
    """An artifact's tensors by their names without PEFT's prefix, to be taken once each."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact, self._popped = artifact, set[str]()

    def has(self, name: str) -> bool:
        """Tell if there is such a tensor that was not taken yet."""
        return PREFIX + name in self._artifact.tensors and PREFIX + name not in self._popped

    def pop(self, name: str, shape: list[int]) -> Tensor:
        """Take a tensor. Raises `ArtifactError` if it is missing or has another shape."""
        self._popped.add(PREFIX + name)
        return expect_shape(self._artifact, PREFIX + name, shape)

    def remaining(self) -> Artifact:
        """Return the artifact without the tensors that were taken."""
        left = {name: tensor for name, tensor in self._artifact.tensors.items() if name not in self._popped}
        return dataclasses.replace(self._artifact, tensors=left)
