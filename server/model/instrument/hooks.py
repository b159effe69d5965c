"""Hand what modules that are no linears compute - norms, blocks, layers, the embedding - to the adapter slots.

Forward hooks do it, which are there only while some slot acts at the module: a batch of LoRA alone pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapters_store.base.spec import BaseSpec
from server.model.slots.layout import PackedPatch
from server.model.slots.slots import AdapterSlots


class SiteHooks:
    """The hooks of one model.

    `heads_first` is learned from one forward: norms that see [1, heads, T, d]. `inside` are the sites that a whole
    decoder computes itself.
    """

    def __init__(self, model: nn.Module, spec: BaseSpec) -> None:
        self.model, self.spec = model, spec
        self.heads_first: set[str] = set()
        self.inside: set[int] = set()
        self._handles: dict[int, list[RemovableHandle]] = {}

    def connect(self, adapter_slots: AdapterSlots) -> None:
        """Hand over to these slots from now on."""
        self.adapter_slots = adapter_slots
        self._counts = [0] * len(adapter_slots.sites)  # slots that act at each site
        self._hooked = {  # linears are ours, and the embedding has its hook from the start
            site
            for site, name in enumerate(adapter_slots.sites.names)
            if not adapter_slots.sites.is_linear[site] and name != self.spec.embedding
        }
        adapter_slots.on_change = self._change
        embedding = self.model.get_submodule(self.spec.embedding)
        embedding.register_forward_hook(lambda _module, args, output: adapter_slots.embed(args[0], output))

    @contextmanager
    def learning(self, num_tokens: int) -> Iterator[None]:
        """Note, while a forward of `num_tokens` runs, the norms whose output has the heads before the tokens."""
        handles = [
            self.model.get_submodule(site).register_forward_hook(self._learner(site, num_tokens))
            for site in self.spec.norms
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _learner(self, site: str, num_tokens: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if output.dim() == 4 and output.shape[1] != num_tokens:
                self.heads_first.add(site)

        return hook

    def _change(self, packed: PackedPatch, change: int) -> None:
        """Count a slot that came (1) or goes (-1), and install or remove hooks."""
        for site in self._hooked.intersection(packed.entries[:, 1].tolist()):
            self._counts[site] += change
            if self._counts[site] == 0:
                for handle in self._handles.pop(site):
                    handle.remove()
            elif site not in self._handles:
                self._handles[site] = self._install(site, self.adapter_slots.sites.names[site])

    def _install(self, site: int, name: str) -> list[RemovableHandle]:
        handles = [self.model.get_submodule(name).register_forward_hook(self._leave(site), with_kwargs=True)]
        if norm := self.adapter_slots.sites.stream_of.get(name):
            handles.append(self.model.get_submodule(norm).register_forward_pre_hook(self._note_stream))
        return handles

    def _note_stream(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.adapter_slots.step.stream = args[0]

    def _leave(self, site: int) -> Callable[..., Any]:
        name = self.adapter_slots.sites.names[site]
        group, is_heads_first = self.adapter_slots.group(name), name in self.heads_first

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if site in self.inside:
                return output
            y = output[0] if isinstance(output, tuple) else output
            x = args[0] if args else kwargs["hidden_states"]
            rows = y.transpose(1, 2).contiguous() if is_heads_first else y.contiguous()
            self.adapter_slots.apply(group, x, rows)
            y = rows.transpose(1, 2) if is_heads_first else rows
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook
