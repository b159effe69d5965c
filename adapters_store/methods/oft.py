"""Compile OFT as PEFT writes it (arXiv:2306.07280): W becomes W R^T, R orthogonal, block by block along the input.

A block of size n has n (n - 1) / 2 numbers, the upper triangle of a skew-symmetric Q, and R is Cayley's transform of
Q: (I - Q) (I + Q)^-1, or the first terms of its Neumann series.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.base.weights import base_weight
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import PREFIX, finite
from adapters_store.methods.shared.linears import linears_of
from adapters_store.methods.shared.targets import Targets
from adapters_store.primitives import Delta

END = ".oft_R.weight"
IGNORED_KEYS = {"eps", "fan_in_fan_out", "init_weights", "module_dropout"}  # eps bounds coft's rotations alone
SERVED_VALUES: dict[str, tuple[Any, ...]] = {"bias": ("none",), "coft": (False,), "modules_to_save": (None, [])}
MAX_TERMS = 100
FIRST_VERSION = (0, 18)  # of PEFT with today's sum of Neumann's series


class OftConfig(Targets, kw_only=True):
    """The keys of PEFT's OFTConfig that change the computation."""

    oft_block_size: int
    r: int = 0
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def block_size(self, linear: LinearSite) -> int:
        """Return a block's size: the divisor of the inputs nearest to oft_block_size, or the inputs over about r."""
        if self.oft_block_size:
            return nearest_divisor(linear.in_features, self.oft_block_size)
        return linear.in_features // nearest_divisor(linear.in_features, self.r)

    def shapes(self, _site: str, linear: LinearSite) -> dict[str, list[int]]:
        """Return the shape of a site's tensor, by the end of its name."""
        size = self.block_size(linear)
        return {END: [1 if self.block_share else linear.in_features // size, size * (size - 1) // 2]}


def compile_oft(artifact: Artifact, spec: BaseSpec) -> Iterator[Delta]:
    """Compile to a `Delta` per site, dW = W (R - I)^T. Raises `ArtifactError`."""
    config = _read(artifact)
    sites = linears_of(artifact, config, spec, (END,), config.shapes)
    return (_update(artifact, config, site, spec) for site in sites)


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of `number` nearest to `wanted`; the lower one of two equally near."""
    if wanted >= number:
        return number
    lower = next(divisor for divisor in range(wanted, 0, -1) if number % divisor == 0)
    higher = next(divisor for divisor in range(wanted, number + 1) if number % divisor == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _update(artifact: Artifact, config: OftConfig, site: str, spec: BaseSpec) -> Delta:
    name, weight, size = PREFIX + site + END, base_weight(spec, f"{site}.weight"), config.block_size(spec.linears[site])
    q = torch.zeros(len(artifact.tensors[name]), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    q[:, rows, columns] = artifact.tensors[name].float()
    q = q - q.mT
    rotation = _neumann(q, config.num_cayley_neumann_terms) if config.use_cayley_neumann else _cayley(q)
    blocks = weight.reshape(len(weight), -1, size)
    dw = torch.einsum("orc,rkc->ork", blocks, rotation.expand(blocks.shape[1], size, size)).reshape(weight.shape)
    return Delta(site, finite(dw, name))


def _cayley(q: Tensor) -> Tensor:
    """Compute R - I from Q [blocks, n, n] by solving (I + Q)."""
    unit = torch.eye(q.shape[-1])
    rotation: Tensor = torch.linalg.solve(unit + q, unit - q, left=False)
    return rotation - unit


def _neumann(q: Tensor, num_terms: int) -> Tensor:
    """Compute R - I = 2 Q + 2 Q^2 + ..., the last power counted once, as in PEFT, whose four terms are three."""
    if num_terms < 3:
        return 2 * (num_terms - 1) * q
    total, power = 2 * q, q
    for _ in range(max(1, num_terms - 3)):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def _read(artifact: Artifact) -> OftConfig:
    read = read_config(artifact, OftConfig, "OFT", IGNORED_KEYS, SERVED_VALUES)
    if min(read.r, read.oft_block_size) < 0 or (read.r == 0) == (read.oft_block_size == 0):
        raise ArtifactError("of r and oft_block_size exactly one must be above 0, and the other 0", "oft_block_size")
    if not 0 < read.num_cayley_neumann_terms <= MAX_TERMS:
        raise ArtifactError(f"num_cayley_neumann_terms is not between 1 and {MAX_TERMS}", "num_cayley_neumann_terms")
    if read.use_cayley_neumann and _version(artifact.config.get("peft_version")) < FIRST_VERSION:
        raise MethodUnsupportedError(
            "OFT with use_cayley_neumann of a PEFT before 0.18 is another rotation (by peft_version): train it again "
            "with a newer one",
            "peft_version",
        )
    return read


def _version(version: object) -> tuple[int, int]:
    """Parse the major and minor number of a version; (0, 0) if it has none."""
    matched = re.match(r"([0-9]{1,9})\.([0-9]{1,9})", version) if isinstance(version, str) else None
    return (int(matched[1]), int(matched[2])) if matched else (0, 0)
