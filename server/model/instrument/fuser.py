"""Parts of a decoder layer that are computed as one: norms, gated feed-forward blocks, attention with its projections.

Architectures that have such a part have it under the same names. A part is recognised by its names, its shapes and how
it was called; it is replaced only if ours gives, for inputs that the stock part saw, what the stock part gave.
Everything else stays as transformers has it. An error of ours on a part that was recognised is raised: it would make
the base slow in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from server.model.attention.paged_batch import PagedBatch
from server.model.backends.attention_params import AttentionParams
from server.model.backends.base import PackLinear
from server.model.backends.reference import linear_reference
from server.model.errors import FusedPartError
from server.model.instrument.layers import Attention, GatedMLP, RMSNorm
from server.model.instrument.recognise import is_attention, is_gated, is_rms_norm
from server.model.instrument.whole_decoder import FusedDecoder, describe_layer, is_whole
from server.model.slots.slots import AdapterSlots

# Of the largest magnitude, by what keys and values are kept in; what is computed in decides where they are coarse.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-4}
COARSE_TOLERANCE = 2e-2
NOT_CALLED: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
Maker = Callable[[str, PackLinear], nn.Module]  # the part for a site, its products packed so


@dataclass
class CallRecorder:
    """Notes what modules were called with in one forward of the stock model."""

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
class LayerFuser:
    """Replaces the parts of a model. `paged` is a batch of the tokens that `recorder` is of, with room of its own."""

    model: Any
    adapter_slots: AdapterSlots
    pack: PackLinear
    params_of_layer: dict[int, AttentionParams]
    recorder: CallRecorder
    paged: PagedBatch
    _checked: dict[str, bool] = field(default_factory=dict)

    def fuse(self) -> FusedDecoder | None:
        """Replace every norm and every part of every layer that can be; return all layers as one call, if they can.

        Raises `FusedPartError` with the part's name if our code fails on a part that was recognised.
        """
        for site in self.adapter_slots.spec.norms:
            if is_rms_norm(self._stock(site), *self._call(site)):
                self._replace_alike(site, self._norm)
        for layer in self.adapter_slots.spec.layers:
            if layer.mlp is not None and is_gated(self._stock(layer.mlp), *self._call(layer.mlp)):
                self._replace_alike(layer.mlp, self._mlp)
            if is_attention(self._stock(layer.attention), *self._call(layer.attention)):
                self._replace(layer.attention, self._attention(is_rotated=True), self._attention(is_rotated=False))
        sites = [layer.layer for layer in self.adapter_slots.spec.layers]
        return self._join(sites) if all(is_whole(self._stock(site)) for site in sites) else None

    def _stock(self, site: str) -> Any:
        return self.model.get_submodule(site)

    def _norm(self, site: str, _pack: PackLinear) -> nn.Module:
        slots = self.adapter_slots
        return RMSNorm(self._stock(site), slots.spec.norms[site].offset, slots.group(site), slots.backend)

    def _mlp(self, site: str, pack: PackLinear) -> nn.Module:
        return GatedMLP(self._stock(site), site, self.adapter_slots, pack)

    def _attention(self, is_rotated: bool) -> Maker:
        def make(site: str, pack: PackLinear) -> nn.Module:
            stock = self._stock(site)
            return Attention(
                stock, site, self.adapter_slots, pack, self.params_of_layer[int(stock.layer_idx)], is_rotated
            )

        return make

    def _replace(self, site: str, *makers: Maker) -> None:
        """Replace a part by the first kind that computes what the stock part does."""
        make = next((make for make in makers if self._is_equal(site, make)), None)
        if make is not None:
            self._set(site, make)

    def _replace_alike(self, site: str, make: Maker) -> None:
        """Replace a part that is what it prints, so that one that was checked stands for those like it.

        Attention is none of them, for layers may rotate their queries or not; all are checked together in the end.
        """
        kind = repr(self._stock(site))
        if kind not in self._checked:
            self._checked[kind] = self._is_equal(site, make)
        if self._checked[kind]:
            self._set(site, make)

    def _set(self, site: str, make: Maker) -> None:
        parent, _, child = site.rpartition(".")
        setattr(self.model.get_submodule(parent), child, make(site, self.pack))

    def _join(self, sites: list[str]) -> FusedDecoder | None:
        """Make one call of all layers, if the backend has one and it computes what the layers' fused parts do."""
        layers, groups = [self._stock(site) for site in sites], [self.adapter_slots.group(site) for site in sites]
        described = [describe_layer(layer, group) for layer, group in zip(layers, groups, strict=True)]
        compute = self.adapter_slots.backend.whole_decoder(described)
        if compute is None:
            return None
        fused_decoder = FusedDecoder(layers, self.adapter_slots, groups, compute)
        args, kwargs = self._call(sites[0])
        hidden = args[0]
        for site, stock in zip(sites, fused_decoder.stock, strict=True):
            hidden = _tensor(stock(hidden, **self._call(site)[1]))
        if not self._gives("all layers", lambda: fused_decoder(*args, **kwargs), hidden):
            return None
        fused_decoder.install()
        return fused_decoder

    def _is_equal(self, site: str, make: Callable[[str, PackLinear], Callable[..., Any]]) -> bool:
        args, kwargs = self._call(site)
        wanted = _tensor(self._stock(site)(*args, **kwargs))
        return self._gives(site, lambda: make(site, linear_reference)(*args, **kwargs), wanted)

    def _call(self, site: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = self.recorder.calls.get(site, NOT_CALLED)
        return args, {**kwargs, "paged": self.paged} if "paged" in kwargs else kwargs

    def _gives(self, name: str, compute: Callable[[], Any], wanted: Tensor) -> bool:
        """Whether our part gives what is wanted, but for rounding. Raises `FusedPartError` if it fails."""
        try:
            got = _tensor(compute())
        except Exception as error:
            raise FusedPartError(f"{name} is of a known kind, but our code fails on it: {error!r}") from error
        is_exact = wanted.dtype == torch.float32
        tolerance = TOLERANCE[self.adapter_slots.dtypes.matrices] if is_exact else COARSE_TOLERANCE
        return got.shape == wanted.shape and bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())


def _tensor(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
