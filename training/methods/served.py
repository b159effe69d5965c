"""A check before training: whether the server would take the artifact that a run is going to write."""

from __future__ import annotations

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.methods.compile import compile_patch
from training.errors import OptionError
from training.methods.trainable import TrainableAdapter

NUDGE = 1e-3  # added to every value: before training many are zero, which training will change


def check_served(adapter: TrainableAdapter, spec: BaseSpec) -> None:
    """Raise `OptionError` if the server would not take this adapter for a base."""
    tensors = {name: tensor.detach().cpu() + NUDGE for name, tensor in adapter.tensors().items()}
    try:
        compile_patch(Artifact(adapter.config(), tensors, None, "", 0), spec)
    except ArtifactError as error:
        raise OptionError(f"The server would not take this adapter: {error}.") from error
