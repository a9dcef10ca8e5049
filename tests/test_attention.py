"""One-pass attention: values, gradients, graphs, and what it does not take."""

import pytest
import torch
from conftest import DEVICE, DOT_TYPES, assert_kernel_is_as_accurate, random, relative_error, run

pytest.importorskip("triton")
from lsep_kernels import attention, libraries, reference

SHAPES = [
    (2, 16, 2, 16),  # tiny: one block
    (1, 37, 3, 24),  # odd: tokens fit no block, head of 16 + 8
    (1, 200, 1, 72),  # two blocks of keys, the last in part
    (1, 256, 2, 72),  # XL/2: a full head of 64 + 8
    (2, 64, 1, 64),  # S, B and L at 64 tokens: no rest
]


@pytest.mark.parametrize("dtype", DOT_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    b, t, heads, head = shape
    qkv = random(b, t, 3 * heads * head)
    assert_kernel_is_as_accurate(
        lambda x: attention.attention(x, heads), lambda x: reference.attention(x, heads), [qkv], dtype
    )


def test_large_scores_do_not_overflow() -> None:
    """Scores of some 10^4, a softmax that is one-hot."""
    found, expected = (run(lambda x, f=f: f(x, 1), [40 * random(1, 32, 48)], DOT_TYPES[0])
                       for f in (attention.attention, reference.attention))  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of the padding
@pytest.mark.parametrize("tokens", [16, 37, 200])
def test_rows_of_far_negative_scores(tokens: int) -> None:
    """All scores of a row below 0, tokens that fill no block: exp2(-lse) of the padding overflows."""
    q, k, v = 8 + random(1, tokens, 16), -8 + random(1, tokens, 16, seed=1), random(1, tokens, 16, seed=2)
    found, expected = (run(lambda x, f=f: f(x, 1), [torch.cat([q, k, v], -1)], DOT_TYPES[0])
                       for f in (attention.attention, reference.attention))  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all() and relative_error(a, b) < 5e-3


def test_reference_is_the_librarys() -> None:
    found, expected = (run(lambda x, f=f: f(x, 2), [random(2, 20, 96)], torch.float32)
                       for f in (reference.attention, libraries.sdpa))  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter runs one program after the other")
def test_repeats_bit_for_bit() -> None:
    first, second = (run(lambda x: attention.attention(x, 1), [random(2, 100, 72)], DOT_TYPES[0]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators() -> None:
    qkv = random(1, 16, 48).to(DEVICE, DOT_TYPES[0]).requires_grad_()
    torch.library.opcheck(attention._attention, (qkv, 1))
    with torch.no_grad():
        out, lse = attention._attention(qkv, 1)
        torch.library.opcheck(attention._attention_backward, (out, qkv, out, lse, 1))


def test_one_graph() -> None:
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(attention.attention, fullgraph=True, backend=backend)
    expected, found = (
        run(lambda x, f=f: f(x, 2), [random(1, 16, 96)], DOT_TYPES[0]) for f in (attention.attention, compiled)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 257, 3 * 64), "257 tokens, expected at most 256"),
        ((1, 16, 3 * 20), "head_dim 20, expected a multiple of 8 from 16 to 80"),
        ((1, 16, 3 * 88), "head_dim 88"),
        ((1, 16, 50), "qkv has width 50, expected a multiple of 3 x 1 heads"),
    ],
)
def test_what_it_does_not_take(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention.attention(torch.zeros(shape), 1)
