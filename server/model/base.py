"""Load a base, instrument transformers' own modules, and prove that the instrumented base computes the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters_store.bases import base_identity
from adapters_store.describe import describe, linears
from adapters_store.spec import BaseSpec, KVShape
from server import memory
from server.model import attention
from server.model.attention import KVCache, PagedBatch, Probe, UnsupportedBaseError, page
from server.model.bank import SlotBank
from server.model.batch import Row
from server.model.fused import Direct, Fuser, Seen
from server.model.kernels.threads import wake
from server.model.linear import HatLinear, choose_product, has_halves, rounded
from server.model.packed import Kept
from server.model.sites import SiteHooks

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROOF_TOKENS = 24
ROUNDED_ROWS = 128
Forward = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # as `forward`, of one model
# Of the largest logit's magnitude, by what keys and values are kept in and what is computed in.
PROOF_TOLERANCE = {
    Kept(torch.float32, torch.float32): 1e-3,
    Kept(torch.float16, torch.float32): 5e-3,
    Kept(torch.float16, torch.float16): 5e-2,
    Kept(torch.bfloat16, torch.bfloat16): 1e-1,
}


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
    forward: Forward


def compute_dtype(precision: str, device: str) -> torch.dtype:
    """What activations and KV are kept in: on CPU always fp32, whatever the weights are packed to."""
    return torch.float32 if torch.device(device).type == "cpu" else DTYPES[precision]


def kept(precision: str, device: str) -> Kept:
    """What slots and the KV cache keep: on CPU matrices, keys and values in 16 bits, but where the base is exact."""
    is_halved = torch.device(device).type == "cpu" and precision != "fp32" and has_halves()
    dtype = compute_dtype(precision, device)
    return Kept(torch.float16 if is_halved else dtype, dtype)


def load_base(folder: Path, name: str, precision: str, device: str) -> Base:
    """Load and instrument a Hugging Face folder.

    Raises `UnsupportedBaseError` with the reason where the base cannot be served rightly.
    """
    model = _load_model(folder, compute_dtype(precision, device), device)
    spec = describe(model, name, base_identity(folder).identity, folder)
    if torch.device(device).type == "cpu":
        wake()  # rounding keeps the cores busy, and not Python
        _round(model, precision)
    try:
        with torch.inference_mode():
            base = _instrument(model, spec, precision, device)
            _settle(model)
            return base
    except (TypeError, AttributeError, KeyError, ValueError, RuntimeError) as error:
        raise UnsupportedBaseError(
            f"{spec.architecture} cannot be instrumented: {type(error).__name__}: {error}"
        ) from error


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


def _round(model: nn.Module, precision: str) -> None:
    """Give every linear layer the weight that its product keeps, so that the proof is of the arithmetic alone.

    It goes by some rows at a time, which stay in the CPU's cache. A tied embedding stays as it was.
    """
    for linear in linears(model).values():
        weight, is_turned = linear.weight.detach(), isinstance(linear, Conv1D)
        kept_of = torch.empty_like(weight)
        parts = (each.split(ROUNDED_ROWS, dim=int(is_turned)) for each in (weight, kept_of))
        for part, target in zip(*parts, strict=True):
            target.copy_(rounded(part.T, precision).T if is_turned else rounded(part, precision))
        linear.weight = nn.Parameter(kept_of, requires_grad=False)


def _instrument(model: Any, spec: BaseSpec, precision: str, device: str) -> Base:
    """Learn how the stock model attends, replace its parts and its linear layers, and compare."""
    proof = Proof(model)
    attention.install()
    model.set_attn_implementation(attention.NAME)
    probe, seen = Probe(), Seen()
    hooks = SiteHooks(model, spec)
    parts = [site for layer in spec.layers for site in (layer.layer, layer.attention, layer.mlp) if site]
    with seen.watching(model, [*spec.norms, *parts]), hooks.learning(2 * PROOF_TOKENS):
        proof.run(partial(forward, model), probe)
    spec = replace(spec, kv=_learned_kv(spec, probe))
    bank = SlotBank(spec, device, kept(precision, device))
    hooks.serve(bank)
    pack, head = choose_product(precision, device), model.get_output_embeddings()
    cache = KVCache(spec.kv, 2, PROOF_TOKENS, bank.kept, device)
    paged = proof.paged(cache)
    whole = Fuser(model, bank, pack, probe.manners, seen, paged).fuse()
    for site, linear in linears(model).items():
        parent, _, child = site.rpartition(".")
        setattr(model.get_submodule(parent), child, HatLinear([linear], pack, bank, [site], linear is head))
    compute: Forward = partial(forward, model)
    logits = proof.run(compute, paged)
    proof.compare(logits, spec.architecture, bank.kept)
    if whole is not None:
        direct = Direct(model, whole)
        compute = direct if torch.equal(proof.run(direct, paged), logits) else compute
    return Base(model, spec, bank, hooks, precision, device, _eos_token_ids(model), compute)


def _settle(model: nn.Module) -> None:
    """Leave nothing mapped of the base's files, which others can change, and give back what packing freed."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    gc.collect()
    memory.trim()


def _learned_kv(spec: BaseSpec, probe: Probe) -> list[KVShape]:
    kv = [probe.shapes[layer] for layer in sorted(probe.shapes)]
    if sorted(probe.shapes) != list(range(spec.num_layers)) or len({shape.num_kv_heads for shape in kv}) != 1:
        raise UnsupportedBaseError(
            f"{spec.architecture} has {spec.num_layers} layers, of which attention of equal kv heads "
            f"was seen in {len(probe.shapes)}"
        )
    return kv


def forward(model: Any, token_ids: Tensor, position_ids: Tensor, wanted: Tensor, paged: Any) -> Tensor:
    """token_ids [T], position_ids [T], wanted [R] indices of T -> logits [R, vocabulary] in fp32."""
    out = model(
        input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False, logits_to_keep=wanted, paged=paged
    )
    return out.logits[0].float()  # type: ignore[no-any-return]


def _eos_token_ids(model: Any) -> list[int]:
    """The end tokens that `generate` would use: the generation config's, else the config's."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


class Proof:
    """What the stock model answers to two short sequences, taken before it is instrumented."""

    def __init__(self, model: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        vocab_size = model.config.get_text_config().vocab_size
        self.tokens = torch.randint(0, vocab_size, (2, PROOF_TOKENS), generator=generator).to(model.device)
        self.logits = torch.cat([model(input_ids=row[None], use_cache=False).logits[0].float() for row in self.tokens])

    def run(self, compute: Forward, paged: Any) -> Tensor:
        """Both sequences in one batch: the logits of every token."""
        device = self.tokens.device
        positions = torch.arange(PROOF_TOKENS, device=device).repeat(2)
        return compute(self.tokens.flatten(), positions, torch.arange(2 * PROOF_TOKENS, device=device), paged)

    def paged(self, cache: KVCache) -> PagedBatch:
        """Them as a batch, each in a block of its own."""
        rows = [Row(row.tolist(), 0, [index]) for index, row in enumerate(self.tokens)]
        return page(rows, cache, torch.get_num_threads())

    def compare(self, logits: Tensor, architecture: str, kept: Kept) -> None:
        """Raises `UnsupportedBaseError` where the logits are not those of the stock model."""
        gap = ((logits - self.logits).abs().max() / self.logits.abs().max()).item()
        if not gap <= PROOF_TOLERANCE[kept]:
            raise UnsupportedBaseError(
                f"{architecture} computes other logits in this server than in transformers "
                f"(largest relative gap {gap:.2g}): it does something that is not passed to the attention interface"
            )
