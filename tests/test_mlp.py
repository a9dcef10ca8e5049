"""The MLP that computes GELU again: values, gradients, what it keeps, and cuBLASLt's calls without a GPU."""

import pytest
import torch
from conftest import DEVICE, DOT_TYPES, TYPES, assert_as_accurate, assert_kernel_is_as_accurate, random, run

pytest.importorskip("triton")
from lsep_kernels import cublaslt, mlp, reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy

SHAPES = [
    ((2, 8), 16, 64),  # tiny
    ((3, 100), 24, 200),  # odd: rows and channels fit no block, two partial sums
    ((1, 32), 1152, 4608),  # real widths
]


def inputs(shape: tuple[int, ...], width: int, hidden: int) -> list[torch.Tensor]:
    return [
        random(*shape, width, seed=1), random(hidden, width, seed=2) / width**0.5, random(hidden, seed=3),
        random(width, hidden, seed=4) / hidden**0.5, random(width, seed=5),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)  # its products are torch's
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple, dtype: torch.dtype) -> None:
    assert_kernel_is_as_accurate(mlp.mlp, reference.mlp, inputs(*shape), dtype)
