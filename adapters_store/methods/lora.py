"""LoRA as PEFT writes it (arXiv:2106.09685), with rsLoRA's scale (arXiv:2312.03732) and per-module patterns.

y += s B (A x), s = alpha / r, or alpha / sqrt(r) with use_rslora. Names in a config are data: patterns are matched as
dotted names, never run as regular expressions.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from adapters_store.artifact import CONFIG, Artifact
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.patch import BaseSpec, LowRank

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
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    if not 0 < config.r <= 4096 or not all(0 < rank <= 4096 for rank in config.rank_pattern.values()):
        raise ArtifactError("a rank is not between 1 and 4096", "r")
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(CHANGES_THE_BASE):
        raise MethodUnsupportedError(
            f"init_lora_weights={init[:40]} is relative to a changed base; "
            "save with path_initial_model_for_weight_conversion to get a plain LoRA",
            "init_lora_weights",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name):
            if not set(pattern.removeprefix("^")) <= PATTERN_CHARS:
                raise MethodUnsupportedError(f"{name} has a key that is not a dotted name: {pattern[:80]!r}", name)


def _by_pattern(patterns: dict[str, int] | dict[str, int | float], site: str, default: float) -> float:
    """The value of the first pattern that a site matches as PEFT has it: `(.*\\.)?(pattern)$`, '.' any character."""
    for pattern, value in patterns.items():
        literal = pattern.removeprefix("^")
        # PEFT's optional `.*\.` may be empty, so an anchored pattern can only match a whole name.
        if len(site) < len(literal) or (pattern != literal and len(site) != len(literal)):
            continue
        end, before = site[len(site) - len(literal) :], site[: len(site) - len(literal)]
        is_alike = all(want in (have, ".") for want, have in zip(literal, end, strict=True))
        if is_alike and (not before or before.endswith(".")):
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
    """One `LowRank` a site, the scale folded into B once, in fp32."""
    config = read_config(artifact.config)
    return tuple(
        LowRank(
            site,
            artifact.tensors[PREFIX + site + A_END].float(),
            artifact.tensors[PREFIX + site + B_END].float() * config.scale(site),
        )
        for site in _sites(artifact, spec)
    )


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
    targets, excluded = config.target_modules, config.exclude_modules
    if not isinstance(targets, list) or isinstance(excluded, str):
        return  # a pattern is data that is not run; then the tensors alone say where they act
    wanted = {
        site
        for site in spec.linears
        if _is_named(site, targets) and not _is_named(site, excluded or []) and _has_layer(site, targets, config)
    }
    if missing := sorted(wanted - set(sites)):
        raise ArtifactError(
            f"the tensor {PREFIX}{missing[0]}{A_END} is missing: target_modules names its site", missing[0]
        )
    if extra := sorted(set(sites) - wanted):
        raise ArtifactError(f"target_modules does not name {extra[0]}, for which there are tensors", extra[0])


def _is_named(site: str, names: list[str]) -> bool:
    return any(site == name or site.endswith("." + name) for name in names)


def _has_layer(site: str, targets: list[str], config: LoraConfig) -> bool:
    """PEFT's layers_to_transform: the first number after the first dot (or after one of layers_pattern)."""
    layers = config.layers_to_transform
    if layers is None or layers == [] or site in targets:
        return True
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    parts = site.split(".")
    for before, part, after in zip(parts, parts[1:], [*parts[2:], ""], strict=False):
        if part.isdigit() and after and (before in patterns if patterns else True):
            return int(part) in ([layers] if isinstance(layers, int) else layers)
    return False
