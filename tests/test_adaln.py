"""LayerNorm + modulation, alone and behind gate + residual: values, gradients, graphs, repeatability."""

import pytest
import torch
from conftest import DEVICE, TYPES, assert_kernel_is_as_accurate, random, run

pytest.importorskip("triton")
from lsep_kernels import adaln, reference

SHAPES = [
    (2, 4, 16),  # tiny: one chunk of tokens
    (2, 37, 77),  # odd: tokens and width fit no block
    (1, 64, 1152),  # the width of XL, two chunks of tokens
]


def inputs(n: int, t: int, d: int) -> list[torch.Tensor]:
    return [3 * random(n, t, d), random(n, t, d, seed=1), random(n, 6 * d, seed=2)]


def gated(x: torch.Tensor, y: torch.Tensor, m: torch.Tensor, module: object = adaln) -> tuple[torch.Tensor, ...]:
    _, _, gate, shift, scale, _ = m.chunk(6, -1)  # views with a stride of six widths, as in the model
    return module.gate_residual_norm_modulate(x, gate, y, shift, scale)  # type: ignore[attr-defined]


def gated_reference(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return gated(*args, module=reference)


def plain(x: torch.Tensor, m: torch.Tensor, module: object = adaln) -> torch.Tensor:
    return module.norm_modulate(x, *m.chunk(6, -1)[:2])  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_residual_norm_modulate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_kernel_is_as_accurate(gated, gated_reference, inputs(*shape), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_modulate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, _, m = inputs(*shape)
    assert_kernel_is_as_accurate(plain, lambda x, m: plain(x, m, reference), [x, m], dtype)


def test_float32_stream_feeds_bfloat16_products() -> None:
    x, y, m = (a.to(DEVICE) for a in inputs(2, 4, 32))
    total, h = gated(x, y.bfloat16(), m.bfloat16())
    assert (total.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    true_total, true_h = gated_reference(x, y.bfloat16(), m.bfloat16())
    torch.testing.assert_close(total, true_total)
    torch.testing.assert_close(h, true_h)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="512 px: a minute in the interpreter")
def test_long_sequences() -> None:
    for d in (384, 768, 1024, 1152):
        assert_kernel_is_as_accurate(gated, gated_reference, inputs(2, 1024, d), torch.bfloat16)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter runs one program after the other")
def test_repeats_bit_for_bit() -> None:
    first, second = (run(gated, inputs(1, 40, 48), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators() -> None:
    x, y, m = (a.to(DEVICE).requires_grad_() for a in inputs(2, 4, 32))
    shift, scale, gate = m.chunk(6, -1)[:3]
    torch.library.opcheck(adaln._norm_modulate, (x, shift, scale, 1e-6, False))
    torch.library.opcheck(adaln._gate_residual_norm_modulate, (x, gate, y, shift, scale, 1e-6, False))
    with torch.no_grad():
        total, h, mean, rstd, *_ = adaln._gate_residual_norm_modulate(x, gate, y, shift, scale, 1e-6, False)
        torch.library.opcheck(adaln._norm_modulate_backward, (h, total, scale, mean, rstd))
        args = (total, h, total, gate, y, scale, mean, rstd)
        torch.library.opcheck(adaln._gate_residual_norm_modulate_backward, args)


def test_one_graph() -> None:
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(gated, fullgraph=True, backend=backend)
    expected, found = (run(f, inputs(2, 4, 32), torch.float32) for f in (gated, compiled))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_are_checked() -> None:
    x, y, m = inputs(2, 16, 32)
    with pytest.raises(ValueError, match=r"norm_modulate: shift is \(2, 31\), expected \(2, 32\)"):
        adaln.norm_modulate(x, m[:, :31], m[:, :32])
    with pytest.raises(ValueError, match=r"y is \(2, 15, 32\), expected \(2, 16, 32\)"):
        gated(x, y[:, :15], m)


def test_any_strides() -> None:
    x, y, m = (a.to(DEVICE) for a in inputs(2, 8, 32))
    turned = (a.transpose(0, -1).contiguous().transpose(0, -1) for a in (x, y, m))
    for a, b in zip(gated(*turned), gated(x, y, m), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone(used: int) -> None:
    """The other one's gradient is missing, not zero."""
    found, expected = (run(lambda *a, f=f: f(*a)[used], inputs(2, 8, 32), torch.float32)
                       for f in (gated, gated_reference))  # fmt: skip
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
