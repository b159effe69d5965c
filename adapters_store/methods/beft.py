"""Compile BEFT as PEFT writes it: a bias [1, out] per linear (y += b), also for linears that have none."""

from __future__ import annotations

from typing import Any

from adapters_store.base.spec import BaseSpec
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import PREFIX
from adapters_store.methods.shared.linears import linears_of
from adapters_store.methods.shared.targets import Targets
from adapters_store.primitives import Bias

END = ".beft_bias"
IGNORED_KEYS = {"init_weights"}
SERVED_VALUES: dict[str, tuple[Any, ...]] = {"modules_to_save": (None, [])}


class BeftConfig(Targets, kw_only=True):
    """The keys of PEFT's BeftConfig that change the computation."""


def compile_beft(artifact: Artifact, spec: BaseSpec) -> tuple[Bias, ...]:
    """Compile to a `Bias` per site. Raises `ArtifactError`."""
    config = read_config(artifact, BeftConfig, "BEFT", IGNORED_KEYS, SERVED_VALUES)
    sites = linears_of(artifact, config, spec, (END,), lambda _site, linear: {END: [1, linear.out_features]})
    return tuple(Bias(site, artifact.tensors[PREFIX + site + END].float().flatten()) for site in sites)
