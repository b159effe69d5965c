"""Compile prefix tuning (arXiv:2101.00190) and cartridges (arXiv:2506.06266) as PEFT writes them: keys and values.

The tensor has a row per virtual token: layer x (key, value) x kv head x width. PEFT folds the projection when saving,
and puts the keys into the cache unchanged, as if rotated already; the prompt's positions start after them.
"""

from __future__ import annotations

from collections.abc import Collection

from adapters_store.base.spec import BaseSpec, KVShape
from adapters_store.errors import MethodUnsupportedError
from adapters_store.format.folder import Artifact
from adapters_store.methods.prompt_tuning import EMBEDDINGS, VirtualTokens, expect_of_base, read_virtual_tokens
from adapters_store.methods.shared.expect import expect_exactly
from adapters_store.primitives import PrefixKV

# These keys say how the rows were trained; the rows are saved as computed.
PREFIX_IGNORED_KEYS = {"encoder_hidden_size", "init_weights", "prefix_projection"}
CARTRIDGE_IGNORED_KEYS = {"num_frozen_tokens"}


class KVConfig(VirtualTokens, kw_only=True):
    """The keys that lay out a row: `num_attention_heads` counts kv heads, `token_dim` is the width of all of them."""

    num_attention_heads: int | None = None


def compile_prefix_tuning(artifact: Artifact, spec: BaseSpec) -> tuple[PrefixKV, ...]:
    """Compile to the saved keys and values, a `PrefixKV`. Raises `ArtifactError`."""
    return _compile_kv(artifact, spec, "prefix tuning", PREFIX_IGNORED_KEYS)


def compile_cartridge(artifact: Artifact, spec: BaseSpec) -> tuple[PrefixKV, ...]:
    """Compile to the saved keys and values, a `PrefixKV`; frozen tokens are like others. Raises `ArtifactError`."""
    return _compile_kv(artifact, spec, "a cartridge", CARTRIDGE_IGNORED_KEYS)


def _compile_kv(artifact: Artifact, spec: BaseSpec, method: str, ignored: Collection[str]) -> tuple[PrefixKV, ...]:
    config, kv = read_virtual_tokens(artifact, spec, KVConfig, method, ignored), _one_shape(spec, method)
    num_tokens, width = config.num_virtual_tokens, kv.num_kv_heads * kv.key_dim
    expect_of_base("num_attention_heads", config.num_attention_heads, kv.num_kv_heads, spec)
    expect_of_base("token_dim", config.token_dim, width, spec)
    expect_exactly(artifact, {EMBEDDINGS: [num_tokens, spec.num_layers * 2 * width]})
    rows = artifact.tensors[EMBEDDINGS].float().view(num_tokens, spec.num_layers, 2, kv.num_kv_heads, kv.key_dim)
    keys, values = ([rows[:, layer, which].contiguous() for layer in range(spec.num_layers)] for which in (0, 1))
    return (PrefixKV(tuple(keys), tuple(values)),)


def _one_shape(spec: BaseSpec, method: str) -> KVShape:
    """Return the KV shape that all layers share. Raises `MethodUnsupportedError` if PEFT's rows cannot lay it out."""
    shapes = set(spec.kv)
    shape = shapes.pop() if shapes else None
    if shape is None or shapes or shape.key_dim != shape.value_dim:
        raise MethodUnsupportedError(f"{method} needs keys and values of one shape in all layers of {spec.name}")
    return shape
