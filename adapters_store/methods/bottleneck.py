"""Compile bottleneck adapters of our own format (`peft_type: "BOTTLENECK"`): f(h) = N(s (U act(D M(h) + d) + u)).

PEFT has no such type; a tuner that writes this wraps the attention and feed-forward modules of the decoder layers:

* `placement: "houlsby"` (arXiv:1902.00751): y = module(x); y + f(y), for both modules of a layer
* `placement: "pfeiffer"` (arXiv:2005.00247): the same, for the feed-forward module alone
* `placement: "parallel"` (arXiv:2110.04366): module(x) + f(x), for the feed-forward module alone

Tensors are `base_model.model.<module>.bottleneck_down.weight` [size, hidden] and so on (`NAMES`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
from torch import Tensor

from adapters_store.base.spec import BaseSpec, LayerSites
from adapters_store.errors import ArtifactError, MethodUnsupportedError
from adapters_store.format.folder import Artifact
from adapters_store.methods.shared.config import read_config
from adapters_store.methods.shared.expect import PREFIX, expect_exactly, finite
from adapters_store.methods.shared.targets import Targets, named_sites
from adapters_store.primitives import Bottleneck

# Names of activations in transformers -> names in `primitives.ACTIVATIONS`.
ACTIVATION_NAMES: Mapping[str, str] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "none",
}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
IGNORED_KEYS = {"dropout", "init_weights"}
MAX_SIZE, MAX_SCALE = 65_536, 1e6
LEARNED, CHANNEL = "learned", "channel"
Of = Literal["input", "output", "stream"]


class BottleneckConfig(msgspec.Struct, kw_only=True):
    """The keys of our config that change the computation.

    `layers_to_transform` lists decoder layers, none means all. `target_modules` may repeat the modules that the
    placement wraps; a regular expression there is ignored, and never run.
    """

    bottleneck_size: int
    placement: str
    non_linearity: str = "relu"
    scaling: int | float | str = 1.0
    ln_before: bool = False
    ln_after: bool = False
    layers_to_transform: list[int] | int | None = None
    target_modules: list[str] | str | None = None


@dataclass(frozen=True)
class Names:
    """The names of a bottleneck's tensors, which follow its module's name."""

    down: str
    up: str
    scaling: str
    norm_before: str
    norm_after: str


NAMES = Names(
    "bottleneck_down", "bottleneck_up", "bottleneck_scaling", "bottleneck_norm_before", "bottleneck_norm_after"
)


@dataclass(frozen=True)
class Place:
    """A bottleneck's place: its tensors' prefix, its site, what it reads there (`of`), and its width."""

    start: str
    site: str
    of: Of
    size: int


@dataclass(frozen=True)
class Form:
    """The options that all bottlenecks of an artifact share."""

    names: Names
    activation: str
    scaling: float | str
    has_norm_before: bool
    has_norm_after: bool

    def expected(self, place: Place, hidden: int) -> dict[str, list[int]]:
        """Return the shapes of the tensors that a bottleneck must have, by name."""
        names, start, size = self.names, place.start, place.size
        shapes = {
            f"{start}.{names.down}.weight": [size, hidden],
            f"{start}.{names.down}.bias": [size],
            f"{start}.{names.up}.weight": [hidden, size],
            f"{start}.{names.up}.bias": [hidden],
        }
        if isinstance(self.scaling, str):
            shapes[f"{start}.{names.scaling}"] = [1 if self.scaling == LEARNED else hidden]
        for name, is_there in ((names.norm_before, self.has_norm_before), (names.norm_after, self.has_norm_after)):
            shapes |= {f"{start}.{name}.{end}": [hidden] for end in ("weight", "bias") if is_there}
        return shapes

    def primitive(self, tensors: Mapping[str, Tensor], place: Place) -> Bottleneck:
        """Build a bottleneck's primitive in fp32, the scale folded into U and u. Raises `ArtifactError` on overflow."""
        names, start = self.names, place.start
        scale = tensors[f"{start}.{names.scaling}"].float() if isinstance(self.scaling, str) else self.scaling
        down, down_bias = _pair(tensors, f"{start}.{names.down}")
        up, up_bias = _pair(tensors, f"{start}.{names.up}")
        return Bottleneck(
            place.site,
            down,
            finite((up.T * scale).T.contiguous(), f"{start}.{names.up}.weight"),  # a number, or one for each row
            self.activation,
            place.of,
            down_bias,
            finite(up_bias * scale, f"{start}.{names.up}.bias"),
            _pair(tensors, f"{start}.{names.norm_before}") if self.has_norm_before else None,
            _pair(tensors, f"{start}.{names.norm_after}") if self.has_norm_after else None,
        )


def _pair(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()


def form_of(
    names: Names, non_linearity: str, scaling: float | str, has_norm_before: bool, has_norm_after: bool
) -> Form:
    """Check activation and scaling. Raises `MethodUnsupportedError`, or `ArtifactError` for a number out of bounds."""
    activation = ACTIVATION_NAMES.get(non_linearity.lower())
    if activation is None:
        raise MethodUnsupportedError(
            f"non_linearity {non_linearity[:40]} is not served; served are {', '.join(ACTIVATION_NAMES)}",
            "non_linearity",
        )
    if isinstance(scaling, str) and scaling not in (LEARNED, CHANNEL):
        raise MethodUnsupportedError(f"scaling {scaling[:40]} is neither a number, learned nor channel", "scaling")
    if not isinstance(scaling, str) and not 0 < abs(scaling) <= MAX_SCALE:
        raise ArtifactError(f"scaling is {scaling:g}: it must not be 0, nor beyond {MAX_SCALE:g}", "scaling")
    return Form(names, activation, scaling, has_norm_before, has_norm_after)


def compile_places(artifact: Artifact, form: Form, places: list[Place], spec: BaseSpec) -> tuple[Bottleneck, ...]:
    """Compile to a `Bottleneck` per place. Raises `ArtifactError` for a missing or extra tensor."""
    if not artifact.tensors or not places:
        raise ArtifactError("the artifact has no tensors, or its config leaves no layer to them")
    expected: dict[str, list[int]] = {}
    for place in places:
        expected |= form.expected(place, spec.hidden_size)
    expect_exactly(artifact, expected)
    return tuple(form.primitive(artifact.tensors, place) for place in places)


def feed_forward(layer: LayerSites) -> str:
    """Return the site of a layer's feed-forward block. Raises `MethodUnsupportedError` if the base has none."""
    if layer.mlp is None:
        raise MethodUnsupportedError(f"{layer.layer} of this base has no feed-forward block that is known", layer.layer)
    return layer.mlp


def compile_bottleneck(artifact: Artifact, spec: BaseSpec) -> tuple[Bottleneck, ...]:
    """Compile to a `Bottleneck` per module that the placement wraps. Raises `ArtifactError`."""
    config = read_config(artifact, BottleneckConfig, "Bottleneck", IGNORED_KEYS)
    if not 0 < config.bottleneck_size <= MAX_SIZE:
        raise ArtifactError(
            f"bottleneck_size is {config.bottleneck_size}, which is not between 1 and {MAX_SIZE}", "bottleneck_size"
        )
    form = form_of(NAMES, config.non_linearity, config.scaling, config.ln_before, config.ln_after)
    places = [
        Place(PREFIX + site, site, of, config.bottleneck_size)
        for layer in _layers(config, spec)
        for site, of in _placed(config.placement, layer)
    ]
    _check_targets(config, [place.site for place in places], spec)
    return compile_places(artifact, form, places, spec)


def _layers(config: BottleneckConfig, spec: BaseSpec) -> list[LayerSites]:
    """Return the layers that layers_to_transform names, or all if it names none. Raises `ArtifactError`."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return spec.layers
    numbers = {wanted} if isinstance(wanted, int) else set(wanted)
    if outside := sorted(numbers - set(range(len(spec.layers)))):
        raise ArtifactError(
            f"layers_to_transform names the layer {outside[0]}; {spec.name} has {len(spec.layers)}",
            "layers_to_transform",
        )
    return [layer for number, layer in enumerate(spec.layers) if number in numbers]


def _placed(placement: str, layer: LayerSites) -> Iterator[tuple[str, Of]]:
    if placement not in PLACEMENTS:
        raise MethodUnsupportedError(
            f"placement {placement[:40]} is not served; served are {', '.join(PLACEMENTS)}", "placement"
        )
    mlp = feed_forward(layer)
    if placement == "parallel" and not layer.is_mlp_whole:
        raise MethodUnsupportedError(
            f"placement parallel needs a feed-forward block that is one module; {mlp} only ends it", "placement"
        )
    if placement == "houlsby":
        yield layer.attention, "output"
    yield mlp, "input" if placement == "parallel" else "output"


def _check_targets(config: BottleneckConfig, sites: list[str], spec: BaseSpec) -> None:
    """Raise `ArtifactError` if target_modules is a list of names that lacks a module of the placement."""
    named = named_sites(Targets(target_modules=config.target_modules), sites, spec)
    if named is not None and (missing := [site for site in sites if site not in named]):
        raise ArtifactError(
            f"target_modules do not name {missing[0]}, where placement {config.placement} has its bottleneck",
            "target_modules",
        )
