"""Whole modules as updates: the formulas, and what no update can make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base.spec import BaseSpec
from adapters_store.base.weights import base_weight
from adapters_store.errors import ArtifactError
from adapters_store.methods.shared.full_modules import parameters, replace_linear, replace_module
from adapters_store.primitives import Bias, Delta, Rows, Scale
from tests.kit.forge import spec_of

TinyOf = Callable[[str], Path]
NORM = "model.norm"


def spec_with(folder: Path, base: Path, name: str, values: torch.Tensor) -> BaseSpec:
    """The spec of a base that has other values of a parameter."""
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, name: values}, folder / "model.safetensors", metadata={"format": "pt"})
    return spec_of(folder)


def test_parameters_have_the_shapes_of_the_base(tiny_of: TinyOf) -> None:
    """Each parameter of a site is named with the shape in which the base keeps it."""
    gpt2, llama = spec_of(tiny_of("gpt2")), spec_of(tiny_of("llama"))
    assert parameters(gpt2, "transformer.h.0.attn.c_attn") == {"weight": [64, 192], "bias": [192]}
    assert parameters(gpt2, "transformer.ln_f") == {"weight": [64], "bias": [64]}
    assert parameters(gpt2, "transformer.wte") == {"weight": [259, 64]}
    assert parameters(llama, "model.layers.0.mlp.up_proj") == {"weight": [96, 64]}
    assert parameters(llama, "model.layers.0") == {}
    for spec in (gpt2, llama):
        for site in [*spec.linears, *spec.norms, spec.embedding]:
            for name, shape in parameters(spec, site).items():
                assert list(base_weight(spec, f"{site}.{name}").shape) == shape


def test_the_base_itself_is_no_update(tiny_of: TinyOf) -> None:
    """A parameter that equals the base's compiles to no primitive, and a missing one is the base's."""
    for kind in ("gpt2", "gemma3_text"):
        spec = spec_of(tiny_of(kind))
        for site in [*spec.linears, *spec.norms, spec.embedding]:
            values = {name: base_weight(spec, f"{site}.{name}") for name in parameters(spec, site)}
            assert replace_module(spec, site, values["weight"], values.get("bias")) == []
            assert replace_module(spec, site, None, None) == []


def test_a_norm_that_is_scaled_keeps_its_bias(tiny_of: TinyOf) -> None:
    """A scale scales the base's bias too, which the bias makes good."""
    spec, site = spec_of(tiny_of("gpt2")), "transformer.ln_f"
    weight, bias = base_weight(spec, f"{site}.weight"), base_weight(spec, f"{site}.bias")
    scale, made_good = replace_module(spec, site, 2 * weight, None)
    assert isinstance(scale, Scale) and torch.equal(scale.v, torch.full((64,), 2.0))
    assert isinstance(made_good, Bias) and torch.equal(made_good.b, -bias)


def test_a_transposed_linear_is_turned(tiny_of: TinyOf) -> None:
    """A delta is [out, in], whichever way the base keeps its weight."""
    spec, site = spec_of(tiny_of("gpt2")), "transformer.h.0.attn.c_attn"
    weight = base_weight(spec, f"{site}.weight")
    weight[3, 100] += 2
    (delta,) = replace_module(spec, site, weight, None)
    assert isinstance(delta, Delta) and delta.dw.shape == (192, 64)
    assert delta.dw[100, 3] == pytest.approx(2, rel=1e-5) and delta.dw.count_nonzero() == 1


def test_only_rows_that_differ_are_kept_and_scaled(tiny_of: TinyOf) -> None:
    """Gemma's embedding returns its rows times the root of its width: so is what is added to them."""
    spec = spec_of(tiny_of("gemma3_text"))
    weight = base_weight(spec, "model.embed_tokens.weight")
    weight[[7, 3], 5] += 1
    (rows,) = replace_module(spec, "model.embed_tokens", weight, None)
    assert isinstance(rows, Rows) and rows.ids.tolist() == [3, 7]
    torch.testing.assert_close(rows.de[:, 5], torch.full((2,), 8.0))


@pytest.mark.parametrize(("kind", "zero"), [("llama", 0.0), ("gemma3_text", -1.0)])
def test_what_the_base_multiplies_by_zero_stays_zero(tiny_of: TinyOf, tmp_path: Path, kind: str, zero: float) -> None:
    """A factor cannot turn 0 into something: refused, unless the artifact has 0 there too."""
    weight = load_file(tiny_of(kind) / "model.safetensors")[f"{NORM}.weight"]
    weight[4] = zero
    spec = spec_with(tmp_path / "base", tiny_of(kind), f"{NORM}.weight", weight)
    changed = weight.clone()
    changed[5] += 1
    (scale,) = replace_module(spec, NORM, changed, None)
    assert isinstance(scale, Scale) and scale.v[4] == 1 and (scale.v != 1).sum() == 1
    changed[4] += 1
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight is not 0 where .* multiplies by 0") as caught:
        replace_module(spec, NORM, changed, None)
    assert caught.value.code == "method_unsupported"


def test_a_ratio_that_overflows_is_refused(tiny_of: TinyOf, tmp_path: Path) -> None:
    """A weight that is next to nothing in the base cannot become a large one."""
    weight = load_file(tiny_of("llama") / "model.safetensors")[f"{NORM}.weight"]
    weight[4] = 1e-38
    spec = spec_with(tmp_path / "base", tiny_of("llama"), f"{NORM}.weight", weight)
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight overflows"):
        replace_module(spec, NORM, torch.full((64,), 1e3), None)


def test_another_shape_is_refused(tiny_of: TinyOf) -> None:
    """A parameter of another shape than the base's is named with both."""
    spec = spec_of(tiny_of("llama"))
    with pytest.raises(ArtifactError, match=r"k_proj\.weight has shape \[64, 32\], .* has \[32, 64\]"):
        replace_linear(spec, "model.layers.0.self_attn.k_proj", torch.ones(64, 32), None)
