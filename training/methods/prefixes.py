"""Keys and values of virtual tokens: prefix tuning (arXiv:2101.00190) and cartridges (arXiv:2506.06266).

They begin as the keys and values that the base computes for a text, which the untrained prefix then stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from training.base import Base
from training.data.dataset import TokenizedRow
from training.errors import OptionError
from training.methods.soft_prompts import EMBEDDINGS, RANDOM, PromptAdapter, check_num_tokens, default_text, text_ids
from training.methods.trainable import ADAPTER_NAME, attach_peft
from training.options import CartridgeOptions, PrefixOptions


class PrefixAdapter(PromptAdapter):
    """A prefix of keys and values: a cache, which transformers drops if activations are computed again."""

    can_checkpoint = False


class CartridgeAdapter(PrefixAdapter):
    """A cartridge, whose frozen and trained tokens PEFT keeps apart."""

    @torch.no_grad()
    def finalize(self, dtype: torch.dtype) -> None:
        """Round the frozen and the trained tokens."""
        self.model.prompt_encoder[ADAPTER_NAME].load_prompt_embeddings(self.tensors()[EMBEDDINGS].to(dtype).float())


def prefix_tuning(options: PrefixOptions, base: Base, rows: Sequence[TokenizedRow]) -> PrefixAdapter:
    """Attach a prefix through PEFT. Raises `OptionError`."""
    from peft import PrefixTuningConfig

    if options.prefix_projection and options.init_text not in ("", RANDOM):
        raise OptionError("--init-text cannot be had with --prefix-projection: a projection begins at random.")
    config = PrefixTuningConfig(
        num_virtual_tokens=options.num_virtual_tokens,
        prefix_projection=options.prefix_projection,
        encoder_hidden_size=options.encoder_hidden_size,
        task_type="CAUSAL_LM",
    )
    text = RANDOM if options.prefix_projection else options.init_text
    return _prefix_adapter(config, text, base, rows, PrefixAdapter)


def cartridge(options: CartridgeOptions, base: Base, rows: Sequence[TokenizedRow]) -> PrefixAdapter:
    """Attach a cartridge through PEFT. Raises `OptionError`."""
    from peft import CartridgeConfig

    if not 0 <= options.num_frozen_tokens < options.num_virtual_tokens:
        raise OptionError("--num-frozen-tokens must leave a virtual token to be trained.")
    config = CartridgeConfig(
        num_virtual_tokens=options.num_virtual_tokens,
        num_frozen_tokens=options.num_frozen_tokens,
        task_type="CAUSAL_LM",
    )
    return _prefix_adapter(config, options.init_text, base, rows, CartridgeAdapter)


def _prefix_adapter(
    config: Any, text: str, base: Base, rows: Sequence[TokenizedRow], kind: type[PrefixAdapter]
) -> PrefixAdapter:
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    num_tokens = config.num_virtual_tokens
    check_num_tokens(num_tokens, base)
    if text == RANDOM:
        return kind(attach_peft(base, config))
    ids = torch.tensor([text_ids(text or default_text(base, rows), num_tokens, base)], device=base.model.device)
    with torch.no_grad():
        cache = base.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    model = attach_peft(base, config)
    initialize_kv_prefix_from_past_key_values(model, adapter_name=ADAPTER_NAME, past_key_values=cache)
    return kind(model)
