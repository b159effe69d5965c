"""What the methods share: configs read key by key, tensors sorted by site, and the sites that a PEFT config names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from torch import Tensor

from adapters_store.artifact import CONFIG, Artifact
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.spec import BaseSpec, LinearSite
from adapters_store.tensors import is_finite

PREFIX = "base_model.model."  # of every tensor that PEFT saves of a wrapped model
PATTERN_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
ALL_LINEAR = "all-linear"
MAX_PATTERNS = 2048  # no more patterns than the sites that 4,096 tensors can have
# In every PEFT config, and without effect on what a trained adapter answers.
SILENT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}
)
# In every PEFT config, and served with these values alone.
SERVED_VALUES: Mapping[str, tuple[Any, ...]] = {"task_type": (None, "CAUSAL_LM")}

T = TypeVar("T")


class Targets(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The keys by which PEFT's tuners name the modules that they act on."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


def read_config(
    config: Mapping[str, Any],
    schema: type[T],
    method: str,
    silent: Collection[str] = (),
    served_values: Mapping[str, tuple[Any, ...]] | None = None,
) -> T:
    """The keys of `schema`, a struct, out of a config that is checked key by key.

    `silent` keys cannot change what a trained adapter answers; of `served_values` only these values are served. None is
    as if the key were absent. Raises `MethodUnsupportedError` naming a key or a value that is not served.
    """
    kept, values = {}, {**SERVED_VALUES, **(served_values or {})}
    fields = {field.encode_name for field in msgspec.structs.fields(schema)}  # type: ignore[arg-type]
    for key, value in config.items():
        if key in values:
            if value not in values[key] or (isinstance(value, int) and not isinstance(value, bool)):
                raise MethodUnsupportedError(f"{method} with {key}={str(value)[:80]} is not served", key)
        elif key in fields:
            kept[key] = value
        elif key not in SILENT and key not in silent:
            raise MethodUnsupportedError(f"adapter_config.json has a key that is not known: {key[:80]}", key[:80])
    try:
        return msgspec.convert({key: value for key, value in kept.items() if value is not None}, schema)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"adapter_config.json: {error}", CONFIG) from None


def by_site(artifact: Artifact, ends: Sequence[str], sites: Collection[str], base: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by site and end of name, the sites in their order in `sites`.

    Every tensor must be named `PREFIX + site + end` with one of `ends` and a site of `sites`.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in artifact.tensors.items():
        end = next((end for end in ends if name.startswith(PREFIX) and name.endswith(end)), None)
        site = name.removeprefix(PREFIX).removesuffix(end or "")
        if end is None or site not in sites:
            raise ArtifactError(f"the tensor {name} has no site in {base}: no layer that it could act on", name)
        found.setdefault(site, {})[end] = tensor
    return {site: found[site] for site in sites if site in found}


def expect_shape(artifact: Artifact, name: str, expected: list[int]) -> Tensor:
    """The tensor of a name. Raises `ArtifactError` where it is missing or has another shape."""
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
    """The tensor. Raises `ArtifactError` where what was computed of `name` is not finite any more."""
    if not is_finite(tensor):
        raise ArtifactError(f"{name} overflows where it is compiled for this base", name)
    return tensor


def check_targets(
    config: Targets,
    found: Collection[str],
    sites: Collection[str],
    spec: BaseSpec,
    tensor: Callable[[str], str],
) -> None:
    """Raise unless the sites that have tensors are exactly those of `sites` that target_modules names, and any.

    `tensor` gives the name of a site's tensor, for the sentence. An expression is data that is never run; then the
    tensors alone say where they act.
    """
    wanted = named_sites(config, sites, spec)
    if wanted is not None and (missing := sorted(wanted - set(found))):
        name = tensor(missing[0])
        raise ArtifactError(f"the tensor {name} is missing: target_modules names its site", name)
    if wanted is not None and (extra := sorted(set(found) - wanted)):
        name = tensor(extra[0])
        raise ArtifactError(f"the tensor {name} is extra: the config's target_modules do not name its site", name)
    if not found:
        raise ArtifactError("the artifact has no tensors")


def named_sites(config: Targets, sites: Collection[str], spec: BaseSpec) -> set[str] | None:
    """The sites that a config names; None where that takes a regular expression to be run, or it names none at all."""
    targets, excluded, patterns = config.target_modules, config.exclude_modules or [], as_list(config.layers_pattern)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = [site for site, linear in spec.linears.items() if not is_head(site, linear, spec)]
    texts = [*patterns, *(names for names in (targets, excluded) if isinstance(names, str))]
    if targets is None or not all(set(text) <= PATTERN_CHARS for text in texts):
        return None
    named, out = _named(targets, sites), _named(excluded, sites)
    layers = _layers(config) if isinstance(targets, list) else None  # PEFT asks for them beside a list alone
    return {site for site in named - out if layers is None or site in targets or layer_of(site, patterns) in layers}


def _named(names: list[str] | str, sites: Iterable[str]) -> set[str]:
    """The sites that a list names, or that a text of `PATTERN_CHARS`, to PEFT an expression, matches whole."""
    if isinstance(names, str):
        return {site for site in sites if is_match(names, site)}
    listed = frozenset(names)
    return {site for site in sites if is_named(site, listed)}


def is_match(pattern: str, site: str) -> bool:
    """Whether an expression of `PATTERN_CHARS` matches the whole site: '.' is any character."""
    return len(pattern) == len(site) and all(want in (have, ".") for want, have in zip(pattern, site, strict=True))


def is_named(site: str, names: Collection[str]) -> bool:
    """Whether a name is the site, or all of the site behind one of its dots."""
    parts = site.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def is_head(site: str, linear: LinearSite, spec: BaseSpec) -> bool:
    """The output head, which PEFT leaves out of all-linear: as wide as the vocabulary, and in no layer."""
    return linear.out_features == spec.vocab_size and not any(part.isdigit() for part in site.split("."))


def as_list(value: list[str] | str | None) -> list[str]:
    """One name as a list of one; None as none."""
    return [value] if isinstance(value, str) else value or []


def _layers(config: Targets) -> frozenset[int] | None:
    layers = config.layers_to_transform
    return None if layers is None or layers == [] else frozenset([layers] if isinstance(layers, int) else layers)


def layer_of(site: str, patterns: Sequence[str] = ()) -> int | None:
    """A site's layer as PEFT has it: the first number behind two names, or behind the first of `patterns` that fits."""
    parts = site.split(".")
    numbers = {
        ".".join(parts[:place]): int(parts[place]) for place in range(1, len(parts) - 1) if parts[place].isdigit()
    }
    if not patterns:
        return next((number for before, number in numbers.items() if "." in before), None)
    fits = (n for pattern in patterns for before, n in numbers.items() if f".{before}".endswith(f".{pattern}"))
    return next(fits, None)


def by_pattern(patterns: Mapping[str, float], site: str, default: float) -> float:
    r"""The value of the first pattern that a site matches as PEFT has it: `(.*\.)?(pattern)$`, '.' any character."""
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
    """Raise unless the keys are few, and dotted names: a pattern is matched, never run."""
    if len(patterns) > MAX_PATTERNS:
        raise ArtifactError(f"{name} has {len(patterns)} keys; at most {MAX_PATTERNS} are taken", name)
    for pattern in patterns:
        if not set(pattern.removeprefix("^")) <= PATTERN_CHARS:
            raise MethodUnsupportedError(f"{name} has a key that is not a dotted name: {pattern[:80]!r}", name)


def check_ranks(key: str, rank: int, pattern: Mapping[str, int], most: int) -> None:
    """Raise unless the rank under `key` and those of rank_pattern are between 1 and `most`."""
    check_patterns(pattern, "rank_pattern")
    for name, value in [(key, rank), *(("rank_pattern", value) for value in pattern.values())]:
        if not 0 < value <= most:
            raise ArtifactError(f"{name} has the rank {value}, which is not between 1 and {most}", name)


def check_alphas(key: str, alpha: float, pattern: Mapping[str, float], most: float) -> None:
    """Raise unless the alpha under `key` and those of alpha_pattern are neither 0 nor beyond `most`."""
    check_patterns(pattern, "alpha_pattern")
    for name, value in [(key, alpha), *(("alpha_pattern", value) for value in pattern.values())]:
        if not 0 < abs(value) <= most:
            raise ArtifactError(f"{name} has the alpha {value:g}: it must not be 0, nor beyond {most:g}", name)
