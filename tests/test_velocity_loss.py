"""kernels/velocity_loss.py: values and gradients against float64, and its behaviour as an operator."""

import pytest
import torch
from conftest import assert_as_accurate
from torch import Tensor

pytest.importorskip("triton")

from lsep_kernels import reference as ref
from lsep_kernels import velocity_loss as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 2, 2), (3, 3, 3, 5), (2, 16, 2, 4), (2, 4, 16, 3)]
"""(N, grid, patch, C): tiny, odd, the latents of SiT-XL/2, and more than one chunk of pixels."""


def inputs(n: int, grid: int, patch: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Patches as a leaf, the target and upstream gradients."""
    g = torch.Generator().manual_seed(0)
    patches = torch.randn(n, grid * grid, patch * patch * channels, generator=g)
    v = torch.randn(n, channels, grid * patch, grid * patch, generator=g)
    return patches.to(DEVICE, dtype).requires_grad_(), v.to(DEVICE), torch.rand(n, generator=g).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    patches, v, upstream = inputs(*shape, dtype)
    exact_patches = patches.detach().double().requires_grad_()
    exact = (ref.unpatchify(exact_patches, shape[2]) - v.double()).square().flatten(1).mean(1)
    got, plain = kernel.velocity_loss(patches, v, shape[2]), ref.velocity_loss(patches, v, shape[2])
    assert_as_accurate(got, plain, exact)
    (true,) = torch.autograd.grad(exact, exact_patches, upstream.double())
    gradients = [torch.autograd.grad(x, patches, upstream)[0] for x in (got, plain)]
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # Triton's interpreter cuts digits off where a GPU rounds
        assert ((gradients[0] - true).abs() <= torch.finfo(dtype).eps * true.abs() + 1e-12).all()
    else:
        assert_as_accurate(*gradients, true)


def test_two_runs_are_equal_bit_for_bit() -> None:
    patches, v, upstream = inputs(*SHAPES[3], torch.bfloat16)
    runs = []
    for _ in range(2):
        loss = kernel.velocity_loss(patches, v, 16)
        runs.append([loss, *torch.autograd.grad(loss, patches, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiled_equals_eager() -> None:
    patches, v, upstream = inputs(*SHAPES[1], torch.bfloat16)

    def step(patches: Tensor, v: Tensor) -> Tensor:
        return (kernel.velocity_loss(patches * 2, v, 3) * upstream).sum()

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = f(patches, v)
        results.append([loss, *torch.autograd.grad(loss, patches)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_any_memory_order() -> None:
    patches, v, upstream = inputs(*SHAPES[1], torch.float32)
    expected = kernel.velocity_loss(patches, v, 3)
    turned = patches.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    got = kernel.velocity_loss(turned, v.to(memory_format=torch.channels_last), 3)
    assert torch.equal(got, expected)
    (gradient,) = torch.autograd.grad(got.sum(), turned)  # an expanded upstream gradient
    assert torch.equal(gradient, torch.autograd.grad(expected, patches, torch.ones_like(upstream))[0])


def test_operators() -> None:
    patches, v, upstream = inputs(*SHAPES[1], torch.float32)
    torch.library.opcheck(kernel._velocity_loss, (patches, v, 3))
    torch.library.opcheck(kernel._velocity_loss_backward, (upstream, patches.detach(), v, 3))


def test_shapes_are_checked() -> None:
    patches, v, _ = inputs(*SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match="patches is"):
        kernel.velocity_loss(patches, v, 2)
    with pytest.raises(ValueError, match="9 x 6"):
        kernel.velocity_loss(patches, v[..., :6], 3)
