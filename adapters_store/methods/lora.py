"""LoRA as PEFT writes it (arXiv:2106.09685), with rsLoRA's scale (arXiv:2312.03732) and per-module patterns.

y += s B (A x), s = alpha / r, or alpha / sqrt(r) with use_rslora. Names in a config are data: patterns are matched as
dotted names, never run as regular expressions.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch

from adapters_store.artifact import CONFIG, Artifact
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.patch import BaseSpec, LinearSite, LowRank

PREFIX, A_END, B_END = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
PATTERN_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
# These cannot change what a trained adapter answers.
SILENT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
# These change it, and only these values of them are served.
SERVED_VALUES: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "ensure_weight_tying": (False,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "modules_to_save": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "task_type": (None, "CAUSAL_LM"),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # they leave the base's weights as they are
INITS_OF_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
ALL_LINEAR = "all-linear"
MAX_RANK, MAX_ALPHA, MAX_PATTERNS = 4096, 1e6, 2048  # no more patterns than the sites that 4,096 tensors can have


class LoraConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The keys of PEFT's LoraConfig that say what to compute."""

    r: int
    lora_alpha: int | float
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    init_lora_weights: bool | str | None = True

    def rank(self, site: str) -> int:
        """The rank at a site."""
        return int(_by_pattern(self.rank_pattern, site, self.r))

    def scale(self, site: str) -> float:
        """The scale at a site."""
        alpha, rank = _by_pattern(self.alpha_pattern, site, self.lora_alpha), self.rank(site)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_config(config: dict[str, Any]) -> LoraConfig:
    """The config, checked key by key. Raises `MethodUnsupportedError` naming a key or a value that is not served."""
    kept = {}
    for key, value in config.items():
        if key in SERVED_VALUES:
            if value not in SERVED_VALUES[key] or (isinstance(value, int) and not isinstance(value, bool)):
                raise MethodUnsupportedError(f"LoRA with {key}={str(value)[:80]} is not served", key)
        elif key in LoraConfig.__struct_fields__:
            kept[key] = value
        elif key not in SILENT:
            raise MethodUnsupportedError(f"adapter_config.json has a key that is not known: {key[:80]}", key[:80])
    kept = {key: value for key, value in kept.items() if value is not None}
    try:
        read = msgspec.convert(kept, LoraConfig)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"adapter_config.json: {error}", CONFIG) from None
    _check_values(read)
    return read


def _check_values(config: LoraConfig) -> None:
    _check_init(config.init_lora_weights)
    for name in ("rank_pattern", "alpha_pattern"):
        if len(patterns := getattr(config, name)) > MAX_PATTERNS:
            raise ArtifactError(f"{name} has {len(patterns)} keys; at most {MAX_PATTERNS} are taken", name)
        for pattern in patterns:
            if not set(pattern.removeprefix("^")) <= PATTERN_CHARS:
                raise MethodUnsupportedError(f"{name} has a key that is not a dotted name: {pattern[:80]!r}", name)
    for name, rank in [("r", config.r), *(("rank_pattern", rank) for rank in config.rank_pattern.values())]:
        if not 0 < rank <= MAX_RANK:
            raise ArtifactError(f"{name} has the rank {rank}, which is not between 1 and {MAX_RANK}", name)
    for name, alpha in [
        ("lora_alpha", config.lora_alpha),
        *(("alpha_pattern", a) for a in config.alpha_pattern.values()),
    ]:
        if not 0 < abs(alpha) <= MAX_ALPHA:
            raise ArtifactError(f"{name} has the alpha {alpha:g}: it must not be 0, nor beyond {MAX_ALPHA:g}", name)


def _check_init(init: bool | str | None) -> None:
    if init in INITS:
        return
    if str(init).lower().startswith(INITS_OF_ANOTHER_BASE):
        raise MethodUnsupportedError(
            f"init_lora_weights={str(init)[:40]} is relative to a changed base; "
            "save with path_initial_model_for_weight_conversion to get a plain LoRA",
            "init_lora_weights",
        )
    raise MethodUnsupportedError(f"init_lora_weights={str(init)[:40]} is not known", "init_lora_weights")


def _by_pattern(patterns: dict[str, int] | dict[str, int | float], site: str, default: float) -> float:
    """The value of the first pattern that a site matches as PEFT has it: `(.*\\.)?(pattern)$`, '.' any character."""
    for pattern, value in patterns.items():
        literal = pattern.removeprefix("^")
        start = len(site) - len(literal)
        # PEFT's optional `.*\.` may be empty, so an anchored pattern can only match a whole name.
        if start < 0 or (start and (pattern != literal or site[start - 1] != ".")):
            continue
        if all(want in (have, ".") for want, have in zip(literal, site[start:], strict=True)):
            return value
    return default


def check(artifact: Artifact, spec: BaseSpec) -> None:
    """Raise `ArtifactError` unless every tensor has its site, every site its two tensors, and all shapes fit."""
    config, sites = read_config(artifact.config), _sites(artifact, spec)
    _check_targets(config, sites, spec)
    for site in sites:
        linear, rank = spec.linears[site], config.rank(site)
        _check_shape(artifact, PREFIX + site + A_END, [rank, linear.in_features])
        _check_shape(artifact, PREFIX + site + B_END, [linear.out_features, rank])


def primitives(artifact: Artifact, spec: BaseSpec) -> tuple[LowRank, ...]:
    """One `LowRank` a site, the scale folded into B once, in fp32. Raises `ArtifactError` where that overflows."""
    config, made = read_config(artifact.config), []
    for site in _sites(artifact, spec):
        a, b = artifact.tensors[PREFIX + site + A_END], artifact.tensors[PREFIX + site + B_END]
        scaled = b.float() * config.scale(site)
        if not bool(torch.isfinite(scaled).all()):
            raise ArtifactError(f"{PREFIX}{site}{B_END} overflows at its scale {config.scale(site):g}", site)
        made.append(LowRank(site, a.float(), scaled))
    return tuple(made)


def _sites(artifact: Artifact, spec: BaseSpec) -> list[str]:
    """The sites that the tensors name, in the base's order."""
    sites = set()
    for name in artifact.tensors:
        if "lora_embedding_" in name:
            raise MethodUnsupportedError(f"LoRA on embeddings is not served: {name}", name)
        site = name.removeprefix(PREFIX).removesuffix(A_END).removesuffix(B_END)
        if name not in (PREFIX + site + A_END, PREFIX + site + B_END) or site not in spec.linears:
            raise ArtifactError(f"the tensor {name} has no site in {spec.name}: no linear layer is named {site}", name)
        sites.add(site)
    if not sites:
        raise ArtifactError("the artifact has no tensors")
    for site in sites:
        for name in (PREFIX + site + A_END, PREFIX + site + B_END):
            if name not in artifact.tensors:
                raise ArtifactError(f"the tensor {name} is missing", name)
    return [site for site in spec.linears if site in sites]


def _check_shape(artifact: Artifact, name: str, expected: list[int]) -> None:
    shape = list(artifact.tensors[name].shape)
    if shape != expected:
        raise ArtifactError(f"{name} has shape {shape}, this base and config need {expected}", name)


def _check_targets(config: LoraConfig, sites: list[str], spec: BaseSpec) -> None:
    """Where target_modules is a list of names, the tensors must be exactly those that PEFT would make of it."""
    wanted = _wanted(config, spec)
    if wanted is None:
        return  # a pattern is data that is not run; then the tensors alone say where they act
    if missing := sorted(wanted - set(sites)):
        name = PREFIX + missing[0] + A_END
        raise ArtifactError(f"the tensor {name} is missing: target_modules names its site", name)
    if extra := sorted(set(sites) - wanted):
        name = PREFIX + extra[0] + A_END
        raise ArtifactError(f"the tensor {name} is extra: the config's target_modules do not name its site", name)


def _wanted(config: LoraConfig, spec: BaseSpec) -> set[str] | None:
    """The sites that the config names; None where it does so by a regular expression, or not at all."""
    targets, excluded, linears = config.target_modules, config.exclude_modules or [], spec.linears
    patterns = _as_list(config.layers_pattern)
    if isinstance(excluded, str) or not all(set(pattern) <= PATTERN_CHARS for pattern in patterns):
        return None
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = [site for site, linear in linears.items() if not _is_head(site, linear, spec)]
    if not isinstance(targets, list):
        return None
    named, out, layers = frozenset(targets), frozenset(excluded), _layers(config)
    return {
        site
        for site in linears
        if _is_named(site, named)
        and not _is_named(site, out)
        and (layers is None or site in named or _layer(site, patterns) in layers)
    }


def _is_named(site: str, names: frozenset[str]) -> bool:
    """Whether a name is the site, or all of the site behind one of its dots."""
    parts = site.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _is_head(site: str, linear: LinearSite, spec: BaseSpec) -> bool:
    """The output head, which PEFT leaves out of all-linear: as wide as the vocabulary, and in no layer."""
    return linear.out_features == spec.vocab_size and not any(part.isdigit() for part in site.split("."))


def _as_list(value: list[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _layers(config: LoraConfig) -> frozenset[int] | None:
    layers = config.layers_to_transform
    return None if layers is None or layers == [] else frozenset([layers] if isinstance(layers, int) else layers)


def _layer(site: str, patterns: list[str]) -> int | None:
    """A site's layer as PEFT has it: the first number behind two names, or behind the first of `patterns` that fits."""
    parts = site.split(".")
    numbers = {
        ".".join(parts[:place]): int(parts[place]) for place in range(1, len(parts) - 1) if parts[place].isdigit()
    }
    if not patterns:
        return next((number for before, number in numbers.items() if "." in before), None)
    fits = (n for pattern in patterns for before, n in numbers.items() if f".{before}".endswith(f".{pattern}"))
    return next(fits, None)
