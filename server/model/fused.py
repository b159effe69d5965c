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
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from adapters_store.spec import KVShape
from server.model import attention, kernels
from server.model.attention import KVCache, Manner, PagedBatch
from server.model.bank import Group, SlotBank
from server.model.kernels import decoder, layers
from server.model.linear import HatLinear, PackedProduct, Packer, pack_torch

# Of the largest magnitude, by what keys and values are kept in; what is computed in decides where they are coarse.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-4}
COARSE_TOLERANCE = 2e-2
STEADY = {"default", "linear", "llama3", "yarn"}  # kinds of rotary embeddings that no length of a sequence changes
KNOWN = 8192  # positions whose turns are kept: 4 MiB of SmolLM2
Maker = Callable[[str, Packer], nn.Module]  # the part for a site, its products packed so


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), where some bases keep the weight less one (arXiv:1910.07467)."""

    def __init__(self, norm: Any, offset: float, group: Group) -> None:
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(norm.weight.detach().float() + offset, requires_grad=False)
        self.eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(self, x: Tensor) -> Tensor:
        if not kernels.serve(x.device.type, x.dtype):
            return functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
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
        self.group = bank.group(site)
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
        self.group = bank.group(site)
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


class WholeLayers:
    """The forward of layers whose parts are fused, h + attention(norm(h)), then h + mlp(norm(h)), as one kernel.

    It is that of the first; the others hand on what it gave. The stock forwards call the parts, which use the same
    kernels, so that the results are the same bits.
    """

    def __init__(self, layers: list[Any], bank: SlotBank, groups: list[Group]) -> None:
        self.stock, self.bank = [layer.forward for layer in layers], bank
        self.layers, self.groups = layers, groups
        self.unit = layers[0].mlp.down.product.arrays[0][:0, 0, 0]
        self.records = np.zeros(0, decoder.LAYER)
        self.cache: KVCache | None = None  # that `records` have addresses of
        self.norm: RMSNorm | None = None  # that `last` has the address of
        self.last = np.zeros(0, decoder.NORM)

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        cos, sin = (turn[0] for turn in kwargs["position_embeddings"])
        return self.run(hidden_states[0], (cos, sin), kwargs["paged"])[None]

    def run(self, hidden: Tensor, turns: tuple[Tensor, ...], paged: PagedBatch, norm: RMSNorm | None = None) -> Tensor:
        """hidden [T, size] through the layers, and the norm behind them; turns = (cos, sin), each [T, turned]."""
        if paged.cache is not self.cache or norm is not self.norm:
            self.cache, self.records = paged.cache, self._records(paged.cache)
            self.norm, self.last = norm, np.array([] if norm is None else [_norm(norm)], decoder.NORM)
        cos, sin = (turn.numpy() for turn in turns)
        out = decoder.decoder_layers(
            hidden.numpy(),
            self.records,
            self.last,
            (cos, sin, cos[:, :0]),
            paged.arrays(),
            (self.unit, paged.cache.arrays(0)[0][:0, 0, 0, 0]),
            self.bank.arrays(self.bank.tokens),
            torch.get_num_threads(),
        )
        return torch.from_numpy(out)

    def install(self) -> None:
        """Compute so from now on."""
        self.layers[0].forward = self
        for layer in self.layers[1:]:
            layer.forward = _hand_on
        self.bank.inside |= {int(own.sites[0]) for own in self.groups}

    def _records(self, cache: KVCache) -> NDArray[np.void]:
        """What the kernel takes of every layer."""
        records = np.zeros(len(self.layers), decoder.LAYER)
        for record, layer, own in zip(records, self.layers, self.groups, strict=True):
            attends, mlp = layer.self_attn, layer.mlp
            record["input_norm"], record["mlp_norm"] = map(
                _norm, (layer.input_layernorm, layer.post_attention_layernorm)
            )
            record["qkv"], record["out"] = map(_linear, (attends.qkv, attends.out))
            record["gate_up"], record["down"] = map(_linear, (mlp.gate_up, mlp.down))
            record["attention"], record["mlp"], record["layer"] = map(_group, (attends.group, mlp.group, own))
            record["cache"] = _cache(cache, attends.layer_idx)
            record["manner"] = _manner(attends, cache.shapes[attends.layer_idx])
            record["activation"] = mlp.gate
        return records


class Turns:
    """Cosines and sines of positions by the base's own module, those of the first `KNOWN` once and for all.

    Only where a position's are always the same.
    """

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.table: tuple[Tensor, ...] = ()
        if getattr(rotary, "rope_type", "") in STEADY:
            self.table = self._compute(torch.arange(KNOWN))

    def _compute(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(turn[0] for turn in self.rotary(torch.empty(0), position_ids[None]))

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        """position_ids [T] -> (cos, sin), each [T, turned]."""
        if not self.table or int(position_ids.max()) >= KNOWN:
            return self._compute(position_ids)
        return tuple(turn.index_select(0, position_ids) for turn in self.table)


class Direct:
    """The forward of a model whose layers are one call, without what transformers does between its parts.

    Between steps all of Python and torch leave the CPU's caches for the weights, so that every call costs several times
    what it does in a loop of its own: with fewer of them, here and in the sampler, a step of one row of SmolLM2 takes
    9.4 to 10 ms instead of 10.6. `base.forward` is the slow twin.
    """

    def __init__(self, model: Any, layers: WholeLayers) -> None:
        stock = model.get_decoder()
        self.embed, self.turn, self.layers = model.get_input_embeddings(), Turns(stock.rotary_emb), layers
        self.norm, self.head = stock.norm, model.get_output_embeddings()
        self.inside = self.norm if isinstance(self.norm, RMSNorm) else None

    def __call__(self, token_ids: Tensor, position_ids: Tensor, wanted: Tensor, paged: PagedBatch) -> Tensor:
        """token_ids [T], position_ids [T], wanted [R] indices of T -> logits [R, vocabulary] in fp32."""
        hidden = self.embed(token_ids[None])[0]
        hidden = self.layers.run(hidden, self.turn(position_ids), paged, self.inside)
        if self.inside is None:
            hidden = self.norm(hidden[None])[0]
        logits: Tensor = self.head(hidden.index_select(0, wanted)[None])[0]
        return logits.float()


def _hand_on(hidden_states: Tensor, **_other: Any) -> Tensor:
    return hidden_states


def _group(group: Group) -> tuple[Any, ...]:
    return group.number, len(group.sites), group.sites.ctypes.data, group.columns.ctypes.data


def _norm(norm: RMSNorm) -> tuple[Any, ...]:
    return norm.weight.data_ptr(), norm.eps, _group(norm.group)


def _linear(linear: HatLinear) -> tuple[Any, ...]:
    product = linear.product
    if not isinstance(product, PackedProduct):
        raise TypeError("a layer in one call needs packed weights")
    weight, start, scales, bias = product.arrays
    addresses = [array.ctypes.data for array in (start, scales, bias)]
    sizes = len(weight), weight.shape[1], product.size_out
    return weight.ctypes.data, *sizes, *addresses, len(scales), _group(linear.group)


def _cache(cache: KVCache, layer: int) -> tuple[Any, ...]:
    keys, values = cache.keys[layer], cache.values[layer]
    return keys.data_ptr(), values.data_ptr(), tuple(keys.shape), tuple(values.shape), cache.block_size


def _manner(attends: Attention, shape: KVShape) -> tuple[Any, ...]:
    scaling, window, softcap = attends.manner.numbers()
    heads = attention.num_heads(int(attends.qkv.group.columns[-1]), shape)
    return scaling, softcap, window, heads, shape.value_dim, attends.is_turned


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
    _proved: dict[str, bool] = field(default_factory=dict)

    def fuse(self) -> WholeLayers | None:
        """Every norm, and every part of every layer, that can be; all layers as one call, where they are."""
        for site in self.bank.spec.norms:
            self._replace_alike(site, self._norm)
        for layer in self.bank.spec.layers:
            if layer.mlp is not None and _has_linears(self._stock(layer.mlp), "gate_proj", "up_proj", "down_proj"):
                self._replace_alike(layer.mlp, self._mlp)
            if _has_linears(self._stock(layer.attention), "q_proj", "k_proj", "v_proj", "o_proj"):
                self._replace(layer.attention, self._attention(is_turned=True), self._attention(is_turned=False))
        sites = [layer.layer for layer in self.bank.spec.layers]
        if kernels.serve(self.bank.device, self.bank.kept.others) and all(
            _is_whole(self._stock(site)) for site in sites
        ):
            return self._join(sites)
        return None

    def _stock(self, site: str) -> Any:
        return self.model.get_submodule(site)

    def _norm(self, site: str, _pack: Packer) -> nn.Module:
        return RMSNorm(self._stock(site), self.bank.spec.norms[site].offset, self.bank.group(site))

    def _mlp(self, site: str, pack: Packer) -> nn.Module:
        return GatedMLP(self._stock(site), site, self.bank, pack)

    def _attention(self, is_turned: bool) -> Maker:
        def make(site: str, pack: Packer) -> nn.Module:
            stock = self._stock(site)
            return Attention(stock, site, self.bank, pack, self.manners[int(stock.layer_idx)], is_turned)

        return make

    def _replace(self, site: str, *makers: Maker) -> None:
        """By the first kind of part that computes what the stock part does."""
        make = next((make for make in makers if site in self.seen.calls and self._is_equal(site, make)), None)
        if make is not None:
            self._set(site, make)

    def _replace_alike(self, site: str, make: Maker) -> None:
        """As `_replace`, for parts that are what they print: one proves those like it.

        Attention is none of them, for layers may turn their queries or not; and all are proved together in the end.
        """
        kind = repr(self._stock(site))
        if kind not in self._proved and site in self.seen.calls:
            self._proved[kind] = self._is_equal(site, make)
        if self._proved.get(kind):
            self._set(site, make)

    def _set(self, site: str, make: Maker) -> None:
        parent, _, child = site.rpartition(".")
        setattr(self.model.get_submodule(parent), child, make(site, self.pack))

    def _join(self, sites: list[str]) -> WholeLayers | None:
        """One call for all layers, if that computes what the layers' fused parts do."""
        whole = WholeLayers([self._stock(site) for site in sites], self.bank, [self.bank.group(site) for site in sites])
        args, kwargs = self._call(sites[0])
        hidden = args[0]
        for site, stock in zip(sites, whole.stock, strict=True):
            hidden = _tensor(stock(hidden, **self._call(site)[1]))
        if not self._gives(lambda: whole(*args, **kwargs), hidden):
            return None
        whole.install()
        return whole

    def _is_equal(self, site: str, make: Callable[[str, Packer], Callable[..., Any]]) -> bool:
        args, kwargs = self._call(site)
        wanted = _tensor(self._stock(site)(*args, **kwargs))
        return self._gives(lambda: make(site, pack_torch)(*args, **kwargs), wanted)

    def _call(self, site: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = self.seen.calls[site]
        return args, {**kwargs, "paged": self.paged} if "paged" in kwargs else kwargs

    def _gives(self, compute: Callable[[], Any], wanted: Tensor) -> bool:
        """Whether that is computed, but for rounding."""
        try:
            got = _tensor(compute())
        except (TypeError, AttributeError, ValueError, RuntimeError, IndexError):
            return False  # it has the names of such a part, but is another
        is_exact = wanted.dtype == torch.float32
        tolerance = TOLERANCE[self.bank.kept.matrices] if is_exact else COARSE_TOLERANCE
        return got.shape == wanted.shape and bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())


def _has_linears(module: Any, *names: str) -> bool:
    """Whether a module has these linear layers, and nothing else that is trained."""
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
        return False
    return {name.rpartition(".")[0] for name, _ in module.named_parameters()} == set(names)


def _tensor(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
