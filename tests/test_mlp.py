"""The MLP that computes GELU again in its backward: values, gradients, types, and what it keeps."""

import pytest
import torch
from conftest import DEVICE, TYPES, assert_kernel_is_as_accurate, random, relative_error, run

pytest.importorskip("triton")
from lsep_kernels import mlp, reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy

SHAPES = [
    ((2, 8), 16, 64),  # tiny
    ((3, 100), 24, 200),  # odd: rows and channels fit no block, and rows more than one partial sum
    ((1, 32), 1152, 4608),  # the widths of XL
]


def inputs(shape: tuple[int, ...], width: int, hidden: int) -> list[torch.Tensor]:
    return [
        random(*shape, width, seed=1), random(hidden, width, seed=2) / width**0.5, random(hidden, seed=3),
        random(width, hidden, seed=4) / hidden**0.5, random(width, seed=5),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)  # the products are torch's: the interpreter is right in all three
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple, dtype: torch.dtype) -> None:
    assert_kernel_is_as_accurate(mlp.mlp, reference.mlp, inputs(*shape), dtype)


def test_rows_may_lie_in_any_order() -> None:
    x, *weights = inputs((4, 6), 16, 64)
    x, y = (x.transpose(0, 1).to(DEVICE).requires_grad_(), x.transpose(0, 1).contiguous().to(DEVICE).requires_grad_())
    weights = [w.to(DEVICE) for w in weights]
    for a in (x, y):
        mlp.mlp(a, *weights).transpose(0, 1).square().sum().backward()  # a gradient that is not dense either
    assert x.grad is not None and torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("copies", [True, False])
def test_the_type_of_x_rules(copies: bool) -> None:
    """Under autocast, over float32 weights or copies in bf16: PyTorch's result, and gradients in each one's type."""
    x, *weights = (t.to(DEVICE) for t in inputs((2, 8), 16, 64))
    kind = torch.bfloat16 if copies else torch.float32
    found = []
    for by in (mlp.mlp, reference.mlp):
        leaves = [x.to(torch.bfloat16, copy=True).requires_grad_()]
        leaves += [w.to(kind, copy=True).requires_grad_() for w in weights]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = by(*leaves)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and relative_error(ours, theirs) < 0.03
    wide = mlp.mlp(*(t.to(DEVICE) for t in inputs((2, 8), 16, 64)))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        again = mlp.mlp(*(t.to(DEVICE) for t in inputs((2, 8), 16, 64)))
    assert wide.dtype == torch.float32 and torch.equal(wide, again)


def test_one_hidden_activation_is_kept() -> None:
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    leaves = [t.to(DEVICE).requires_grad_() for t in inputs((2, 40), 16, 64)]
    found = []
    for by in (mlp.mlp, reference.mlp):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            by(*leaves)
        found.append(kept.count(2 * 40 * 64))
    assert found == [1, 2]


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter runs one program after the other")
def test_repeats_bit_for_bit() -> None:
    first, second = (run(mlp.mlp, inputs((8, 256), 64, 256), torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators_and_one_graph() -> None:
    x, w1, b1, w2, b2 = (t.to(DEVICE).requires_grad_() for t in inputs((10,), 16, 64))
    torch.library.opcheck(mlp._mlp, (x, w1, b1, w2, b2))
    dy, z = random(10, 16).to(DEVICE), random(10, 64).to(DEVICE)
    torch.library.opcheck(mlp._mlp_backward, (dy, x.detach(), z, w1.detach(), w2.detach()))
    compiled = torch.compile(mlp.mlp, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    expected, found = (run(f, inputs((2, 10), 16, 64), torch.float32) for f in (mlp.mlp, compiled))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, (3, 15)), r"mlp: x is \(3, 15\), expected \(3, 16\)"),
        ((2, (63,)), r"mlp: bias1 is \(63,\), expected \(64,\)"),
        ((3, (16, 63)), r"mlp: weight2 is \(16, 63\), expected \(16, 64\)"),
        ((4, (1,)), r"mlp: bias2 is \(1,\), expected \(16,\)"),
    ],
)
def test_shapes_are_checked(change: tuple, message: str) -> None:
    tensors = inputs((3,), 16, 64)
    tensors[change[0]] = torch.zeros(change[1])
    with pytest.raises(ValueError, match=message):
        mlp.mlp(*tensors)
