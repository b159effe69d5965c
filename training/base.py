"""The base that adapters are trained for: its folder, tokenizer and model, loaded frozen and in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from adapters_store.base import identity, resolve
from adapters_store.base.describe import describe, end_token_ids
from adapters_store.base.rotary import fix_rotary, rotary_choice
from adapters_store.base.spec import BaseSpec
from adapters_store.cores import num_cores
from adapters_store.format.manifest import BaseRef
from training.errors import BaseError, OptionError


@dataclass(frozen=True)
class Base:
    """A loaded base; `name` is as the user wrote it, `rotary` the choice of factors that change with length, if any."""

    name: str
    folder: Path
    tokenizer: Any
    model: Any
    rotary: str = ""

    @cached_property
    def spec(self) -> BaseSpec:
        """Sites and shapes of the base. Ask before a method changes the model."""
        return describe(self.model, self.name, self.identity.identity, self.folder)

    @cached_property
    def identity(self) -> identity.BaseIdentity:
        """Digests of the base's architecture and weights."""
        return identity.base_identity(self.folder)

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters of the base itself. Ask before a method adds its own."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def ends(self) -> frozenset[int]:
        """Tokens at which a served answer ends: the base's own, and the tokenizer's, with which rows end."""
        return frozenset({*end_token_ids(self.model), self.tokenizer.eos_token_id})

    @property
    def ref(self) -> BaseRef:
        """Name and digests, as a manifest has them."""
        return BaseRef(self.name, self.identity.identity, self.identity.weights)


def load_base(
    name: str, device: str, cache: Path | None, say: Callable[[str], None], max_tokens: Sequence[int] = (1024,)
) -> Base:
    """Load a base, fetching it if need be. Raises `BaseError`, and `OptionError` for a device that is not there.

    Rotary factors that change with length are those of `max_tokens`, of the longest row of each job. Raises
    `OptionError` if jobs need different ones.
    """
    if num_cores() < torch.get_num_threads():  # it asks for no CPU quota itself
        torch.set_num_threads(num_cores())
    try:
        folder = resolve.resolve_base(name, cache, say)
        tokenizer, model = _load(folder)
    except identity.BaseUnavailableError as error:
        raise BaseError(str(error)) from error
    try:
        model = model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise OptionError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    base = Base(name, folder, tokenizer, model, _fix_rotary(model, max_tokens))
    try:
        base.spec, base.num_parameters  # noqa: B018 - while the model is as it was loaded
    except identity.BaseUnavailableError as error:
        raise BaseError(str(error)) from error
    return base


@torch.no_grad()
def _fix_rotary(model: Any, max_tokens: Sequence[int]) -> str:
    if len(choices := {rotary_choice(model, each) for each in max_tokens}) > 1:
        raise OptionError(f"--max-length chooses different factors of rotary embeddings: {', '.join(sorted(choices))}.")
    return fix_rotary(model, max_tokens[0])


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseError(f"The base in {folder} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise BaseError(f"The tokenizer in {folder} has no end-of-sequence token; an answer could not end.")
    if tokenizer.eos_token_id >= model.config.get_text_config().vocab_size:
        raise BaseError(
            f"The tokenizer in {folder} ends texts with the token {tokenizer.eos_token_id}, which the model cannot "
            "write; an answer could not end. Name another eos_token in tokenizer_config.json."
        )
    return tokenizer, model
