"""Matrix products in fp8: rounding bit for bit, values and gradients, and a model that trains on them.

`torch._scaled_mm` runs on a CPU as well, so nothing here is a stand-in but Triton's interpreter.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, MANIFEST, lively, random, random_batch, relative_error, tiny
from torch import Tensor

pytest.importorskip("triton")
from lsep.checks import resolve
from lsep.objective import Objective
from lsep.plan import branch_plan
from lsep_kernels import adaln, fp8, reference
from lsep_kernels.ops import REFERENCE, Ops, in_fp8
from lsep_kernels.reference import Quantized

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # NaN and infinity, in numpy
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("no fp8 on this GPU", allow_module_level=True)

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows at a time: the interpreter's time goes by operations, not by elements."""
    if DEVICE.type == "cpu":
        for configuration, count in (
            (fp8.ROWS, 128), (fp8.GELU, 128), (fp8.GELU_BACKWARD, 128), (adaln.FORWARD, 16), (adaln.BACKWARD, 16)
        ):  # fmt: skip
            monkeypatch.setitem(configuration, "ROWS", count)
        monkeypatch.setattr(fp8, "TOKENS", 128)


def rows(m: int, d: int, seed: int = 0) -> Tensor:
    """Rows of very different size, the second one zero."""
    x = random(m, d, seed=seed) * random(m, 1, seed=seed + 1).exp()
    x[1] = 0
    return x.to(DEVICE, BF16)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Bit for bit, and of the same types."""
    return all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(found, expected, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rounding

SHAPES = [
    (2, 16),  # tiny
    (37, 80),  # odd: rows and width fill no block
    (3, 4608),  # the hidden width of XL
]


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch, few_programs: None) -> None:
    """More rows than a program takes, in more than one go."""
    monkeypatch.setattr(fp8, "TOKENS", 16)
    monkeypatch.setitem(fp8.ROWS, "ROWS", 4)
    monkeypatch.setitem(fp8.GELU_BACKWARD, "ROWS", 8)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_rounded_as_in_pytorch(shape: tuple[int, int]) -> None:
    x = rows(*shape)
    assert same(fp8.quantize_rows(x)[1:], reference.quantize_rows(x))
    *rounded, sums = fp8._rows_and_sums(x)
    assert same(tuple(rounded), reference.quantize_rows(x))
    torch.testing.assert_close(sums, x.float().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 80), (130, 16)])
def test_columns_are_rounded_as_in_pytorch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = random(*shape).to(DEVICE, dtype)
    w[:, 1] = 0
    assert same(fp8._columns(w), reference.quantize_rows(w.t()))


def test_relative_error_is_that_of_three_bits() -> None:
    x = rows(16, 64)
    found, scale = reference.quantize_rows(x)
    error = (found.double() * scale - x.double()).abs()
    assert (error <= 2**-4 * x.double().abs() + 2**-10 * scale).all()  # below 2^-6 of a scale steps are 2^-9 of it


@pytest.mark.usefixtures("chunks")
def test_gelu_and_its_gradient_are_rounded() -> None:
    z, da = rows(37, 80), rows(37, 80, seed=5)
    true = z.double().requires_grad_()
    reference.gelu(true).backward(da.double())
    assert true.grad is not None
    a, dz, rounded, sums = fp8._gelu_backward(da, z)
    for (found, scale), exact in ((fp8._gelu(z), reference.gelu(z.double())), (rounded, true.grad)):
        assert ((found.double() * scale - exact).abs() <= 1.01 * 2**-4 * exact.abs() + 2**-10 * scale).all()
        torch.testing.assert_close(scale[2:], exact[2:].abs().amax(1, keepdim=True).float() / 448, rtol=1e-4, atol=0)
    # the interpreter cuts bf16 off
    assert relative_error(a, reference.gelu(z.double())) < 2**-7 and relative_error(dz, true.grad) < 2**-7
    assert relative_error(sums, true.grad.sum(0)) < 1e-5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """In the row that holds it, and in no other: a bad step has to be seen."""
    x = rows(4, 32)
    x[2, 5] = bad
    good = torch.tensor([True, True, False, True], device=DEVICE)
    w, b = random(16, 32).to(DEVICE), random(16).to(DEVICE)
    assert fp8.quantize_rows(x).fp8.float().isfinite().all(1).tolist() == good.tolist()
    assert torch.equal(fp8.linear(x, w, b).isfinite().all(1), good)
    w2, b2 = random(32, 16).to(DEVICE), random(32).to(DEVICE)
    assert torch.equal(fp8.mlp(x, w, b, w2, b2).isfinite().all(1), good)
    y = rows(4, 32).requires_grad_()
    fp8.mlp(y, w, b, w2, b2).backward(x)
    assert y.grad is not None and torch.equal(y.grad.isfinite().all(1), good)
    w[3, 4] = bad
    assert not fp8._columns(w)[1][4].isfinite() or not fp8._columns(w)[0][4].float().isfinite().all()


@pytest.mark.parametrize("gated", [False, True])
def test_norms_hand_on_their_result_in_fp8(gated: bool) -> None:
    x, y = rows(2 * 37, 80).view(2, 37, 80), rows(2 * 37, 80, seed=3).view(2, 37, 80)
    gate, shift, scale = random(2, 240, seed=7).to(DEVICE, BF16).chunk(3, -1)
    parameters = [t.detach().requires_grad_() for t in (x, gate, y, shift, scale)]
    results = []
    for quantize in (False, True):
        for p in parameters:
            p.grad = None
        x, gate, y, shift, scale = parameters
        if gated:
            h = adaln.gate_residual_norm_modulate(x, gate, y, shift, scale, quantize=quantize)[1]
        else:
            h = adaln.norm_modulate(x, shift, scale, quantize=quantize)
        assert isinstance(h, Quantized) == quantize
        value = reference.plain(h)
        value.backward(torch.ones_like(value))
        results.append((value, *(p.grad for p in parameters if p.grad is not None)))
    assert same(*results)
    assert isinstance(h, Quantized) and same((h.fp8, h.scale), reference.quantize_rows(h.value))


# ---------------------------------------------------------------------------------------------------------------------
# Products


def dequantized(x: Tensor) -> Tensor:
    """x after rounding, in float64."""
    found, scale = reference.quantize_rows(x)
    return found.double() * scale


class Emulated(torch.autograd.Function):
    """`fp8.linear` in plain PyTorch: operands rounded, products in float64, results in bf16."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return (dequantized(x) @ dequantized(weight).t() + bias.double()).to(BF16)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        dx = (dequantized(dy) @ dequantized(weight.t()).t()).to(BF16)
        return dx, (dy.double().t() @ x.double()).to(weight.dtype), dy.double().sum(0).to(weight.dtype)


def emulated_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return Emulated.apply(reference.gelu(Emulated.apply(x, w1, b1)), w2, b2)


def results(function: Callable[..., Tensor], inputs: list[Tensor], double: bool = False) -> list[Tensor]:
    """The result and all gradients."""
    leaves = [(x.double() if double else x).detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(rows(*y.shape, seed=9).to(y))
    return [y.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("weights", [BF16, torch.float32])
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_values_and_gradients(name: str, weights: torch.dtype) -> None:
    """At most 1.5 times as far from float64 as the same rounding in plain PyTorch."""
    k, n, m = 80, 48, 37
    sizes = [(n, k), (n,)] if name == "linear" else [(4 * k, k), (4 * k,), (k, 4 * k), (k,)]
    inputs = [rows(m, k), *((random(*s, seed=i) * 0.3).to(DEVICE, weights) for i, s in enumerate(sizes))]
    found = results(getattr(fp8, name), inputs)
    theirs = results(Emulated.apply if name == "linear" else emulated_mlp, inputs)
    true = results(getattr(reference, name), inputs, double=True)
    assert len(found) == len(theirs) == len(true) == len(inputs) + 1
    for ours, plain, exact, leaf in zip(found, theirs, true, [found[0], *inputs], strict=True):
        assert ours.dtype == plain.dtype == leaf.dtype
        error, allowed = (float((x.double() - exact).norm() / exact.norm()) for x in (ours, plain))
        # bf16 once more: the interpreter cuts off, and a product of bf16 is summed in another order
        assert error <= 1.5 * allowed + 2**-8, f"off by {error:.3g}, the emulation by {allowed:.3g}"
        assert error < 0.2


def test_errors_are_within_those_of_the_format() -> None:
    x, w, b = rows(37, 80), random(48, 80).to(DEVICE), random(48).to(DEVICE)
    found, true = fp8.linear(x, w, b).double(), reference.linear(x.double(), w.double(), b.double())
    # 2^-4 of each factor, and of what is below 2^-6 of a scale at most 2^-10 of the scale
    x_error, w_error = (
        2**-4 * t.double().abs() + t.double().abs().amax(1, keepdim=True) / 448 * 2**-10 for t in (x, w)
    )
    limit = (x.double().abs() + x_error) @ (w.double().abs() + w_error).t() - x.double().abs() @ w.double().abs().t()
    assert ((found - true).abs() <= limit + 2**-8 * (true.abs() + limit + b.abs())).all()


def test_leading_dimensions_and_what_is_quantized_already() -> None:
    x, w, b = rows(12, 32), random(16, 32).to(DEVICE), random(16).to(DEVICE)
    flat = fp8.linear(x, w, b)
    assert torch.equal(fp8.linear(x.view(3, 4, 32), w, b), flat.view(3, 4, 16))
    assert torch.equal(fp8.linear(fp8.quantize_rows(x.view(3, 4, 32)), w, b), flat.view(3, 4, 16))
    turned = x.t().contiguous().t()
    assert torch.equal(fp8.linear(turned, w, b), flat)


def test_shapes_and_types_are_checked() -> None:
    x, w, b = rows(12, 32), random(16, 32).to(DEVICE), random(16).to(DEVICE)
    with pytest.raises(ValueError, match=r"linear: weight is \(16, 31\), expected \(16, 32\)"):
        fp8.linear(x, w[:, :31], b)
    with pytest.raises(ValueError, match=r"mlp: weight2 is \(32, 15\), expected \(32, 16\)"):
        fp8.mlp(x, w, b, random(32, 15).to(DEVICE), random(32).to(DEVICE))
    with pytest.raises(ValueError, match=r"x is torch.float32, expected torch.bfloat16"):
        fp8.linear(x.float(), w, b)


def test_operators() -> None:
    x, w, b = rows(4, 32).requires_grad_(), random(16, 32).to(DEVICE, BF16), random(16).to(DEVICE, BF16)
    w2, b2 = random(32, 16).to(DEVICE, BF16), random(32).to(DEVICE, BF16)
    _, x8, scale = (t.detach() for t in fp8.quantize_rows(x))
    utilities = ("test_faketensor", "test_autograd_registration")  # the others compute with fp8 themselves
    torch.library.opcheck(fp8._quantize_rows, (x.detach(),), test_utils=utilities)
    torch.library.opcheck(fp8._linear, (x, x8, scale, w, b), test_utils=utilities)
    torch.library.opcheck(fp8._mlp, (x, x8, scale, w, b, w2, b2), test_utils=utilities)
    dy = rows(4, 16)
    torch.library.opcheck(fp8._linear_backward, (dy, x.detach(), w))
    torch.library.opcheck(fp8._mlp_backward, (rows(4, 32), x.detach(), dy, w, w2))
    shift, gain = random(2, 32).to(DEVICE, BF16), random(2, 32).to(DEVICE, BF16)
    torch.library.opcheck(adaln._norm_modulate, (x.view(2, 2, 32), shift, gain, 1e-6, True), test_utils=utilities)
    gated = (x.view(2, 2, 32), gain, x.view(2, 2, 32), shift, gain, 1e-6, True)
    torch.library.opcheck(adaln._gate_residual_norm_modulate, gated, test_utils=utilities)


# ---------------------------------------------------------------------------------------------------------------------
# A model


def on_fp8() -> Ops:
    return in_fp8(REFERENCE if DEVICE.type == "cpu" else replace(REFERENCE, kernels="triton"))


def objective(ops: Ops, **changes: object) -> tuple[Objective, object]:
    config = resolve(tiny(model__depth=2, probe__depth=1, **changes), MANIFEST)
    return lively(Objective(config, MANIFEST, ops)).to(DEVICE), branch_plan(config)


def gradients(module: Objective, plan: object, compiled: bool = False) -> list[Tensor]:
    batch = type(b := random_batch(10))(*(part.to(DEVICE) for part in b.tensors()))
    step, epoch = (torch.tensor(i, device=DEVICE) for i in (3, 0))
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    forward = torch.compile(module, fullgraph=True, backend=backend) if compiled else module
    with torch.autocast(DEVICE.type, BF16):
        losses = forward(batch, plan, step, epoch)
    losses.total.backward()
    return [losses.total.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("weights", [BF16, torch.float32])
@pytest.mark.parametrize("pool_before_fc2", [True, False])
def test_gradients_of_the_model(pool_before_fc2: bool, weights: torch.dtype) -> None:
    """Beside those of bf16, over weights in bf16 and float32; every one has the type of its parameter."""
    found, expected = (
        gradients(*(lambda o, p: (o.to(weights), p))(*objective(ops, probe__pool_before_fc2=pool_before_fc2)))
        for ops in (on_fp8(), REFERENCE)
    )
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and float((a.double() - b.double()).norm() / b.double().norm()) < 0.3
    whole, reference_whole = (torch.cat([g.double().flatten() for g in part[1:]]) for part in (found, expected))
    assert torch.nn.functional.cosine_similarity(whole, reference_whole, dim=0) > 0.99


@pytest.mark.parametrize("policy", ["recompute-elementwise", "recompute-blocks"])
def test_what_is_computed_again_has_the_same_bits(policy: str) -> None:
    found, expected = (gradients(*objective(on_fp8(), train__memory=p)) for p in (policy, "keep"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_products_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under recompute-elementwise the backward computes no product of the forward again."""
    calls = {}
    product = fp8._product
    for policy in ("keep", "recompute-elementwise", "recompute-blocks"):
        counted: list[int] = []
        monkeypatch.setattr(fp8, "_product", lambda *a, seen=counted: (seen.append(1), product(*a))[1])
        gradients(*objective(on_fp8(), train__memory=policy))
        calls[policy] = len(counted)
    assert calls["keep"] == calls["recompute-elementwise"] < calls["recompute-blocks"]


@pytest.mark.parametrize("policy", ["keep", "recompute-elementwise"])
def test_one_graph(policy: str) -> None:
    torch._dynamo.reset()
    expected, found = (gradients(*objective(on_fp8(), train__memory=policy), compiled=c) for c in (False, True))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < (0.02 if DEVICE.type == "cpu" else 0.1)  # bf16 rounds elsewhere


def test_training_follows_float32() -> None:
    """Twenty steps of a small model: within 3 % of the losses in float32, and down as far."""
    curves = []
    for ops, autocast in ((on_fp8(), True), (REFERENCE, False)):
        config = resolve(tiny(model__depth=2, probe__depth=1), MANIFEST)
        module = Objective(config, MANIFEST, ops)
        module.initialize(0)
        module.to(DEVICE)
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, fused=True)
        batch = type(b := random_batch(10))(*(part.to(DEVICE) for part in b.tensors()))
        curve = []
        for _ in range(20):
            step = torch.tensor(0, device=DEVICE)
            with torch.autocast(DEVICE.type, BF16, enabled=autocast):
                loss = module(batch, branch_plan(config), step, step).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        curves.append(torch.tensor(curve))
    found, expected = curves
    assert ((found - expected).abs() < 0.03 * expected).all()
    assert expected[-1] < 0.9 * expected[0] and found[-1] < 0.9 * found[0]
