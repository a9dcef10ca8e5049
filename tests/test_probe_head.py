"""kernels/probe_head.py: loss, hits and all gradients against float64, and its behaviour as an operator."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_as_accurate
from torch import Tensor

pytest.importorskip("triton")

from lsep_kernels import probe_head as kernel
from lsep_kernels import reference as ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":  # Triton's interpreter multiplies bf16 matrices wrongly
    DTYPES.append(torch.bfloat16)
SHAPES = [(3, 16, 5), (67, 77, 37), (5, 1152, 70)]
"""(B, D, K): tiny, odd with two tiles of rows, and the width of SiT-XL."""


def padded(x: Tensor) -> Tensor:
    """x with NaN behind its last entry in memory, as a leaf: a load without its mask would spread it."""
    behind = torch.full((4096,), torch.nan, dtype=x.dtype)
    return torch.cat([x.flatten(), behind]).to(DEVICE)[: x.numel()].view(x.shape).requires_grad_()


def inputs(b: int, d: int, k: int, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    """The five differentiable arguments, labels and weights of the samples."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(k, d, generator=g) * 2 * d**-0.5
    values = [torch.randn(b, d, generator=g) + 1, torch.rand(d, generator=g) + 0.5, torch.randn(d, generator=g)]
    values += [weight, torch.randn(k, generator=g)]
    labels = torch.randint(k, (b,), generator=g).to(DEVICE)
    return [padded(x) for x in values], labels, torch.rand(b, generator=g).to(DEVICE)


def truth(values: list[Tensor], labels: Tensor, sample_weight: Tensor, smoothing: float) -> Tensor:
    """The loss in float64."""
    x, norm_weight, norm_bias, weight, bias = (v.double() for v in values)
    logits = F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps=1e-5), weight, bias)
    return (sample_weight * F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)).sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "smoothing"), [(SHAPES[0], 0.0), *((shape, 0.1) for shape in SHAPES)], ids=str)
def test_loss_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype, smoothing: float) -> None:
    draws = []
    for seed in range(6 if shape == SHAPES[0] else 1):  # the largest error of a few numbers is luck: take more draws
        values, labels, sample_weight = inputs(*shape, seed)
        loss, hits = kernel.probe_head(*values, labels, sample_weight, smoothing, dtype)
        plain, plain_hits = ref.probe_head(*values, labels, sample_weight, smoothing, dtype)
        exact = truth(values, labels, sample_weight, smoothing)
        assert abs(loss - exact) <= max(torch.finfo(dtype).eps, 1e-6) * exact
        assert hits.dtype == plain_hits.dtype == torch.bool
        if dtype == torch.float32:
            assert torch.equal(hits, plain_hits)
        draws.append([torch.autograd.grad(1.7 * x, values) for x in (loss, plain, exact)])
    for i in range(5):
        got, expected, true = (torch.stack([draw[k][i] for draw in draws]) for k in range(3))
        assert_as_accurate(got, expected, true)


def test_many_classes_and_their_ties() -> None:
    """More classes than one program holds at a time; of equal logits the lowest class counts, in any block."""
    k = 2 * kernel.SOFTMAX_BLOCK + 100
    values, _, sample_weight = inputs(4, 16, k)
    best = [3, 5, 2 * kernel.SOFTMAX_BLOCK + 7, k - 1]
    with torch.no_grad():
        values[4][best] = 50.0
        values[3][best] = 0.0
    labels = torch.tensor(best, device=DEVICE)
    loss, hits = kernel.probe_head(*values, labels, sample_weight, 0.1)
    assert hits.tolist() == [True, False, False, False]
    exact = truth(values, labels, sample_weight, 0.1)
    assert_as_accurate(loss, ref.probe_head(*values, labels, sample_weight, 0.1)[0], exact)
    gradients = [torch.autograd.grad(x, values[3:]) for x in (loss, exact)]
    for got, true in zip(*gradients, strict=True):
        assert_as_accurate(got, true.float(), true)


def test_large_logits_stay_finite() -> None:
    values, labels, sample_weight = inputs(3, 16, 5)
    with torch.no_grad():
        values[3] *= 1e4
    loss, _ = kernel.probe_head(*values, labels, sample_weight, 0.0)
    exact = truth(values, labels, sample_weight, 0.0)
    assert abs(loss - exact) < 1e-6 * exact
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, values))


def test_evaluation_skips_gradients() -> None:
    values, labels, sample_weight = inputs(*SHAPES[0])
    loss, hits = kernel.probe_head(*values, labels, sample_weight, 0.1)
    with torch.no_grad():
        again = kernel.probe_head(*values, labels, sample_weight, 0.1)
    assert torch.equal(again[0], loss.detach()) and torch.equal(again[1], hits)
    assert loss.requires_grad and not again[0].requires_grad and not hits.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        kernel.probe_head(*(x.detach() for x in values), labels, sample_weight.requires_grad_(), 0.1)[0].backward()


def test_gradients_have_the_types_of_their_inputs() -> None:
    values, labels, sample_weight = inputs(*SHAPES[0])
    values[3] = values[3].detach().half().requires_grad_()
    loss, _ = kernel.probe_head(*values, labels, sample_weight, 0.0)
    assert [g.dtype for g in torch.autograd.grad(loss, values)] == [x.dtype for x in values]


def test_two_runs_are_equal_bit_for_bit() -> None:
    values, labels, sample_weight = inputs(*SHAPES[1])
    runs = []
    for _ in range(2):
        loss, hits = kernel.probe_head(*values, labels, sample_weight, 0.1, torch.float16)
        runs.append([loss, hits, *torch.autograd.grad(loss, values)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiled_equals_eager() -> None:
    values, labels, sample_weight = inputs(*SHAPES[0])

    def step(*values: Tensor) -> tuple[Tensor, Tensor]:
        loss, hits = kernel.probe_head(*values, labels, sample_weight, 0.1)
        return loss * 3, hits

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, hits = f(*values)
        results.append([loss, hits, *torch.autograd.grad(loss, values)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("gradients", [True, False])
def test_operator(gradients: bool) -> None:
    values, labels, sample_weight = inputs(*SHAPES[0])
    values = [x.detach().requires_grad_(gradients) for x in values]
    torch.library.opcheck(kernel._probe_head, (*values, labels, sample_weight, 0.1, torch.float32, gradients))


def test_shapes_are_checked() -> None:
    values, labels, sample_weight = inputs(*SHAPES[0])
    with pytest.raises(ValueError, match=r"labels is \(2,\), expected \(3,\)"):
        kernel.probe_head(*values, labels[:2], sample_weight, 0.1)
