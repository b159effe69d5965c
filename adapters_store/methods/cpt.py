"""Compile context-aware prompt tuning as PEFT writes it (arXiv:2410.17222): a context's embeddings, slightly changed.

PEFT saves the sum of the context's own embeddings and the projected change: a soft prompt.
"""

from __future__ import annotations

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.methods.prompt_tuning import compile_embeds
from adapters_store.primitives import PrefixEmbeds

TOKENS = "cpt_token_ids"  # PEFT expects as many as virtual tokens
MASKS = ("cpt_mask", "cpt_tokens_type_mask")  # used in the loss and in the projection
IGNORED_KEYS = {
    TOKENS,
    *MASKS,
    "num_attention_heads",
    "opt_loss_decay_factor",
    "opt_projection_epsilon",
    "opt_projection_format_epsilon",
    "opt_weighted_loss_type",
    "tokenizer_name_or_path",
}


def compile_cpt(artifact: Artifact, spec: BaseSpec) -> tuple[PrefixEmbeds, ...]:
    """Compile to the saved embeddings, a `PrefixEmbeds`. Raises `ArtifactError`."""
    (prefix,) = compile_embeds(artifact, spec, "CPT", IGNORED_KEYS)
    for key in (TOKENS, *MASKS):
        listed = artifact.config.get(key)
        if listed is None and key in MASKS:
            continue
        if not isinstance(listed, list) or len(listed) != prefix.num_tokens:
            raise ArtifactError(f"{key} is no list of {prefix.num_tokens} items, one a virtual token", key)
    return (prefix,)
