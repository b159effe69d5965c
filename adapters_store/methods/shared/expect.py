"""Check an artifact's tensors: assigned to sites, of the expected shapes, finite, and none extra."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.format.safetensors_file import is_finite

PREFIX = "base_model.model."  # starts the name of every tensor that PEFT saves


def by_site(artifact: Artifact, ends: Sequence[str], sites: Collection[str], base: str) -> dict[str, dict[str, Tensor]]:
    """Group tensors by site and by the end of their names, the sites in the order of `sites`.

    Every tensor must be named `PREFIX + site + end` with a site of `sites` and one of `ends`, else raises
    `ArtifactError`.
    """
    tensors_by_site: dict[str, dict[str, Tensor]] = {}
    known = frozenset(sites)
    for name, tensor in artifact.tensors.items():
        end = next((end for end in ends if name.startswith(PREFIX) and name.endswith(end)), None)
        site = name.removeprefix(PREFIX).removesuffix(end or "")
        if end is None or site not in known:
            raise ArtifactError(f"the tensor {name} has no site in {base}: no layer that it could act on", name)
        tensors_by_site.setdefault(site, {})[end] = tensor
    return {site: tensors_by_site[site] for site in sites if site in tensors_by_site}


def expect_shape(artifact: Artifact, name: str, expected: list[int]) -> Tensor:
    """Return the tensor of a name. Raises `ArtifactError` if it is missing or has another shape."""
    if name not in artifact.tensors:
        raise ArtifactError(f"the tensor {name} is missing", name)
    shape = list(artifact.tensors[name].shape)
    if shape != expected:
        raise ArtifactError(f"{name} has shape {shape}, this base and config need {expected}", name)
    return artifact.tensors[name]


def expect_exactly(artifact: Artifact, expected: Mapping[str, list[int]]) -> None:
    """Raise `ArtifactError` unless the artifact has exactly these tensors, by name and shape."""
    for name, shape in expected.items():
        expect_shape(artifact, name, shape)
    if extra := sorted(set(artifact.tensors) - set(expected)):
        raise ArtifactError(f"the tensor {extra[0]} is extra: this base and config have no place for it", extra[0])


def finite(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor that was computed from the artifact's `name`. Raises `ArtifactError` if it overflowed."""
    if not is_finite(tensor):
        raise ArtifactError(f"{name} overflows where it is compiled for this base", name)
    return tensor
