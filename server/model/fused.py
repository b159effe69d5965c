"""Parts of a decoder layer that are computed as one: norms, gated feed-forward blocks, attention with its projections.

Architectures that have such a part have it under the same names. A part is replaced only where it gives, for inputs
that the stock part saw, what the stock part gave; everything else stays as transformers has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from server.model import attention, kernels
from server.model.attention import Manner, PagedBatch
from server.model.bank import SlotBank
from server.model.kernels import decoder, layers
from server.model.linear import HatLinear, Packer, pack_torch

TOLERANCE = 1e-5  # of the largest magnitude, where everything is fp32
COARSE_TOLERANCE = 2e-2
Maker = Callable[[str, Packer], nn.Module]  # the part for a site, its products packed so


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), where some bases keep the weight less one (arXiv:1910.07467)."""

    def __init__(self, norm: Any, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach() + offset, requires_grad=False)
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(self, x: Tensor) -> Tensor:
        if not kernels.serve(x.device.type, x.dtype):
            return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.empty_like(rows)
        layers.rms_norm(rows.numpy(), self.weight.numpy(), np.float32(self.eps), out.numpy())
        return out.view(x.shape)


class GatedMLP(nn.Module):
    """y = W_down (act(W_gate x) * W_up x): gate and up are one product (arXiv:2002.05202)."""

    def __init__(self, mlp: Any, site: str, bank: SlotBank, pack: Packer) -> None:
        super().__init__()
        self.gate_up = HatLinear(
            [mlp.gate_proj, mlp.up_proj], pack, bank, [f"{site}.gate_proj", f"{site}.up_proj"], False
        )
        self.down = HatLinear([mlp.down_proj], pack, bank, [f"{site}.down_proj"], False)
        self.act_fn = mlp.act_fn
        self.gate = next((code for name, code in layers.GATES.items() if _is_act(mlp.act_fn, name)), None)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if self.gate is None or not kernels.serve(x.device.type, x.dtype):
            gate, up = gate_up.chunk(2, -1)
            return self.down(self.act_fn(gate) * up)  # type: ignore[no-any-return]
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        layers.gate(gate_up.view(-1, gate_up.shape[-1]).numpy(), self.gate, out.view(-1, out.shape[-1]).numpy())
        return self.down(out)  # type: ignore[no-any-return]


def _is_act(act: Any, name: str) -> bool:
    return type(act) is type(ACT2FN[name])


class Attention(nn.Module):
    """Attention with q, k and v as one product; queries and keys are turned in the kernel where `is_turned`."""

    def __init__(
        self, stock: Any, site: str, bank: SlotBank, pack: Packer, manner: Manner, is_turned: bool = True
    ) -> None:
        super().__init__()
        projections = [stock.q_proj, stock.k_proj, stock.v_proj]
        sites = [f"{site}.q_proj", f"{site}.k_proj", f"{site}.v_proj"]
        self.qkv = HatLinear(projections, pack, bank, sites, False)
        self.out = HatLinear([stock.o_proj], pack, bank, [f"{site}.o_proj"], False)
        self.layer_idx, self.manner, self.is_turned = stock.layer_idx, manner, is_turned

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], paged: PagedBatch, **_other: Any
    ) -> tuple[Tensor, None]:
        qkv = self.qkv(hidden_states)[0]
        if self.is_turned:
            cos, sin = (part[0] for part in position_embeddings)
        else:
            cos = sin = qkv.new_empty(len(qkv), 0)
        attended = attention.attend(paged, self.layer_idx, qkv, cos, sin, self.manner)
        return self.out(attended.flatten(1)[None]), None


class WholeLayer:
    """The forward of a layer whose parts are fused, h + attention(norm(h)), then h + mlp(norm(h)), as one kernel.

    Where hats do more than add branches and biases to linear layers, the stock forward calls the parts: these use the
    same kernels, so that the results are the same bits.
    """

    def __init__(self, layer: Any, bank: SlotBank) -> None:
        self.stock, self.bank, self.attention = layer.forward, bank, layer.self_attn
        parts = layer.self_attn.qkv, layer.self_attn.out, layer.mlp.gate_up, layer.mlp.down
        norms = layer.input_layernorm, layer.post_attention_layernorm
        self.constants: tuple[Any, ...] = (
            tuple(norm.weight.numpy() for norm in norms),
            tuple(np.float32(norm.eps) for norm in norms),
            tuple(part.product.arrays for part in parts),
            tuple(part.group.sites for part in parts),
            tuple(part.group.columns for part in parts),
            layer.mlp.gate,
        )

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        paged: PagedBatch = kwargs["paged"]
        if not self.bank.is_plain:
            return self.stock(hidden_states, **kwargs)  # type: ignore[no-any-return]
        cache, layer = paged.cache, self.attention.layer_idx
        shape, turned = cache.shapes[layer], None if self.attention.is_turned else 0
        out = decoder.decoder_layer(
            hidden_states[0].numpy(),
            *self.constants,
            tuple(turn[0, :, :turned].numpy() for turn in kwargs["position_embeddings"]),
            (
                cache.keys[layer].numpy(),
                cache.values[layer].numpy(),
                cache.block_size,
                attention.num_heads(int(self.attention.qkv.group.columns[-1]), shape),
                shape.value_dim,
            ),
            paged.arrays(),
            self.attention.manner.numbers(),
            self.bank.worn(),
            torch.get_num_threads(),
        )
        return torch.from_numpy(out)[None]


def _is_whole(layer: Any) -> bool:
    """Whether all parts of a layer are fused, and there are no others."""
    kinds = {"self_attn": Attention, "mlp": GatedMLP, "input_layernorm": RMSNorm, "post_attention_layernorm": RMSNorm}
    return {name: type(child) for name, child in layer.named_children()} == kinds and layer.mlp.gate is not None


@dataclass
class Seen:
    """What modules were called with in one forward of the stock model."""

    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: nn.Module, sites: list[str]) -> Iterator[None]:
        """Note the calls of some modules."""
        handles = [
            model.get_submodule(site).register_forward_hook(self._note(site), with_kwargs=True) for site in sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, site: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
            self.calls[site] = args, kwargs

        return hook


@dataclass
class Fuser:
    """Replaces the parts of a model. `paged` is a batch of the tokens that `seen` is of, with room of its own."""

    model: Any
    bank: SlotBank
    pack: Packer
    manners: dict[int, Manner]
    seen: Seen
    paged: PagedBatch

    def fuse(self) -> None:
        """Every norm, and every part of every layer, that can be."""
        for site in self.bank.spec.norms:
            self._replace(site, self._norm)
        for layer in self.bank.spec.layers:
            if layer.mlp is not None and _has_linears(self._stock(layer.mlp), "gate_proj", "up_proj", "down_proj"):
                self._replace(layer.mlp, self._mlp)
            if _has_linears(self._stock(layer.attention), "q_proj", "k_proj", "v_proj", "o_proj"):
                self._replace(layer.attention, self._attention(is_turned=True), self._attention(is_turned=False))
            if kernels.serve(self.bank.device, self.bank.kept.others) and _is_whole(self._stock(layer.layer)):
                self._join(layer.layer)

    def _stock(self, site: str) -> Any:
        return self.model.get_submodule(site)

    def _norm(self, site: str, _pack: Packer) -> nn.Module:
        return RMSNorm(self._stock(site), self.bank.spec.norms[site].offset)

    def _mlp(self, site: str, pack: Packer) -> nn.Module:
        return GatedMLP(self._stock(site), site, self.bank, pack)

    def _attention(self, is_turned: bool) -> Maker:
        def make(site: str, pack: Packer) -> nn.Module:
            stock = self._stock(site)
            return Attention(stock, site, self.bank, pack, self.manners[int(stock.layer_idx)], is_turned)

        return make

    def _replace(self, site: str, *makers: Maker) -> None:
        """By the first kind of part that computes what the stock part does."""
        for make in makers:
            if site in self.seen.calls and self._is_equal(site, make):
                parent, _, child = site.rpartition(".")
                setattr(self.model.get_submodule(parent), child, make(site, self.pack))
                return

    def _join(self, site: str) -> None:
        """One call for the whole layer, if that computes what the layer's fused parts do."""
        layer = self._stock(site)
        whole = WholeLayer(layer, self.bank)
        if self._is_equal(site, lambda _site, _pack: whole):
            layer.forward = whole

    def _is_equal(self, site: str, make: Callable[[str, Packer], Callable[..., Any]]) -> bool:
        args, kwargs = self.seen.calls[site]
        if "paged" in kwargs:
            kwargs = {**kwargs, "paged": self.paged}
        wanted = _tensor(self._stock(site)(*args, **kwargs))
        try:
            got = _tensor(make(site, pack_torch)(*args, **kwargs))
        except (TypeError, AttributeError, ValueError, RuntimeError, IndexError):
            return False  # it has the names of such a part, but is another
        tolerance = TOLERANCE if wanted.dtype == torch.float32 else COARSE_TOLERANCE
        return got.shape == wanted.shape and bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())


def _has_linears(module: Any, *names: str) -> bool:
    """Whether a module has these linear layers, and nothing else that is trained."""
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
        return False
    return {name.rpartition(".")[0] for name, _ in module.named_parameters()} == set(names)


def _tensor(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
