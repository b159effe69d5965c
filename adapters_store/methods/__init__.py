"""The table of served methods; each file has a method's config, the tensors it needs, and its compilation.

To add a method, add a line to `METHODS`, keyed by PEFT's `peft_type`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.format.folder import Artifact
from adapters_store.methods import (
    adalora,
    adapterhub,
    beft,
    bottleneck,
    cpt,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora,
    miss,
    oft,
    prefix_tuning,
    prompt_tuning,
    selective,
    trainable_tokens,
    vera,
)
from adapters_store.methods.shared.unsupported import refusal
from adapters_store.primitives import Primitive


@dataclass(frozen=True)
class Method:
    """A served method. `compile` checks each tensor against the base and compiles them, or raises `ArtifactError`.

    `is_kv`: it compiles to keys and values (`PrefixKV`).
    """

    name: str
    compile: Callable[[Artifact, BaseSpec], Iterable[Primitive]]
    is_kv: bool = False


METHODS: Mapping[str, Method] = {
    "LORA": Method("lora", lora.compile_lora),
    "ADALORA": Method("adalora", adalora.compile_adalora),
    "BOTTLENECK": Method("bottleneck", bottleneck.compile_bottleneck),
    "CARTRIDGE": Method("cartridge", prefix_tuning.compile_cartridge, is_kv=True),
    "CPT": Method("cpt", cpt.compile_cpt),
    "MULTITASK_PROMPT_TUNING": Method("multitask_prompt_tuning", prompt_tuning.compile_multitask),
    "PREFIX_TUNING": Method("prefix_tuning", prefix_tuning.compile_prefix_tuning, is_kv=True),
    "PROMPT_TUNING": Method("prompt_tuning", prompt_tuning.compile_prompt_tuning),
    "P_TUNING": Method("p_tuning", prompt_tuning.compile_p_tuning),
    "IA3": Method("ia3", ia3.compile_ia3),
    "LOHA": Method("loha", loha.compile_loha),
    "LOKR": Method("lokr", lokr.compile_lokr),
    "VERA": Method("vera", vera.compile_vera),
    "SELECTIVE": Method("selective", selective.compile_selective),
    "TRAINABLE_TOKENS": Method("trainable_tokens", trainable_tokens.compile_trainable_tokens),
    "BEFT": Method("beft", beft.compile_beft),
    "MISS": Method("miss", miss.compile_miss),
    "OFT": Method("oft", oft.compile_oft),
    "LN_TUNING": Method("ln_tuning", ln_tuning.compile_ln_tuning),
}
ADAPTERHUB = Method("bottleneck", adapterhub.compile_adapterhub)  # its configs have no peft_type


def method_of(artifact: Artifact) -> Method:
    """Look up the method that an artifact's config names.

    Raises `ArtifactError` for a config without peft_type, `MethodUnsupportedError` for one that is not served.
    """
    peft_type = artifact.config.get("peft_type")
    if adapterhub.is_adapterhub(artifact.config):
        return ADAPTERHUB
    if not isinstance(peft_type, str):
        raise ArtifactError("adapter_config.json has no peft_type", "peft_type")
    if peft_type not in METHODS:
        raise MethodUnsupportedError(refusal(peft_type, METHODS), "peft_type")
    return METHODS[peft_type]


def is_kv(name: str) -> bool:
    """Tell if the method of this name brings keys and values for its virtual tokens."""
    return any(method.name == name and method.is_kv for method in METHODS.values())
