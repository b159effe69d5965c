"""Compile what PEFT's LoRA family can train beside low-rank updates: biases, modules saved in full, token rows.

`bias="all"` saves every bias of the base, `"lora_only"` those of the linears with an update, each with its new value.
`modules_to_save` names modules by the ends of their names; their linears, norms and embedding are saved in full.
`trainable_token_indices` are trained at the embedding, or at the modules that a dict of them names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.embedding_lora import drop_copies
from adapters_store.methods.shared.expect import PREFIX
from adapters_store.methods.shared.full_modules import parameters, replace_module
from adapters_store.methods.shared.targets import MAX_PATTERNS, Targets, ends_with_any
from adapters_store.methods.shared.tensor_pool import TensorPool
from adapters_store.methods.shared.unused_tensors import mark_redundant
from adapters_store.methods.trainable_tokens import row_width, token_ids, token_rows
from adapters_store.primitives import Primitive

TOKENS, TOKENS_END = "trainable_token_indices", ".token_adapter.trainable_tokens_delta"
# Modules to save that PEFT treats as tied with ensure_weight_tying.
TIED_NAMES = ("embed_tokens", "lm_head")


class ExtrasConfig(Targets, kw_only=True):
    """The keys of LoRA and its relatives for what is trained beside low-rank updates."""

    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


@dataclasses.dataclass(frozen=True)
class ArtifactParts:
    """An artifact split into low-rank tensors and extras.

    `low_rank` has the tensors left for low-rank updates, which may be at the linears `sites`; `biases` [out] are the
    new biases of linears with an update; `primitives` is what all other extras compile to.
    """

    low_rank: Artifact
    sites: list[str]
    biases: dict[str, Tensor]
    primitives: list[Primitive]


def split_extras(artifact: Artifact, config: ExtrasConfig, spec: BaseSpec, *ends: str) -> ArtifactParts:
    """Split off the extras; a linear has a low-rank update if a tensor is named by its site and one of `ends`.

    Raises `ArtifactError` if a tensor is missing or does not fit.
    """
    pool, saved, tokens = TensorPool(artifact), saved_sites(config, spec), _token_sites(config, spec)
    if both := tokens.keys() & saved.keys():
        raise ArtifactError(f"{min(both)} is in modules_to_save and in {TOKENS}", TOKENS)
    primitives = _saved(pool, config, spec, saved) + _tokens(pool, config, spec, tokens)
    sites = [site for site in spec.linears if site not in saved and site not in tokens]
    low_rank_sites = {site for site in sites if any(pool.has(site + end) for end in ends)}
    biases: dict[str, Tensor] = {}
    for site, size in _biased(config, spec, low_rank_sites):
        if site in low_rank_sites:
            biases[site] = pool.pop(f"{site}.base_layer.bias", [size])
        elif site not in saved:
            primitives += replace_module(spec, site, None, pool.pop(f"{site}.bias", [size]))
    drop_copies(pool, spec)
    return ArtifactParts(pool.remaining(), sites, biases, primitives)


def saved_sites(config: ExtrasConfig, spec: BaseSpec) -> dict[str, str]:
    """Return the linears, norms and embedding in modules whose names end with one of `modules_to_save`.

    Each comes with the name of that module, the outermost one. Raises `ArtifactError` for too many or empty names.
    """
    names = frozenset(config.modules_to_save or ())
    if len(config.modules_to_save or ()) > MAX_PATTERNS or not all(names):
        raise ArtifactError(f"modules_to_save must be at most {MAX_PATTERNS} names, none empty", "modules_to_save")
    tied = {spec.embedding, spec.head} if _is_saved_tied(config, spec) else set[str]()
    module_of: dict[str, str] = {}
    for site in [*spec.linears, *spec.norms, spec.embedding] if names or tied else ():
        module = next((module for module in _modules(site) if ends_with_any(module, names)), "")
        if module or site in tied:
            module_of[site] = module or site
    return module_of


def _modules(site: str) -> Iterator[str]:
    """Yield the names of the modules around a site, the outermost first, and its own."""
    parts = site.split(".")
    return (".".join(parts[: end + 1]) for end in range(len(parts)))


def _is_saved_tied(config: ExtrasConfig, spec: BaseSpec) -> bool:
    ends = {name.rpartition(".")[2] for name in config.modules_to_save or ()}
    return config.ensure_weight_tying and spec.is_tied and not ends.isdisjoint(TIED_NAMES)


def _saved(pool: TensorPool, config: ExtrasConfig, spec: BaseSpec, saved: dict[str, str]) -> list[Primitive]:
    primitives: list[Primitive] = []
    weights: dict[str, Tensor] = {}
    for site, module in saved.items():
        trained = {name: pool.pop(f"{site}.{name}", shape) for name, shape in parameters(spec, site).items()}
        weights[site] = trained["weight"]
        primitives += replace_module(spec, site, trained["weight"], trained.get("bias"))
        if config.bias == "all" and "bias" in trained:  # PEFT saves two more copies, and does not read them
            inner, size = site.removeprefix(module), list(trained["bias"].shape)
            for copy in ("original_module", "modules_to_save.default" if inner else "modules_to_save"):
                mark_redundant(pool.pop(f"{module}.{copy}{inner}.bias", size))
    if _is_saved_tied(config, spec) and not torch.equal(weights[spec.embedding], weights[spec.head]):
        name, other = f"{PREFIX}{spec.embedding}.weight", f"{PREFIX}{spec.head}.weight"
        raise ArtifactError(f"{other} differs from {name}, but ensure_weight_tying ties them", other)
    return primitives


def _token_sites(config: ExtrasConfig, spec: BaseSpec) -> dict[str, list[int]]:
    """Return the token ids trained at the embedding or head, by site. Raises `MethodUnsupportedError`."""
    indices = config.trainable_token_indices
    if indices is None:
        return {}
    tokens_of: dict[str, list[int]] = {}
    for name, tokens in ({spec.embedding: indices} if isinstance(indices, list) else indices).items():
        sites = [site for site in (spec.embedding, spec.head) if name and site.endswith(name)]
        if len(sites) != 1 or sites[0] in tokens_of:
            raise MethodUnsupportedError(f"{TOKENS} has {name[:80]}, which is not one embedding or head", TOKENS)
        tokens_of[sites[0]] = tokens
    return tokens_of


def _tokens(pool: TensorPool, config: ExtrasConfig, spec: BaseSpec, tokens: dict[str, list[int]]) -> list[Primitive]:
    """Compile the token rows. As in PEFT, a tied head gets the embedding's new rows, unless it has other tokens."""
    is_mixed = spec.head in tokens and tokens[spec.head] != tokens.get(spec.embedding)
    if spec.is_tied and is_mixed and spec.embedding in tokens and config.ensure_weight_tying:
        raise ArtifactError(f"{TOKENS} differ for embedding and head, but ensure_weight_tying ties them", TOKENS)
    is_tied = spec.is_tied and not is_mixed
    primitives: list[Primitive] = []
    for site, indices in tokens.items():
        if is_tied and site == spec.head:
            continue
        ids, order = token_ids(indices, spec, TOKENS)
        rows = pool.pop(site + TOKENS_END, [len(ids), row_width(spec, site)]).float()[order]
        primitives += token_rows(spec, site, ids, rows, is_tied)
    return primitives


def _biased(config: ExtrasConfig, spec: BaseSpec, low_rank_sites: set[str]) -> Iterator[tuple[str, int]]:
    """Yield the sites that have a new bias, each with its size."""
    if config.bias != "none":
        linears = ((site, linear.out_features) for site, linear in spec.linears.items() if linear.has_bias)
        yield from ((site, size) for site, size in linears if config.bias == "all" or site in low_rank_sites)
    if config.bias == "all":
        yield from ((site, norm.size) for site, norm in spec.norms.items() if norm.has_bias)
