"""Compile selective tuning: chosen parameters of the base trained in full, and nothing else (BitFit, arXiv:2106.10199).

The format is our own PEFT-style folder, since PEFT has no such type. The config has `peft_type: "SELECTIVE"` and
`parameters`, names of what was trained: a parameter (`model.norm.weight`), or any run of the words between its dots,
which stands for every parameter that has it (`bias`, `mlp.down_proj`, `layers.1`). Tensors are `base_model.model.` +
the parameter's name in transformers, with its new value as the trainer has it.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import PREFIX, expect_exactly
from adapters_store.methods.shared.full_modules import parameters, replace_module, require_changes
from adapters_store.primitives import Primitive, Rows


class SelectiveConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The config's key: names of the trained parameters."""

    parameters: list[str]


def compile_selective(artifact: Artifact, spec: BaseSpec) -> tuple[Primitive, ...]:
    """Compile to updates that give the base the new parameters, at both ends of a tied one. Raises `ArtifactError`.

    `Delta` and `Bias` at a linear, `Scale` and `Bias` at a norm, `Rows` at the embedding.
    """
    config = read_config(artifact, SelectiveConfig, "selective tuning")
    shapes = _parameters(spec)
    for name in artifact.tensors:
        if name.removeprefix(PREFIX) not in shapes or not name.startswith(PREFIX):
            raise ArtifactError(f"the tensor {name} has no site in {spec.name}: {_WHERE}", name)
    expect_exactly(artifact, {PREFIX + name: shapes[name] for name in _named(config.parameters, shapes, spec)})
    return require_changes([primitive for site in _sites(spec) for primitive in _whole(artifact, spec, site)], spec)


_WHERE = "only the parameters of linears, norms and the embedding are served"


def _whole(artifact: Artifact, spec: BaseSpec, site: str) -> Iterator[Primitive]:
    weight, bias = (artifact.tensors.get(f"{PREFIX}{site}.{name}") for name in ("weight", "bias"))
    for primitive in replace_module(spec, site, weight, bias):
        yield primitive
        if isinstance(primitive, Rows) and spec.is_tied:
            yield Rows(spec.head, primitive.ids, primitive.de / spec.embedding_scale)


def _sites(spec: BaseSpec) -> list[str]:
    return [*spec.linears, *spec.norms, spec.embedding]


def _parameters(spec: BaseSpec) -> dict[str, list[int]]:
    """Return the shapes of all parameters by name; a tied head's weight is left out, as it is the embedding's."""
    shapes = {f"{site}.{name}": shape for site in _sites(spec) for name, shape in parameters(spec, site).items()}
    if spec.is_tied:
        shapes.pop(f"{spec.head}.weight", None)
    return shapes


def _named(names: list[str], shapes: dict[str, list[int]], spec: BaseSpec) -> list[str]:
    """Select the parameters that the config names. Raises `ArtifactError` for a name that no parameter has."""
    runs, chosen_runs = {name: set(_runs(name)) for name in shapes}, frozenset(names)
    if unknown := sorted(chosen_runs.difference(*runs.values())):
        is_head = spec.is_tied and unknown[0] in _runs(f"{spec.head}.weight")
        reason = f"its head is tied: name {spec.embedding}.weight" if is_head else _WHERE
        raise ArtifactError(f"parameters names {unknown[0][:80]!r}, which {spec.name} has not; {reason}", "parameters")
    chosen = [name for name in shapes if not chosen_runs.isdisjoint(runs[name])]
    if not chosen:
        raise ArtifactError("parameters is empty: nothing was trained", "parameters")
    return chosen


def _runs(name: str) -> Iterator[str]:
    """Yield every run of the words between a name's dots."""
    words = name.split(".")
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            yield ".".join(words[start:stop])
