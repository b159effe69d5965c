"""Compile layer-norm tuning as PEFT writes it (arXiv:2312.11420): targeted modules, mostly norms, trained in full."""

from __future__ import annotations

import msgspec

from adapters_store.base.spec import BaseSpec
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import PREFIX, by_site, expect_exactly
from adapters_store.methods.shared.extras import ExtrasConfig, saved_sites, split_extras
from adapters_store.methods.shared.full_modules import parameters, replace_module, require_changes
from adapters_store.methods.shared.targets import check_targets
from adapters_store.primitives import Primitive

LAYERS = ".ln_tuning_layers."
WEIGHT_END, BIAS_END = LAYERS + "weight", LAYERS + "bias"


class LNTuningConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The keys of PEFT's LNTuningConfig that change the computation."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None


def compile_ln_tuning(artifact: Artifact, spec: BaseSpec) -> tuple[Primitive, ...]:
    """Compile to `Scale` and `Bias` at norms, and `Delta`, `Bias` or `Rows` elsewhere. Raises `ArtifactError`.

    PEFT copies what it targets: a tied base's head becomes separate, as with `modules_to_save`.
    """
    read = read_config(artifact, LNTuningConfig, "layer-norm tuning")
    config = ExtrasConfig(**msgspec.structs.asdict(read))
    parts, saved = split_extras(artifact, config, spec, WEIGHT_END), saved_sites(config, spec)
    sites = [site for site in (*spec.norms, *spec.linears, spec.embedding) if site not in saved]
    targeted = by_site(parts.low_rank, (WEIGHT_END, BIAS_END), sites, spec.name)
    check_targets(config, targeted, sites, spec, lambda site: PREFIX + site + WEIGHT_END)
    shapes = {site: parameters(spec, site) for site in targeted}
    expect_exactly(
        parts.low_rank, {_name(site, name): shapes[site][name] for site in targeted for name in shapes[site]}
    )
    primitives = parts.primitives
    for site in targeted:
        primitives += replace_module(
            spec, site, *(artifact.tensors.get(_name(site, name)) for name in ("weight", "bias"))
        )
    return require_changes(primitives, spec)


def _name(site: str, name: str) -> str:
    return PREFIX + site + LAYERS + name
