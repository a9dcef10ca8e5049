"""kernels/draws.py: the reference's numbers, bit for bit where they are uniform, and behaviour as operators."""

import pytest
import torch
from conftest import DEVICE, relative_error
from torch import Tensor

pytest.importorskip("triton")
from lsep_kernels import draws
from lsep_kernels import reference as ref

SEEDS = [0, 1, 2**32 - 1, 2**63 - 1, 2**63 + 12345, 2**64 - 1]


def ids(count: int) -> Tensor:
    """Sample ids up to 2^48."""
    out = torch.randint(2**48, (count,), generator=torch.Generator().manual_seed(count))
    out[0] = 2**48 - 1
    return out.to(DEVICE)


def number(value: int) -> Tensor:
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform(seed: int) -> None:
    for count, stream, epoch in [(1, 0, 0), (5, 2, 2**33 + 5), (300, 13, 2**32 - 1)]:
        expected = ref.uniform(seed, stream, number(epoch), ids(count))
        for given in (epoch, number(epoch)):
            got = draws.uniform(seed, stream, given, ids(count))
            assert got.dtype == torch.float32 and torch.equal(got, expected)
        assert got[:, 0].is_contiguous()


@pytest.mark.parametrize("shape", [(1,), (7,), (4, 32, 32)], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_normal(seed: int, shape: tuple[int, ...]) -> None:
    got, expected = (f(seed, 2, number(2**33 + 5), ids(3), shape) for f in (draws.normal, ref.normal))
    assert got.shape == (3, *shape) and relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("count", "grid", "sides"),
    [
        (33, 16, (12, 16)),  # XL/2
        (4, 16, (1, 16)),
        (6, 16, (5, 5)),
        (3, 4, (2, 4)),
        (5, 5, (1, 3)),  # tokens that fill no block
        (2, 32, (24, 32)),
    ],
)
def test_windows(seed: int, count: int, grid: int, sides: tuple[int, int]) -> None:
    """Every weight bit for bit, and every side is met."""
    seen = set()
    for step in (*range(12), 2**40):
        given = (seed, (5, 4), number(step), number(2**33 + step), ids(count), sides, grid)
        got, expected = draws.windows(*given), ref.windows(*given)
        assert got.shape == (count, grid * grid) and torch.equal(got, expected)
        seen |= set((got > 0).sum(1).tolist())
    assert {side * side for side in sides} >= seen if sides[0] == sides[1] else len(seen) > 1


def test_a_sample_keeps_its_numbers_anywhere_in_any_batch() -> None:
    for function in (
        lambda i: draws.uniform(7, 2, number(3), i),
        lambda i: draws.normal(7, 2, number(3), i, (5,)),
        lambda i: draws.windows(7, (5, 4), number(9), number(3), i, (2, 6), 8),
    ):
        whole = function(ids(9))
        for chosen in ([3, 0], [8]):
            assert torch.equal(function(ids(9)[chosen]), whole[chosen])


def test_compiled_equals_eager() -> None:
    def step(i: Tensor, at: Tensor, epoch: Tensor) -> tuple[Tensor, ...]:
        seed = 2**64 - 1
        return (
            draws.uniform(seed, 2, epoch, i)[:, 0],
            draws.normal(seed, 2, epoch, i, (1,)),
            draws.windows(seed, (5, 4), at, epoch, i, (12, 16), 16),
        )

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    given = (ids(5), number(3), number(4))
    assert all(torch.equal(a, b) for a, b in zip(step(*given), compiled(*given), strict=True))


def test_operators() -> None:
    torch.library.opcheck(draws._uniform, (ids(3), number(1), -1, 2))
    torch.library.opcheck(draws._normal, (ids(3), number(1), -1, 2, 5))
    torch.library.opcheck(draws._windows, (ids(3), number(1), number(2), -1, 5, 4, 2, 4, 4))


def test_types_and_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"uniform: ids is torch.int32, expected torch.int64"):
        draws.uniform(0, 0, 0, ids(3).int())
    with pytest.raises(ValueError, match=r"normal: ids is \(3,\), epoch \(3,\), expected \(B,\) and a scalar"):
        draws.normal(0, 0, ids(3), ids(3), (1,))
    with pytest.raises(ValueError, match=r"windows: step is torch.float32, expected torch.int64"):
        draws.windows(0, (0, 1), torch.zeros(()), number(0), ids(3), (1, 2), 4)
