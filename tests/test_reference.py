"""kernels/reference.py against formulas written out another way."""

import math
import shutil
from functools import partial
from itertools import product

import pytest
import torch
from conftest import relative_error

from lsep_kernels import reference as ref


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor(v) for v in values]


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    # Known answers of Philox-4x32-10 from the Random123 distribution (kat_vectors).
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0_A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key: int, counter: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert tuple(int(w) for w in ref.philox(key, *words(*counter))) == expected


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("count", [1, 3])
def test_compiled_random_numbers_are_the_same(count: int) -> None:
    """One element runs as plain C++, several as vectors: no word may rest on what int64 does beyond its range."""
    compiled = torch.compile(partial(ref.uniform, 5, 1), fullgraph=True, dynamic=False)
    epochs, ids = torch.tensor([0, 1, 2**32 - 1]), torch.arange(count)
    for epoch in epochs:
        assert torch.equal(compiled(epoch, ids), ref.uniform(5, 1, epoch, ids))


def test_random_numbers_depend_on_their_key_only() -> None:
    ids = torch.tensor([7, 3, 2**40 + 1, 9])
    whole = ref.normal(5, 1, 2, ids, (3, 5))
    assert torch.equal(whole[2:3], ref.normal(5, 1, torch.tensor(2), ids[2:3], (3, 5)))
    assert torch.equal(whole.flatten(1)[:, :7], ref.normal(5, 1, 2, ids, (7,)))
    for other in (ref.normal(6, 1, 2, ids, (3, 5)), ref.normal(5, 2, 2, ids, (3, 5)), ref.normal(5, 1, 3, ids, (3, 5))):
        assert not (whole == other).any()
    assert len({tuple(row.tolist()) for row in whole.flatten(1)}) == 4  # high bits of an id count


def test_normal_and_uniform_have_their_moments() -> None:
    ids = torch.arange(20_000)
    z, u = ref.normal(0, 0, 0, ids, (8,)).double(), ref.uniform(0, 0, 0, ids).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert (torch.corrcoef(z.T) - torch.eye(8)).abs().max() < 5 / math.sqrt(len(ids))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.numel())


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_velocity_is_the_derivative_of_the_path(kind: str) -> None:
    x, e = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    x_t, v = ref.mix(x, t, e, kind)
    h = 1e-6
    numeric = (ref.mix(x, t + h, e, kind)[0] - ref.mix(x, t - h, e, kind)[0]) / (2 * h)
    assert relative_error(v, numeric) < 1e-8
    zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert torch.allclose(ref.mix(x, zero, e, kind)[0], x)
    assert torch.allclose(ref.mix(x, one, e, kind)[0], e)
    assert x_t.shape == v.shape == x.shape


def test_path_refuses_other_names() -> None:
    with pytest.raises(ValueError, match="'linear', 'cosine' or 'vp'"):
        ref.path(torch.zeros(1), "straight")


def test_norm_modulate_and_gate() -> None:
    x, shift, scale, gate = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    truth = (x - mean) / torch.sqrt(var + 1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert relative_error(ref.norm_modulate(x, shift, scale), truth) < 1e-6
    assert relative_error(ref.gate_residual(x, gate, truth), x + gate[:, None] * truth) < 1e-6
    assert ref.norm_modulate(x, shift.bfloat16(), scale.bfloat16()).dtype == torch.bfloat16  # ready for a matmul


def test_attention_is_softmax() -> None:
    qkv = torch.randn(2, 6, 3 * 8, dtype=torch.float64)
    q, k, v = (part.view(2, 6, 2, 4).transpose(1, 2) for part in qkv.split(8, dim=-1))
    scores = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1)  # sqrt(head_dim) = 2
    assert relative_error(ref.attention(qkv, 2), (scores @ v).transpose(1, 2).reshape(2, 6, 8)) < 1e-12


def test_window_is_the_mean_over_its_tokens() -> None:
    x = torch.randn(3, 20, 6)  # a 4 x 5 grid
    top, left = torch.tensor([0, 1, 2]), torch.tensor([3, 0, 2])
    weights = ref.window_weights(torch.tensor(2), top, left, (4, 5))
    truth = torch.stack(
        [x[i].view(4, 5, 6)[a : a + 2, b : b + 2].mean((0, 1)) for i, (a, b) in enumerate([(0, 3), (1, 0), (2, 2)])]
    )
    assert relative_error(ref.pool(x, weights), truth) < 1e-6
    assert torch.equal(weights.sum(1), torch.ones(3))
    gelu = torch.nn.GELU("tanh")
    assert relative_error(ref.gelu_pool(x, weights), ref.pool(gelu(x), weights)) < 1e-6


def test_pool_stays_in_float32_under_autocast() -> None:
    x, weights = torch.randn(2, 16, 8).bfloat16(), torch.rand(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = ref.pool(x, weights)
    assert got.dtype == torch.float32
    assert relative_error(got, torch.einsum("bt,btd->bd", weights.double(), x.double())) < 1e-6


def test_cross_entropy_smoothing() -> None:
    logits, labels = torch.randn(4, 7), torch.tensor([0, 3, 6, 1])
    log_p = torch.log_softmax(logits.double(), -1)
    truth = -(0.8 * log_p[range(4), labels] + 0.2 * log_p.mean(-1))
    assert relative_error(ref.probe_cross_entropy(logits, labels, 0.2), truth) < 1e-6


def test_velocity_loss_is_the_mean_of_each_sample() -> None:
    patches, v = torch.randn(3, 4, 2 * 2 * 2), torch.randn(3, 2, 4, 4)  # 2 x 2 patches of side 2, two channels
    image = torch.empty(3, 2, 4, 4)
    for token, row, column, channel in product(range(4), range(2), range(2), range(2)):
        entry = patches[:, token, (row * 2 + column) * 2 + channel]
        image[:, channel, token // 2 * 2 + row, token % 2 * 2 + column] = entry
    assert torch.equal(ref.unpatchify(patches, 2), image)
    truth = torch.stack([((image[i] - v[i]) ** 2).mean() for i in range(3)])
    assert relative_error(ref.velocity_loss(patches, v, 2), truth) < 1e-6


def test_sample_moments() -> None:
    moments, eps = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.allclose(ref.sample_moments(moments, eps), moments[:, :3] + moments[:, 3:] * eps)
