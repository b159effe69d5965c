"""The base's products: what they compute, and that a row's result does not depend on how many rows there are."""

from __future__ import annotations

import pytest
import torch

from server.model.backends import choose
from server.model.backends.cpu import weights
from server.model.backends.reference import linear_reference
from server.model.errors import UnsupportedBaseError
from server.model.precision import has_halves

SHAPES = [(576, 1536), (1536, 576), (576, 192), (64, 96), (33, 7)]  # (in, out), SmolLM2's and odd ones


def exact(precision: str, size_out: int, size_in: int) -> torch.Tensor:
    """A weight that the precision holds exactly, so that only the arithmetic is compared."""
    generator = torch.Generator().manual_seed(0)
    if precision == "int8":
        weight = torch.randint(-126, 127, (size_out, size_in), generator=generator).float()
        weight[:, 0] = 127  # the scale of every output is 1/64
        return weight / 64
    weight = torch.randn(size_out, size_in, generator=generator)
    return weight.half().float() if precision == "fp16" else weight


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("precision", weights.PACKERS)
@pytest.mark.parametrize(("size_in", "size_out"), SHAPES)
def test_packed_products_equal_torchs(precision: str, size_in: int, size_out: int, has_bias: bool) -> None:
    """Whatever weights are kept in, the product is W x + b of what is kept, for few rows and many."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = exact(precision, size_out, size_in), torch.randn(size_out, generator=generator)
    run = weights.PACKERS[precision](weight, bias if has_bias else None)
    for num_rows in (1, 2, 3, 5, 101):
        x = torch.randn(num_rows, size_in, generator=generator)
        wanted = linear_reference(weight, bias if has_bias else None)(x)
        torch.testing.assert_close(run(x), wanted, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("precision", weights.PACKERS)
@pytest.mark.parametrize(("size_in", "size_out"), SHAPES)
def test_rows_are_bit_equal_in_any_batch(precision: str, size_in: int, size_out: int) -> None:
    """A row's result is the same to the last bit among 1 to 200 rows, at either end of them, in every precision."""
    generator = torch.Generator().manual_seed(0)
    run = weights.PACKERS[precision](torch.randn(size_out, size_in, generator=generator), None)
    x = torch.randn(1, 200, size_in, generator=generator)
    full = run(x)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 17, 33, 97, 199):
        assert torch.equal(run(x[:, :count].contiguous()), full[:, :count])
        assert torch.equal(run(x[:, -count:].contiguous()), full[:, -count:])


def test_no_rows_are_fine() -> None:
    """A step in which nothing is sampled gives the head no rows."""
    assert weights.pack_fp32(torch.randn(1536, 576), None)(torch.empty(1, 0, 576)).shape == (1, 0, 1536)


def test_what_does_not_fit_16_bits_is_refused() -> None:
    """A weight beyond fp16's range refuses the base at start instead of becoming infinite."""
    weight = torch.ones(4, 4)
    weight[2, 1] = 70000.0
    with pytest.raises(UnsupportedBaseError, match=r"70000.*fp32"):
        weights.rounded(weight, "fp16")


@pytest.mark.parametrize("precision", weights.PACKERS)
def test_what_is_kept_is_what_is_computed_with(precision: str) -> None:
    """`rounded` is the weight of the packed product, and rounding it again changes nothing."""
    weight = torch.randn(33, 40, generator=torch.Generator().manual_seed(0))
    dtypes = weights.rounded(weight, precision)
    torch.testing.assert_close(weights.PACKERS[precision](weight, None)(torch.eye(40)).T, dtypes, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(weights.rounded(dtypes, precision), dtypes, atol=1e-7, rtol=1e-6)


def test_int8_keeps_each_output_to_its_own_scale() -> None:
    """In 8 bits no weight is further off than half a step of its own output's scale; an output of zeros stays so."""
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 40)[:, None]
    weight[7] = 0
    got = weights.pack_int8(weight, None)(torch.eye(24)).T
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((got - weight).abs() <= 0.5001 * step).all() and not got[7].any()


def test_precisions_that_are_not_served_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is not served on CPU, nor int8 elsewhere, and they say so; auto is the best that the machine has."""
    for refused, device in (("bf16", "cpu"), ("int8", "cuda"), ("int4", "cpu")):
        with pytest.raises(UnsupportedBaseError, match=refused):
            choose.choose_precision(refused, device)
    assert choose.choose_precision("auto", "cpu") == ("fp16" if has_halves() else "fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose.choose_precision("auto", "cuda") == "bf16"
