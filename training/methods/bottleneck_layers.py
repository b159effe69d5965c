"""A tuner that PEFT lacks, registered with it: bottleneck adapters, f(h) = N(s (U act(D M(h) + d) + u)).

It wraps whole attention and feed-forward modules (`adapters_store.methods.bottleneck` has the placements). What PEFT
saves of it is the folder that the server takes; importing this lets `PeftModel.from_pretrained` open one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers.activations import ACT2FN

PEFT_TYPE = "BOTTLENECK"
INIT_STD = 0.02  # of the down-projection; U starts at zero, and so does f


def _add_peft_type() -> None:
    """Add our type to PEFT's enum of methods, without which it cannot be registered."""
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    PeftType._member_map_[PEFT_TYPE] = PeftType._value2member_map_[PEFT_TYPE] = member
    PeftType._member_names_.append(PEFT_TYPE)
    type.__setattr__(PeftType, PEFT_TYPE, member)


if PEFT_TYPE not in PeftType._member_map_:
    _add_peft_type()


@dataclass
class BottleneckTunerConfig(PeftConfig):  # type: ignore[misc]
    """PEFT's config of a bottleneck adapter: `target_modules` are whole names of the modules that `placement` wraps."""

    target_modules: list[str] | str | None = field(default=None)
    bottleneck_size: int = field(default=48)
    placement: str = field(default="pfeiffer")
    non_linearity: str = field(default="relu")
    scaling: float | str = field(default=1.0)
    ln_before: bool = field(default=False)
    ln_after: bool = field(default=False)
    dropout: float = field(default=0.0)
    layers_to_transform: list[int] | int | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module with bottlenecks around it, by adapter name."""

    adapter_layer_names = (
        "bottleneck_down",
        "bottleneck_up",
        "bottleneck_scaling",
        "bottleneck_norm_before",
        "bottleneck_norm_after",
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckTunerConfig, hidden: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_norm_before, self.bottleneck_norm_after = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_scaling = nn.ParameterDict()
        self.configs: dict[str, BottleneckTunerConfig] = {}
        self.hidden = hidden
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckTunerConfig) -> None:
        """Add a bottleneck, whose update is zero until it is trained."""
        self.configs[adapter_name] = config
        down, up = nn.Linear(self.hidden, config.bottleneck_size), nn.Linear(config.bottleneck_size, self.hidden)
        nn.init.normal_(down.weight, std=INIT_STD)
        for tensor in (down.bias, up.weight, up.bias):
            nn.init.zeros_(tensor)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        for norms, is_used in (
            (self.bottleneck_norm_before, config.ln_before),
            (self.bottleneck_norm_after, config.ln_after),
        ):
            if is_used:
                norms[adapter_name] = nn.LayerNorm(self.hidden)
        if isinstance(config.scaling, str):
            size = self.hidden if config.scaling == "channel" else 1
            self.bottleneck_scaling[adapter_name] = nn.Parameter(torch.ones(size))
        peft: Any = self  # for mypy, which sees a torch module alone
        peft._move_adapter_to_device_of_base_layer(adapter_name)
        peft.set_adapter(peft.active_adapters, inference_mode=config.inference_mode)

    def merge(self, *_args: Any, **_kwargs: Any) -> None:
        """Raise `NotImplementedError`: an update that is not linear cannot be merged."""
        raise NotImplementedError("A bottleneck adapter is not linear: it cannot be merged into the base.")

    def unmerge(self) -> None:
        """Do nothing, as no adapter is ever merged."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output with the update of each active bottleneck."""
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        peft: Any = self
        for name in peft.active_adapters:
            if name in self.configs:
                output = self._with(name, output, args)
        return output

    def _with(self, name: str, output: Any, args: tuple[Any, ...]) -> Any:
        if self.configs[name].placement == "parallel":
            return output + self._update(name, args[0])
        y = output[0] if isinstance(output, tuple) else output
        y = y + self._update(name, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _update(self, name: str, h: Tensor) -> Tensor:
        """Return the update f(h) [..., hidden]."""
        config = self.configs[name]
        if config.ln_before:
            h = self.bottleneck_norm_before[name](h)
        h = ACT2FN[config.non_linearity](self.bottleneck_down[name](h))
        h = self.bottleneck_up[name](nn.functional.dropout(h, config.dropout, self.training))
        h = h * (self.bottleneck_scaling[name] if isinstance(config.scaling, str) else config.scaling)
        return self.bottleneck_norm_after[name](h) if config.ln_after else h


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """The tuner: it wraps the modules that the config names."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as in PEFT

    def _create_and_replace(
        self,
        peft_config: BottleneckTunerConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,  # noqa: ARG002 - PEFT passes it by name
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config, self.model.config.get_text_config().hidden_size)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


register_peft_method(name="bottleneck", config_cls=BottleneckTunerConfig, model_cls=BottleneckModel)
