"""The options of every trainable method: fields with help texts, from which the flags of `manyhats train` are made.

To add an option, add a field here; a method reads the fields of its own class. The module imports no torch, so that
`manyhats train --help` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
HELP = "help"  # key of a field's metadata
SEEN = "seen"  # value of --token-indices: the tokens of the training rows
# Options that several methods share stand last wherever options are listed: manifests were written so from the first.
LISTED_LAST = (
    "alpha",
    "dropout",
    "use_rslora",
    "target_modules",
    "feedforward_modules",
    "parameters",
    "layers",
    "encoder_hidden_size",
)


def option(default: T, text: str) -> T:
    """Declare a dataclass field with a default and the help text of its flag."""
    field: T = dataclasses.field(default=default, metadata={HELP: text})
    return field


def flag(name: str) -> str:
    """Return an option's name as the command line has it: `batch_size` is `--batch-size`."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """Base of the option classes; by itself the options of a method that has none."""

    @classmethod
    def names(cls) -> list[str]:
        """List the options in the order in which sentences and manifests have them."""
        fields = [field.name for field in dataclasses.fields(cls)]
        return sorted(fields, key=lambda name: LISTED_LAST.index(name) if name in LISTED_LAST else -1)

    def as_dict(self) -> dict[str, Any]:
        """Map each option to its value, in the order of `names`."""
        return {name: getattr(self, name) for name in self.names()}


def option_classes(root: type[MethodOptions] = MethodOptions) -> Iterator[type[MethodOptions]]:
    """Iterate over `root` and every class that extends it; one that extends two bases comes twice."""
    yield root
    for extending in root.__subclasses__():
        yield from option_classes(extending)


# Methods at linears. A class may give a field of its base another default; the help text stays the base's.


@dataclass(frozen=True, kw_only=True)
class LayerOptions(MethodOptions):
    """Options of a method that acts in all layers or in chosen ones."""

    layers: str = option("all", "all, last:N, or numbers and ranges like 0,4-7")


@dataclass(frozen=True, kw_only=True)
class BiasOptions(LayerOptions):
    """Options of BEFT: the linears that get a bias."""

    target_modules: str = option("all-linear", "all-linear, or names joined by commas")


@dataclass(frozen=True, kw_only=True)
class LinearOptions(BiasOptions):
    """Options of a method that changes linears, with dropout while it trains."""

    layers: str = "last:10"
    dropout: float = option(0.0, "dropout in training")


@dataclass(frozen=True, kw_only=True)
class RankOptions(LinearOptions):
    """Options of a method whose update of a linear has one rank."""

    r: int = option(8, "rank")


@dataclass(frozen=True, kw_only=True)
class ScaleOptions(LinearOptions):
    """Options of a method whose update is scaled by alpha."""

    alpha: float = option(16, "what the update is scaled by, over the rank")


@dataclass(frozen=True, kw_only=True)
class FixedScaleOptions(ScaleOptions, RankOptions):
    """Options of the LoRA variants whose name already says how they are scaled: rsLoRA, PiSSA, OLoRA."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions(FixedScaleOptions):
    """Options of LoRA and DoRA."""

    use_rslora: bool = option(False, "scale by alpha / sqrt(r)")


@dataclass(frozen=True, kw_only=True)
class LycorisOptions(FixedScaleOptions):
    """Options of LoHa, whose update has rank r^2, and of LoKr."""

    alpha: float = 8


@dataclass(frozen=True, kw_only=True)
class AdaLoraOptions(ScaleOptions):
    """Options of AdaLoRA: `init_r` is each site's rank at the beginning, `target_r` the mean rank at the end."""

    init_r: int = option(12, "adalora: each site's rank at first")
    target_r: int = option(8, "adalora: the mean rank at last")
    alpha: float = 32


@dataclass(frozen=True, kw_only=True)
class VeraOptions(RankOptions):
    """Options of VeRA, whose rank costs little: only r + out numbers a linear are trained."""

    r: int = 64


@dataclass(frozen=True, kw_only=True)
class MissOptions(RankOptions):
    """Options of MiSS, which takes `r` sums of a linear's input."""

    r: int = 16


@dataclass(frozen=True, kw_only=True)
class OftOptions(LinearOptions):
    """Options of OFT, which rotates `block_size` inputs of a linear together."""

    block_size: int = option(16, "oft: inputs that are turned together")


@dataclass(frozen=True, kw_only=True)
class IA3Options(LayerOptions):
    """Options of (IA)3: empty names stand for keys, values and the last linear of the feed-forward block."""

    target_modules: str = ""
    feedforward_modules: str = option("", "ia3: modules whose input is scaled")


@dataclass(frozen=True, kw_only=True)
class BottleneckOptions(LayerOptions):
    """Options of bottleneck adapters; `scaling` is a number, `learned` or `channel`."""

    bottleneck_size: int = option(48, "bottleneck: its width")
    placement: str = option("pfeiffer", "bottleneck: houlsby, pfeiffer or parallel")
    non_linearity: str = option("relu", "bottleneck: relu, gelu, silu, tanh, …")
    scaling: str = option("1.0", "bottleneck: a number, learned or channel")
    ln_before: bool = option(False, "bottleneck: a layer norm before it")
    ln_after: bool = option(False, "bottleneck: a layer norm after it")
    dropout: float = 0.0
    layers: str = "last:10"


# Methods with virtual tokens.


@dataclass(frozen=True, kw_only=True)
class VirtualTokenOptions(MethodOptions):
    """Options of a method that puts virtual tokens before the prompt."""

    num_virtual_tokens: int = option(20, "soft prompts: how many")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(VirtualTokenOptions):
    """Options of prompt tuning.

    `init_text` is repeated or cut to the number of virtual tokens; empty, it is a text that names the answers of the
    data.
    """

    init_text: str = option("", "soft prompts: the text they begin as, or random")


@dataclass(frozen=True, kw_only=True)
class MultitaskOptions(PromptOptions):
    """Options of multitask prompt tuning: `num_ranks` is the rank of the task's factor of the prompt."""

    num_ranks: int = option(1, "multitask_prompt_tuning: ranks of the task's factor")


@dataclass(frozen=True, kw_only=True)
class CptOptions(PromptOptions):
    """Options of context-aware prompt tuning.

    The context is `init_text`, or else the first rows of the data, as many as fit. `epsilon` bounds how far a token's
    embedding moves.
    """

    num_virtual_tokens: int = 100
    epsilon: float = option(0.2, "cpt: how far a token may move")


@dataclass(frozen=True, kw_only=True)
class CartridgeOptions(PromptOptions):
    """Options of cartridges: the first `num_frozen_tokens` stay as they begin."""

    num_frozen_tokens: int = option(1, "cartridge: first tokens that stay")


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(VirtualTokenOptions):
    """Options of a method whose virtual tokens come out of an encoder, which is folded when they are written."""

    encoder_hidden_size: int = option(256, "p_tuning, prefix_tuning: the encoder's width")


@dataclass(frozen=True, kw_only=True)
class PTuningOptions(EncoderOptions):
    """Options of p-tuning: the encoder is an MLP, or an LSTM followed by an MLP."""

    encoder_reparameterization_type: str = option("MLP", "p_tuning: MLP or LSTM")


@dataclass(frozen=True, kw_only=True)
class PrefixOptions(EncoderOptions, PromptOptions):
    """Options of prefix tuning: `prefix_projection` trains the prefix through an MLP that begins at random."""

    prefix_projection: bool = option(False, "prefix_tuning: train through an MLP")


# Methods that train parameters of the base.


@dataclass(frozen=True, kw_only=True)
class SelectiveOptions(LayerOptions):
    """Options of selective training.

    `parameters` are runs of words out of parameters' names (`bias`, `mlp.down_proj`); empty, it is every parameter of
    the layers.
    """

    layers: str = "last:1"
    parameters: str = option("", "selective: words in parameters' names, by commas")


@dataclass(frozen=True, kw_only=True)
class TokenOptions(MethodOptions):
    """Options of trainable tokens: ids and ranges (`5,9-12`), or `seen` for every token of the training rows."""

    token_indices: str = option(SEEN, "trainable_tokens: seen, or ids like 5,9-12")
