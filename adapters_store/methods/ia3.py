"""Compile (IA)3 as PEFT writes it (arXiv:2205.05638): a vector that scales a linear's output or input.

`ia3_l` is [1, in] and scales the input if feedforward_modules name the site, else it is [out, 1] and scales the output.
"""

from __future__ import annotations

from typing import Any

from adapters_store.base.spec import BaseSpec
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import PREFIX, by_site, expect_shape
from adapters_store.methods.shared.targets import PATTERN_CHARS, Targets, check_targets, ends_with_any, is_match
from adapters_store.primitives import Scale

END = ".ia3_l"
# The base's weight layout (fan_in_fan_out) matters only for merging in PEFT.
IGNORED_KEYS = {"fan_in_fan_out", "init_ia3_weights"}
SERVED_VALUES: dict[str, tuple[Any, ...]] = {"modules_to_save": (None, [])}


class IA3Config(Targets, kw_only=True):
    """The keys of PEFT's IA3Config that change the computation."""

    feedforward_modules: list[str] | str | None = None


def compile_ia3(artifact: Artifact, spec: BaseSpec) -> tuple[Scale, ...]:
    """Compile to a `Scale` per site. Raises `ArtifactError`."""
    config = read_config(artifact, IA3Config, "(IA)3", IGNORED_KEYS, SERVED_VALUES)
    feedforward = _feedforward(config, spec)
    sites = by_site(artifact, (END,), spec.linears, spec.name)
    primitives = tuple(_scale(artifact, site, spec, feedforward) for site in sites)
    check_targets(config, sites, spec.linears, spec, lambda site: PREFIX + site + END)
    return primitives


def _feedforward(config: IA3Config, spec: BaseSpec) -> set[str] | None:
    """Return the sites that scale their input, or None if the config leaves it open.

    The config leaves it open if feedforward_modules is missing or a regular expression, which is never run.
    """
    names = config.feedforward_modules
    if isinstance(names, list):
        ends = frozenset(names)
        return {site for site in spec.linears if ends_with_any(site, ends)}
    if names is None or not set(names) <= PATTERN_CHARS:
        return None
    return {site for site in spec.linears if is_match(names, site)}


def _scale(artifact: Artifact, site: str, spec: BaseSpec, feedforward: set[str] | None) -> Scale:
    linear, name = spec.linears[site], PREFIX + site + END
    of_input, of_output = [1, linear.in_features], [linear.out_features, 1]
    # If the config leaves it open, the vector's own shape tells what it scales.
    is_input = list(artifact.tensors[name].shape) == of_input if feedforward is None else site in feedforward
    vector = expect_shape(artifact, name, of_input if is_input else of_output)
    return Scale(site, vector.float().flatten(), "input" if is_input else "output")
