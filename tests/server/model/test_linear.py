"""The base's products: what they compute, and that a row's result does not depend on how many rows there are."""

from __future__ import annotations

import pytest
import torch

from server.model import linear
from server.model.attention import UnsupportedBaseError

SHAPES = [(576, 1536), (1536, 576), (576, 192), (64, 96), (33, 7)]  # (in, out), SmolLM2's and odd ones
ON_X86 = pytest.mark.skipif(not linear.has_fbgemm(), reason="FBGEMM is on x86 alone")
PACKERS = [linear.pack_onednn, pytest.param(linear.pack_fbgemm, marks=ON_X86)]


@pytest.mark.parametrize("pack", PACKERS)
@pytest.mark.parametrize(("size_in", "size_out"), SHAPES)
def test_packed_products_equal_torchs(pack: linear.Packer, size_in: int, size_out: int) -> None:
    """oneDNN in fp32 and FBGEMM with 16-bit weights compute W x + b, to their precision."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(size_out, size_in, generator=generator), torch.randn(size_out, generator=generator)
    weight = weight.half().float()  # exact in 16 bits, so that only the arithmetic is compared
    x = torch.randn(5, size_in, generator=generator)
    torch.testing.assert_close(pack(weight, bias)(x), linear.pack_torch(weight, bias)(x), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(("size_in", "size_out"), SHAPES)
def test_fp32_rows_are_bit_equal_in_any_batch(size_in: int, size_out: int) -> None:
    """In fp32 a row's result is the same to the last bit among 1 to 64 rows, at either end of the batch."""
    generator = torch.Generator().manual_seed(0)
    run = linear.pack_onednn(torch.randn(size_out, size_in, generator=generator), None)
    x = torch.randn(1, 64, size_in, generator=generator)
    full = run(x)
    for count in (1, 2, 3, 5, 8, 17, 33, 63):
        assert torch.equal(run(x[:, :count].contiguous()), full[:, :count])
        assert torch.equal(run(x[:, -count:].contiguous()), full[:, -count:])


def test_no_rows_are_fine() -> None:
    """A step in which nothing is sampled gives the head no rows."""
    assert linear.pack_onednn(torch.randn(1536, 576), None)(torch.empty(1, 0, 576)).shape == (1, 0, 1536)


def test_what_does_not_fit_16_bits_is_refused() -> None:
    """A weight beyond fp16's range refuses the base at start instead of becoming infinite."""
    weight = torch.ones(4, 4)
    weight[2, 1] = 70000.0
    with pytest.raises(UnsupportedBaseError, match=r"70000.*fp32"):
        linear.pack_fbgemm(weight, None)


def test_precisions_that_are_not_served_are_refused_by_name() -> None:
    """int8 and bf16 are not served on CPU, and say so; auto is the best that the machine has."""
    for precision in ("int8", "bf16"):
        with pytest.raises(UnsupportedBaseError, match=precision):
            linear.choose_precision(precision, "cpu")
    assert linear.choose_precision("auto", "cpu") == ("fp16" if linear.has_fbgemm() else "fp32")
    assert linear.choose_precision("auto", "cuda") == "bf16"
