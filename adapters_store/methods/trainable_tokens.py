"""Compile trainable tokens as PEFT writes them: new rows of the embedding for a few tokens, and of a tied head.

The tensor has the new rows themselves, not their change, in the order of token_indices.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.base.weights import base_weight
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import PREFIX, by_site, expect_shape, finite
from adapters_store.methods.shared.targets import Targets, check_targets
from adapters_store.methods.shared.unused_tensors import mark_redundant
from adapters_store.primitives import Bias, Primitive, Rows

END = ".trainable_tokens_delta"
IGNORED_KEYS = {"init_weights"}  # how the rows were initialised


class TrainableTokensConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The keys of PEFT's TrainableTokensConfig that change the computation."""

    token_indices: list[int]
    target_modules: list[str] | str | None = None


def compile_trainable_tokens(artifact: Artifact, spec: BaseSpec) -> tuple[Primitive, ...]:
    """Compile to `Rows` at the embedding, and at the head if it is tied or targeted. Raises `ArtifactError`."""
    config = read_config(artifact, TrainableTokensConfig, "trainable tokens", IGNORED_KEYS)
    ids, order = token_ids(config.token_indices, spec)
    sites = list(by_site(artifact, (END,), _sites(spec), spec.name))
    if spec.is_tied and spec.embedding in sites:
        _check_tied(artifact, spec)
        sites = [spec.embedding]
    named = [spec.embedding] if config.target_modules is None else config.target_modules  # PEFT's default
    targets = Targets(target_modules=named)
    check_targets(targets, sites, _sites(spec), spec, lambda site: PREFIX + site + END)
    primitives: list[Primitive] = []
    for site in sites:
        rows = expect_shape(artifact, PREFIX + site + END, [len(ids), row_width(spec, site)]).float()[order]
        primitives += token_rows(spec, site, ids, rows, is_tied=spec.is_tied)
    return tuple(primitives)


def token_rows(spec: BaseSpec, site: str, ids: Tensor, rows: Tensor, is_tied: bool) -> list[Primitive]:
    """Compile new rows [n, width] of the tokens `ids` (ascending) at the embedding or head, or at both if `is_tied`.

    PEFT's wrapper of a head drops the head's bias, in training too: so do the primitives. Raises `ArtifactError`.
    """
    change = finite(rows - base_weight(spec, f"{site}.weight")[ids], PREFIX + site + END)
    primitives: list[Primitive] = []
    if site == spec.embedding:
        primitives.append(Rows(site, ids, finite(change * spec.embedding_scale, PREFIX + site + END)))
    if site == spec.head or is_tied:
        primitives.append(Rows(spec.head, ids, change))
        if spec.linears[spec.head].has_bias:
            primitives.append(Bias(spec.head, -base_weight(spec, f"{spec.head}.bias")))
    return primitives


def token_ids(indices: list[int], spec: BaseSpec, key: str = "token_indices") -> tuple[Tensor, Tensor]:
    """Sort the token ids of `key`, a list of the config.

    Returns the ids in ascending order, and each one's index in the list. Raises `ArtifactError` for an empty list, an
    id outside the vocabulary, or a duplicate.
    """
    if not indices:
        raise ArtifactError(f"{key} is empty: there is no token that was trained", key)
    if wrong := [index for index in indices if not 0 <= index < spec.vocab_size]:
        raise ArtifactError(f"{key} has {wrong[0]}: {spec.name} has the tokens 0 to {spec.vocab_size - 1}", key)
    ids, order = torch.tensor(indices).sort()
    if twice := ids[1:][ids.diff() == 0].tolist():
        raise ArtifactError(f"{key} has {twice[0]} twice: which row is meant cannot be told", key)
    return ids, order


def _sites(spec: BaseSpec) -> list[str]:
    return [site for site in (spec.embedding, spec.head) if site]


def row_width(spec: BaseSpec, site: str) -> int:
    """Return the width of a row of the embedding or head."""
    return spec.embedding_size if site == spec.embedding else spec.linears[site].in_features


def _check_tied(artifact: Artifact, spec: BaseSpec) -> None:
    """Accept a tied head's rows if they equal the embedding's: PEFT saves this parameter under both names."""
    name, other = PREFIX + spec.embedding + END, PREFIX + spec.head + END
    tensors = artifact.tensors
    if other not in tensors:
        return
    if not torch.equal(tensors[name], tensors[other]):
        raise ArtifactError(f"{other} differs from {name}, but {spec.name} ties its head to its embedding", other)
    mark_redundant(tensors[other])
