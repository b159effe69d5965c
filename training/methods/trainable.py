"""Trainable adapters: a base with a method's trainable parameters, and the artifact that is written of them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.base import Base
from training.errors import OptionError

ADAPTER_NAME = "default"  # PEFT's name of the one adapter in a model


class TrainableAdapter:
    """A base with a method attached; the parameters of `model` that require a gradient are trained.

    A method whose training needs more than gradients overrides `begin`, `penalty`, `after_step`, `state` and `restore`.
    """

    can_checkpoint = True  # whether activations can be computed again instead of kept

    def __init__(self, model: Any) -> None:
        self.model = model

    def trained(self) -> list[nn.Parameter]:
        """List the parameters that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def checkpoint_activations(self) -> None:
        """Let transformers compute activations again instead of keeping them. Raises `OptionError` if it cannot."""
        if not self.can_checkpoint:
            raise OptionError("--gradient-checkpointing cannot be used with a prefix of keys and values: leave it out.")
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def begin(self, num_steps: int | None) -> None:
        """Prepare for a run, before its first step; None if time alone bounds the run. Raises `OptionError`."""

    def penalty(self) -> Tensor | None:
        """Return a scalar that is added to a step's loss, or None."""
        return None

    def after_step(self, number: int) -> None:
        """Adjust after step `number` (from 0), with the gradients still there."""

    def state(self) -> dict[str, Any]:
        """Return what resuming needs beside the trained parameters: tensors, numbers, texts, lists and dicts."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    @torch.no_grad()
    def finalize(self, dtype: torch.dtype) -> None:
        """End training: round every number that is stored to one of `dtype`, in place."""
        for tensor in (*self.trained(), *self.tensors().values()):
            tensor.copy_(tensor.to(dtype).to(tensor.dtype))

    def config(self) -> dict[str, Any]:
        """Return the content of adapter_config.json."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of adapter_model.safetensors, by name."""
        raise NotImplementedError


class PeftAdapter(TrainableAdapter):
    """An adapter that PEFT attached: `model` is a PeftModel."""

    @property
    def peft_config(self) -> Any:
        """PEFT's config of the adapter."""
        return self.model.peft_config[ADAPTER_NAME]

    def config(self) -> dict[str, Any]:
        """Return PEFT's config with sets as sorted lists, so that equal runs write equal bytes."""
        config = copy.copy(self.peft_config)
        config.inference_mode = True
        return json.loads(json.dumps(config.to_dict(), default=sorted))  # type: ignore[no-any-return]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that PEFT would save."""
        from peft import get_peft_model_state_dict

        with quiet():
            return dict(get_peft_model_state_dict(self.model, save_embedding_layers=False))


def attach_peft(base: Base, config: Any) -> Any:
    """Attach a PEFT config to a base; return the PeftModel. Raises `OptionError` with PEFT's reason if it refuses."""
    from peft import get_peft_model

    with quiet():
        try:
            model = get_peft_model(base.model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise OptionError(f"PEFT refuses the options of {config.peft_type.value.lower()}: {error}") from error
    stored_config = model.peft_config[ADAPTER_NAME]
    stored_config.base_model_name_or_path = base.name  # as the user says it, not a path in a cache
    for key in ("target_modules", "feedforward_modules", "exclude_modules"):
        if isinstance(getattr(stored_config, key, None), set):
            setattr(stored_config, key, sorted(getattr(stored_config, key)))
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence PEFT's warnings, which are meant for people who write code, inside the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
