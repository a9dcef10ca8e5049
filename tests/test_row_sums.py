"""kernels/row_sums.py against float64, for one round of sums and for two."""

import pytest
import torch
from conftest import DEVICE, assert_as_accurate, random

pytest.importorskip("triton")
from lsep_kernels.row_sums import LIMIT, ROWS, sum_rows

SHAPES = [
    (1, 1, 1),
    (5, 8, 72),  # adaLN: the chunks of 256 tokens
    (2, 32, 300),
    (3, 33, 1),
    (1, 464, 96),  # the MLP's bias: XL/2 with a second pass of 0.8
    (2, LIMIT + 1, 20),  # from here on two rounds
    (1, 3 * ROWS * LIMIT + 5, 2),  # three
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape).to(DEVICE)
    got, truth = sum_rows(x, dtype), x.double().sum(1)
    if dtype == torch.float32:
        assert_as_accurate(got, x.sum(1), truth)
    else:  # rounded once, which Triton's interpreter does by cutting off
        assert got.dtype == dtype and ((got - truth).abs() <= 2.0**-7 * truth.abs() + 1e-5).all()


def test_order_is_fixed() -> None:
    """Twice the same bits, and no row twice or left out: sums of whole numbers are exact."""
    x = random(2, 700, 40).to(DEVICE)
    assert torch.equal(sum_rows(x), sum_rows(x))
    whole = (8 * x).round()
    assert torch.equal(sum_rows(whole), whole.sum(1))
    half = whole.to(torch.bfloat16)
    assert torch.equal(sum_rows(half), half.float().sum(1))
