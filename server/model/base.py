"""Load a base, instrument transformers' own modules, and prove that the instrumented base computes the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store.bases import base_identity
from adapters_store.describe import describe, linears
from adapters_store.spec import BaseSpec
from server.model import attention
from server.model.attention import KVCache, ShapeProbe, UnsupportedBaseError, page
from server.model.bank import SlotBank
from server.model.batch import Row
from server.model.linear import HatLinear, choose_product
from server.model.sites import SiteHooks

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROOF_TOKENS = 24
PROOF_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}  # of the largest logit's magnitude


@dataclass
class Base:
    """The frozen model, instrumented: its forward takes T tokens of many sequences and a `PagedBatch`."""

    model: nn.Module
    spec: BaseSpec
    bank: SlotBank
    hooks: SiteHooks
    precision: str
    device: str
    eos_token_ids: list[int]

    def forward(self, token_ids: Tensor, position_ids: Tensor, wanted: Tensor, paged: Any) -> Tensor:
        """token_ids [T], position_ids [T], wanted [R] indices of T -> logits [R, vocabulary] in fp32."""
        out = self.model(
            input_ids=token_ids[None],
            position_ids=position_ids[None],
            use_cache=False,
            logits_to_keep=wanted,
            paged=paged,
        )
        logits: Tensor = out.logits[0].float()
        return logits


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """What activations, KV and slots are kept in: on CPU always fp32, whatever the weights are packed to."""
    return torch.float32 if torch.device(device).type == "cpu" else DTYPES[precision]


def load_base(folder: Path, name: str, precision: str, device: str) -> Base:
    """Load and instrument a Hugging Face folder.

    Raises `UnsupportedBaseError` with the reason where the base cannot be served rightly.
    """
    model = _load_model(folder, compute_dtype(precision, device), device)
    spec = describe(model, name, base_identity(folder).identity, folder)
    proof = _Proof(model)
    base = _instrument(model, spec, precision, device)
    proof.compare(base)
    return base


def _load_model(folder: Path, dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would be drawn into the log
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnsupportedBaseError(f"{folder} cannot be loaded as a decoder-only base: {error}") from error
    return model.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]


def _instrument(model: Any, spec: BaseSpec, precision: str, device: str) -> Base:
    attention.install()
    model.set_attn_implementation(attention.NAME)
    bank = SlotBank(spec, device, compute_dtype(precision, device))
    pack, head = choose_product(precision, device), model.get_output_embeddings()
    for site, linear in linears(model).items():
        parent, _, child = site.rpartition(".")
        setattr(model.get_submodule(parent), child, HatLinear(linear, pack, bank, site, linear is head))
    return Base(model, spec, bank, SiteHooks(model, bank), precision, device, _eos_token_ids(model))


def _eos_token_ids(model: Any) -> list[int]:
    """The end tokens that `generate` would use: the generation config's, else the config's."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


class _Proof:
    """What the stock model answers to two short sequences, taken before it is instrumented."""

    def __init__(self, model: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        vocab_size = model.config.get_text_config().vocab_size
        self.tokens = torch.randint(0, vocab_size, (2, PROOF_TOKENS), generator=generator).to(model.device)
        self.logits = torch.cat([model(input_ids=row[None], use_cache=False).logits[0].float() for row in self.tokens])

    def compare(self, base: Base) -> None:
        """Learn the layers' shapes, then run both sequences in one paged batch and compare every logit."""
        positions = torch.arange(PROOF_TOKENS, device=base.device).repeat(2)
        tokens, wanted = self.tokens.flatten(), torch.arange(2 * PROOF_TOKENS, device=base.device)
        probe = ShapeProbe()
        with base.hooks.learning(2 * PROOF_TOKENS):
            self._forward(base, tokens, positions, wanted, probe)
        kv = [probe.shapes[layer] for layer in sorted(probe.shapes)]
        base.spec = base.bank.spec = replace(base.spec, kv=kv)
        if (
            sorted(probe.shapes) != list(range(base.spec.num_layers))
            or len({s.num_kv_heads for s in base.spec.kv}) != 1
        ):
            raise UnsupportedBaseError(
                f"{base.spec.architecture} has {base.spec.num_layers} layers, of which attention of equal kv heads "
                f"was seen in {len(probe.shapes)}"
            )
        like = torch.empty(0, dtype=compute_dtype(base.precision, base.device), device=base.device)
        cache = KVCache(base.spec.kv, 2, PROOF_TOKENS, like)
        rows = [Row(row.tolist(), 0, [index]) for index, row in enumerate(self.tokens)]
        paged = page(rows, cache, base.spec.kv[0].num_kv_heads, torch.get_num_threads())
        logits = self._forward(base, tokens, positions, wanted, paged)
        gap = ((logits - self.logits).abs().max() / self.logits.abs().max()).item()
        if not gap <= PROOF_TOLERANCE[base.precision]:
            raise UnsupportedBaseError(
                f"{base.spec.architecture} computes other logits in this server than in transformers "
                f"(largest relative gap {gap:.2g}): it does something that is not passed to the attention interface"
            )

    def _forward(self, base: Base, tokens: Tensor, positions: Tensor, wanted: Tensor, paged: Any) -> Tensor:
        try:
            return base.forward(tokens, positions, wanted, paged)
        except (TypeError, AttributeError, KeyError, ValueError, RuntimeError) as error:
            raise UnsupportedBaseError(
                f"{base.spec.architecture} cannot be instrumented: {type(error).__name__}: {error}"
            ) from error
