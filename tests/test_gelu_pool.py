"""Windowed pooling, plain and behind GELU."""

import pytest
import torch
from conftest import DEVICE, TYPES, assert_kernel_is_as_accurate, random, run

pytest.importorskip("triton")
from lsep_kernels import gelu_pool, reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy

SHAPES = [
    (2, 16, 16, (4, 4), 3),  # tiny
    (3, 35, 77, (5, 7), 4),  # odd: tokens and channels fit no block
    (1, 256, 1152, (16, 16), 13),  # real, a window in the grid
    (1, 1024, 130, (32, 32), 32),  # 512 px, the whole grid
]


def window(n: int, grid: tuple[int, int], size: int) -> torch.Tensor:
    """A window of each sample's own, the first in the far corner."""
    top, left = torch.arange(n) % 2, torch.zeros(n, dtype=torch.int64)
    top[0], left[0] = grid[0] - size, grid[1] - size
    return reference.window_weights(torch.tensor(size), top.clamp(max=grid[0] - size), left, grid).to(DEVICE)


@pytest.mark.parametrize("name", ["pool", "gelu_pool"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple, dtype: torch.dtype, name: str) -> None:
    n, t, d, grid, size = shape
    weights = window(n, grid, size)
    kernel, plain = getattr(gelu_pool, name), getattr(reference, name)
    assert_kernel_is_as_accurate(
        lambda x: kernel(x, weights), lambda x: plain(x, weights), [3 * random(n, t, d)], dtype
    )


@pytest.mark.parametrize("name", ["pool", "gelu_pool"])
def test_tokens_outside_the_window_are_not_read(name: str) -> None:
    weights = window(2, (4, 4), 2)
    x = random(2, 16, 8).to(DEVICE)
    x[weights == 0] = torch.nan
    x.requires_grad_()
    out = getattr(gelu_pool, name)(x, weights)
    out.sum().backward()
    assert out.isfinite().all() and x.grad is not None
    assert x.grad.isfinite().all() and not x.grad[weights == 0].any()


def test_gelu_saturates_without_overflow() -> None:
    x = torch.tensor([-1e4, -20.0, 20.0, 1e4]).view(1, 4, 1).expand(1, 4, 16)
    weights = torch.full((1, 4), 0.25, device=DEVICE)
    out, grad = run(lambda h: gelu_pool.gelu_pool(h, weights), [x], torch.float32)
    torch.testing.assert_close(out.cpu(), torch.full((1, 16), 0.25 * 10_020))
    true = run(lambda h: reference.gelu_pool(h, weights), [x], torch.float32)[1]
    torch.testing.assert_close(grad, true, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter runs one program after the other")
def test_repeats_bit_for_bit() -> None:
    weights = window(2, (10, 10), 8)
    first, second = (
        run(lambda x: gelu_pool.gelu_pool(x, weights), [random(2, 100, 40)], torch.float32) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators_and_one_graph() -> None:
    x, weights = random(2, 16, 16).to(DEVICE).requires_grad_(), window(2, (4, 4), 3)
    torch.library.opcheck(gelu_pool._pool, (x, weights, True))
    torch.library.opcheck(gelu_pool._pool_backward, (torch.ones(2, 16, device=DEVICE), x.detach(), weights, True))
    compiled = torch.compile(
        gelu_pool.gelu_pool, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager"
    )
    expected, found = (run(lambda h, f=f: f(h, weights), [x.detach()], torch.float32)
                       for f in (gelu_pool.gelu_pool, compiled))  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"pool: weights is \(2, 15\), expected \(2, 16\)"):
        gelu_pool.pool(torch.zeros(2, 16, 8), torch.zeros(2, 15))
