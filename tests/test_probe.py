"""Windows, time weights and the decay of the LSEP term."""

import pytest
import torch
from conftest import tiny

from lsep import probe
from lsep.presets import PRESETS


def windows(step: int, ids: torch.Tensor, low: int = 2, high: int = 4, grid: int = 4) -> torch.Tensor:
    config = tiny(probe__window_min=low, probe__window_max=high).probe
    return probe.draw_windows(config, grid, 0, torch.tensor(step), torch.tensor(0), ids)


def test_one_side_a_batch_and_a_place_a_sample() -> None:
    ids = torch.arange(400)
    sides = []
    for step in range(60):
        inside = windows(step, ids) > 0
        side = inside.sum(1).double().sqrt()
        assert (side == side[0]).all()
        sides.append(int(side[0]))
        square = inside.view(-1, 4, 4)
        rows, columns = square.any(2), square.any(1)
        assert (rows.sum(1) == sides[-1]).all() and (columns.sum(1) == sides[-1]).all()
        places = (5 - sides[-1]) ** 2
        assert len({tuple(w.flatten().tolist()) for w in square}) == places  # every place occurs
    assert {sides.count(s) > 8 for s in (2, 3, 4)} == {True}  # 20 expected each, standard deviation 3.7


def test_full_grid_is_the_plain_mean() -> None:
    assert torch.equal(windows(0, torch.arange(3), 4, 4), torch.full((3, 16), 1 / 16))


def test_place_is_the_samples_own() -> None:
    a = windows(5, torch.arange(100), 3, 3)
    assert torch.equal(a[17:19], windows(5, torch.tensor([17, 18]), 3, 3))


def test_paper_weights() -> None:
    config = PRESETS["sit-xl-2-256"].probe
    t = torch.tensor([0.0, 0.05, 0.1001, 0.55, 0.95, 1.0])
    expected = [0.0225 + 0.0075 * k / 9 for k in (0, 0, 1, 5, 9, 9)]
    assert probe.time_weights(config, t).tolist() == pytest.approx(expected)


def test_constant_weight() -> None:
    for bins in (1, 10):
        config = tiny(probe__weight_start=0.02, probe__weight_end=0.02, probe__weight_bins=bins).probe
        assert probe.time_weights(config, torch.rand(50)).tolist() == pytest.approx([0.02] * 50)


def test_epoch_factor_of_the_long_runs() -> None:
    config = PRESETS["sit-xl-2-256"].probe
    factors = [float(probe.epoch_factor(config, torch.tensor(e))) for e in (0, 100, 500, 900)]
    assert factors == pytest.approx([1, 1, 0.1**0.5, 0.1])
    never = tiny(probe__decay_start_epoch=None).probe
    assert float(probe.epoch_factor(never, torch.tensor(10_000))) == 1


def test_classifier_has_the_published_keys() -> None:
    classifier = probe.build_classifier(8, 5)
    assert {k: tuple(v.shape) for k, v in classifier.state_dict().items()} == {
        "0.weight": (8,), "0.bias": (8,), "1.weight": (5, 8), "1.bias": (5,),
    }  # fmt: skip
