"""Match an adapter's target modules and patterns to sites, as PEFT does, without running a regular expression."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from adapters_store.base.spec import BaseSpec, LinearSite
from adapters_store.errors import ArtifactError, MethodUnsupportedError

PATTERN_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
ALL_LINEAR = "all-linear"
MAX_PATTERNS = 2048  # as many as 4,096 tensors can have sites

T = TypeVar("T")


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
    selected = _named(targets, sites) - _named(excluded, sites)
    layers = _layers(config)
    if layers is None or isinstance(targets, str):  # PEFT uses them with a list only
        return selected
    whole, order = frozenset(targets), {pattern: place for place, pattern in reversed(list(enumerate(patterns)))}
    return {site for site in selected if site in whole or layer_of(site, order) in layers}


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
    return any(end in names for end in _ends(site))


def _ends(name: str) -> Iterator[str]:
    """Yield a module's name, and the parts of it that stand behind one of its dots."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def ends_with_any(site: str, names: frozenset[str]) -> bool:
    """Tell if a site ends with one of the names, at a dot or not: what PEFT does for each name."""
    return any(site[start:] in names for start in range(len(site) + 1))


def is_head(site: str, linear: LinearSite, spec: BaseSpec) -> bool:
    """Tell if a linear is the output head, which all-linear leaves out: as wide as the vocabulary, and in no layer."""
    return linear.out_features == spec.vocab_size and not any(part.isdigit() for part in site.split("."))


def as_list(value: list[str] | str | None) -> list[str]:
    """Turn a name into a list of it, and None into an empty list."""
    return [value] if isinstance(value, str) else value or []


def _layers(config: Targets) -> frozenset[int] | None:
    layers = config.layers_to_transform
    return None if layers is None or layers == [] else frozenset([layers] if isinstance(layers, int) else layers)


def layer_of(site: str, patterns: Mapping[str, int] | None = None) -> int | None:
    """Return the layer index in a module name by PEFT's rule, or None.

    It is the first integer behind at least two words, or behind the first that matches of `patterns`, each with its
    place among them.
    """
    parts = site.split(".")
    numbers = {
        ".".join(parts[:place]): int(parts[place]) for place in range(1, len(parts) - 1) if parts[place].isdigit()
    }
    if not patterns:
        return next((number for before, number in numbers.items() if "." in before), None)
    fits = [(patterns[end], n) for before, n in numbers.items() for end in _ends(before) if end in patterns]
    return min(fits, key=lambda fit: fit[0])[1] if fits else None


class PatternTable(Generic[T]):
    r"""Values by site: that of the first pattern that matches by PEFT's rule `(.*\.)?(pattern)$`; '.' is any.

    All patterns are compared at once from a site's last character on, by Shift-And (Baeza-Yates and Gonnet, 1992): bit
    k of a mask stands for the k-th pattern. So a lookup takes a site's length, however many patterns there are. The
    masks of a distance are made when a site is compared there: what a pattern has beyond every site takes no memory.
    """

    def __init__(self, patterns: Mapping[str, T], default: T) -> None:
        self._values, self._default = list(patterns.values()), default
        self._has: list[defaultdict[str, int]] = []  # by distance from the end, and character
        self._literals: list[tuple[int, str]] = []  # each with its place, the longest first
        self._of_length: defaultdict[int, int] = defaultdict(int)
        self._of_a_whole_name = 0  # PEFT's optional `.*\.` may be empty, so an anchored pattern matches nothing less
        for place, pattern in enumerate(patterns):
            literal, bit = pattern.removeprefix("^"), 1 << place
            self._of_length[len(literal)] |= bit
            self._of_a_whole_name |= bit if literal != pattern else 0
            self._literals.append((place, literal))
        self._literals.sort(key=lambda one: -len(one[1]))

    def __getitem__(self, site: str) -> T:
        """Return the value of a site."""
        alive, matched = -1, 0
        for distance, character in enumerate(reversed(site)):
            has = self._masks(distance)
            alive &= has[character] | has["."]
            if not alive:
                break
            start = len(site) - distance - 1
            if start == 0 or site[start - 1] == ".":
                ended = alive & self._of_length.get(distance + 1, 0)
                matched |= ended & ~self._of_a_whole_name if start else ended
        return self._values[(matched & -matched).bit_length() - 1] if matched else self._default

    def _masks(self, distance: int) -> defaultdict[str, int]:
        """Return the patterns that have each character at a distance no more than one beyond those asked for before."""
        if distance == len(self._has):
            masks: defaultdict[str, int] = defaultdict(int)
            for place, literal in self._literals:
                if len(literal) <= distance:
                    break
                masks[literal[-1 - distance]] |= 1 << place
            self._has.append(masks)
        return self._has[distance]


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
