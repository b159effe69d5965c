"""Match an adapter's target modules and patterns to sites, as PEFT does, without running a regular expression."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.errors import ArtifactError, MethodUnsupportedError

PATTERN_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
ALL_LINEAR = "all-linear"
MAX_PATTERNS = 2048  # as many as 4,096 tensors can have sites


class Targets(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The keys by which PEFT's tuners name the modules that they act on."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


def check_targets(
    config: Targets,
    sites_with_tensors: Collection[str],
    sites: Collection[str],
    spec: BaseSpec,
    tensor: Callable[[str], str],
) -> None:
    """Raise `ArtifactError` unless the sites with tensors are exactly the `sites` that target_modules names, and any.

    `tensor` gives the name of a site's tensor, for the message. A regular expression in the config is never run: then
    the tensors alone decide.
    """
    targeted = named_sites(config, sites, spec)
    if targeted is not None and (missing := sorted(targeted - set(sites_with_tensors))):
        name = tensor(missing[0])
        raise ArtifactError(f"the tensor {name} is missing: target_modules names its site", name)
    if targeted is not None and (extra := sorted(set(sites_with_tensors) - targeted)):
        name = tensor(extra[0])
        raise ArtifactError(f"the tensor {name} is extra: the config's target_modules do not name its site", name)
    if not sites_with_tensors:
        raise ArtifactError("the artifact has no tensors")


def named_sites(config: Targets, sites: Collection[str], spec: BaseSpec) -> set[str] | None:
    """Select the `sites` that a config names; None if that needs a regular expression, or the config names none."""
    targets, excluded, patterns = config.target_modules, config.exclude_modules or [], as_list(config.layers_pattern)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = [site for site, linear in spec.linears.items() if not is_head(site, linear, spec)]
    texts = [*patterns, *(names for names in (targets, excluded) if isinstance(names, str))]
    if targets is None or not all(set(text) <= PATTERN_CHARS for text in texts):
        return None
    named, out = _named(targets, sites), _named(excluded, sites)
    layers = _layers(config) if isinstance(targets, list) else None  # PEFT uses them with a list only
    return {site for site in named - out if layers is None or site in targets or layer_of(site, patterns) in layers}


def _named(names: list[str] | str, sites: Iterable[str]) -> set[str]:
    """Select the sites that a list names, or that a string of `PATTERN_CHARS`, to PEFT an expression, matches fully."""
    if isinstance(names, str):
        return {site for site in sites if is_match(names, site)}
    listed = frozenset(names)
    return {site for site in sites if is_named(site, listed)}


def is_match(pattern: str, site: str) -> bool:
    """Tell if an expression of `PATTERN_CHARS` matches the whole site; '.' is any character."""
    return len(pattern) == len(site) and all(want in (have, ".") for want, have in zip(pattern, site, strict=True))


def is_named(site: str, names: Collection[str]) -> bool:
    """Tell if a name is the site, or the part of the site after one of its dots."""
    parts = site.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def is_head(site: str, linear: LinearSite, spec: BaseSpec) -> bool:
    """Tell if a linear is the output head, which all-linear leaves out: as wide as the vocabulary, and in no layer."""
    return linear.out_features == spec.vocab_size and not any(part.isdigit() for part in site.split("."))


def as_list(value: list[str] | str | None) -> list[str]:
    """Turn a name into a list of it, and None into an empty list."""
    return [value] if isinstance(value, str) else value or []


def _layers(config: Targets) -> frozenset[int] | None:
    layers = config.layers_to_transform
    return None if layers is None or layers == [] else frozenset([layers] if isinstance(layers, int) else layers)


def layer_of(site: str, patterns: Sequence[str] = ()) -> int | None:
    """Return the layer index in a module name by PEFT's rule, or None.

    It is the first integer behind at least two words, or behind the first of `patterns` that matches.
    """
    parts = site.split(".")
    numbers = {
        ".".join(parts[:place]): int(parts[place]) for place in range(1, len(parts) - 1) if parts[place].isdigit()
    }
    if not patterns:
        return next((number for before, number in numbers.items() if "." in before), None)
    fits = (n for pattern in patterns for before, n in numbers.items() if f".{before}".endswith(f".{pattern}"))
    return next(fits, None)


def by_pattern(patterns: Mapping[str, float], site: str, default: float) -> float:
    r"""Return the value of the first pattern that matches a site by PEFT's rule `(.*\.)?(pattern)$`; '.' is any."""
    for pattern, value in patterns.items():
        literal = pattern.removeprefix("^")
        start = len(site) - len(literal)
        # PEFT's optional `.*\.` may be empty, so an anchored pattern can only match a whole name.
        if start < 0 or (start and (pattern != literal or site[start - 1] != ".")):
            continue
        if all(want in (have, ".") for want, have in zip(literal, site[start:], strict=True)):
            return value
    return default


def check_patterns(patterns: Mapping[str, Any], name: str) -> None:
    """Raise `ArtifactError` unless the keys are few, and dotted names: patterns are compared, never run."""
    if len(patterns) > MAX_PATTERNS:
        raise ArtifactError(f"{name} has {len(patterns)} keys; at most {MAX_PATTERNS} are taken", name)
    for pattern in patterns:
        if not set(pattern.removeprefix("^")) <= PATTERN_CHARS:
            raise MethodUnsupportedError(f"{name} has a key that is not a dotted name: {pattern[:80]!r}", name)


def check_ranks(key: str, rank: int, pattern: Mapping[str, int], max_rank: int) -> None:
    """Raise `ArtifactError` unless the rank under `key` and those of rank_pattern are between 1 and `max_rank`."""
    check_patterns(pattern, "rank_pattern")
    for name, value in [(key, rank), *(("rank_pattern", value) for value in pattern.values())]:
        if not 0 < value <= max_rank:
            raise ArtifactError(f"{name} has the rank {value}, which is not between 1 and {max_rank}", name)


def check_alphas(key: str, alpha: float, pattern: Mapping[str, float], max_alpha: float) -> None:
    """Raise `ArtifactError` if the alpha under `key` or one of alpha_pattern is 0 or beyond `max_alpha`."""
    check_patterns(pattern, "alpha_pattern")
    for name, value in [(key, alpha), *(("alpha_pattern", value) for value in pattern.values())]:
        if not 0 < abs(value) <= max_alpha:
            raise ArtifactError(f"{name} has the alpha {value:g}: it must not be 0, nor beyond {max_alpha:g}", name)
