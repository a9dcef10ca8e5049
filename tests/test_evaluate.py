"""Every metric against another implementation of it, on random features and on cases done by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.neighbors import NearestNeighbors

from lsep.errors import UserError
from lsep.evaluate import neighbours
from lsep.evaluate.frechet import Gaussian, Moments, bootstrap, frechet_distance, interval
from lsep.evaluate.inception_score import inception_scores
from lsep.evaluate.kid import kernel_distance, squared_mmd
from lsep.evaluate.neighbours import precision_recall, squared_distances


def features(n: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Correlated float32 features whose mean is far from 0, as Inception's are."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    return (rng.normal(size=(n, width)) @ mix + 3 + shift * rng.uniform(size=width)).astype(np.float32)


def gaussian(x: np.ndarray) -> Gaussian:
    moments = Moments()
    for part in torch.from_numpy(x).split(37):
        moments.add(part)
    return moments.gaussian()


def scipy_fid(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real))


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance


def test_moments_in_parts_are_those_of_the_whole() -> None:
    x = features(500, 24, 0) + 1e4  # where a sum of squares minus a square would have lost most digits
    got = gaussian(x)
    assert np.abs(got.mean.numpy() / x.astype(np.float64).mean(0) - 1).max() < 1e-14
    truth = np.cov(x.astype(np.float64), rowvar=False)
    assert np.abs(got.cov.numpy() - truth).max() < 1e-11 * np.abs(truth).max()


@pytest.mark.parametrize("width", [1, 5, 64])
def test_frechet_distance_is_scipys(width: int) -> None:
    a, b = features(300, width, 1), features(200, width, 2, shift=0.5)
    truth = scipy_fid(a, b) if width > 1 else None
    got = frechet_distance(gaussian(a), gaussian(b))
    if truth is None:  # one dimension: (m1 - m2)^2 + (s1 - s2)^2
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        truth = float((a64.mean() - b64.mean()) ** 2 + (a64.std(ddof=1) - b64.std(ddof=1)) ** 2)
    assert got == pytest.approx(truth, rel=1e-9)
    assert frechet_distance(gaussian(b), gaussian(a)) == pytest.approx(got, rel=1e-9)


def singular_values_fid(x: np.ndarray, reference: Gaussian) -> float:
    """With the trace of the root as the sum of the singular values of (x - mean) S2^(1/2) / (n - 1)^(1/2).

    Exact where x has fewer rows than columns too, where roots of eigenvalues near 0 are not.
    """
    x = x.astype(np.float64)
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    cross = scipy.linalg.svdvals(centred @ scipy.linalg.sqrtm(reference.cov.numpy()).real).sum()
    apart = ((x.mean(0) - reference.mean.numpy()) ** 2).sum()
    return float(apart + (centred**2).sum() + np.trace(reference.cov.numpy()) - 2 * cross)


def test_fewer_samples_than_features() -> None:
    """The roots of eigenvalues that are 0 but for rounding add some 1e-8 each."""
    x, reference = features(20, 50, 3), gaussian(features(400, 50, 4))
    assert frechet_distance(gaussian(x), reference) == pytest.approx(singular_values_fid(x, reference), rel=1e-6)


def test_moments_of_one_row_are_refused() -> None:
    moments = Moments()
    moments.add(torch.ones(1, 3))
    with pytest.raises(UserError, match="1 images found, expected at least 2"):
        moments.gaussian()


@pytest.mark.parametrize("n", [30, 300])  # fewer rows than features, and more
def test_a_resample_is_the_distance_of_its_rows(n: int) -> None:
    x, reference = features(n, 40, 5), gaussian(features(400, 40, 6, shift=0.2))
    got = bootstrap(torch.from_numpy(x), reference, 4, seed=3)
    generator = torch.Generator().manual_seed(3)
    for value in got:
        drawn = torch.randint(n, (n,), generator=generator).numpy()
        assert float(value) == pytest.approx(singular_values_fid(x[drawn], reference), rel=1e-8)


def test_the_interval_covers_the_distance_of_other_samples() -> None:
    """Intervals of 70 sets hold the mean distance of such sets 66.5 times; less than 60 has probability 0.002."""
    width, n, sets = 6, 150, 70
    reference = gaussian(features(5000, width, 7, shift=0.6))
    distances, intervals = [], []
    for i in range(sets):
        x = features(n, width, 1000 + i)
        value = frechet_distance(gaussian(x), reference)
        distances.append(value)
        intervals.append(interval(value, bootstrap(torch.from_numpy(x), reference, 50, seed=i)))
    truth = np.mean(distances)
    held = sum(low <= truth <= high for low, high in intervals)
    assert held >= 60
    # and they are not merely wide: four standard deviations of the distances themselves, give or take
    assert np.mean([high - low for low, high in intervals]) == pytest.approx(4 * np.std(distances), rel=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# Precision and recall


def sklearn_precision_recall(a: np.ndarray, b: np.ndarray, k: int = 3) -> tuple[float, float]:
    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, k]
        near, index = NearestNeighbors(n_neighbors=len(centres)).fit(centres).kneighbors(points)
        return float((near <= radii[index]).any(1).mean())

    return share(a, b), share(b, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_recall_are_sklearns(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", 64)  # several blocks, the last ones cut
    monkeypatch.setattr(neighbours, "COLUMNS", 90)
    a, b = features(350, 8, 8).astype(np.float64), features(260, 8, 9, shift=1.0).astype(np.float64)
    truth = sklearn_precision_recall(a, b)
    assert min(truth) > 0.2 and max(truth) < 0.95
    assert precision_recall(torch.from_numpy(a).to(dtype), torch.from_numpy(b).to(dtype)) == pytest.approx(
        truth, abs=1e-12
    )


def test_a_point_on_a_ball_is_covered() -> None:
    """On a line, k = 3: the balls of 0, 1, 2, 3 have radii 3, 2, 2, 3, so 6 is covered, and 6.5 and -3.25 are not."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    samples = torch.tensor([[6.0], [6.5], [-3.25], [-3.0]])
    precision, recall = precision_recall(samples, reference)
    assert precision == 0.5
    # balls of the samples, radii 9.25, 9.75, 9.75, 9.5: all of the reference is near -3
    assert recall == 1.0


def test_copies_of_a_row_are_neighbours() -> None:
    """Three copies of a row beside it leave its ball a radius of 0, as in ADM's evaluator."""
    x = torch.tensor([[1.0, 2.0]] * 4 + [[5.0, 5.0]])
    assert neighbours.radii(x, 3, half=False).tolist() == [0, 0, 0, 0, 25.0]


def test_adm_distances_are_products_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (torch.from_numpy(features(n, 32, s)) for n, s in ((120, 10), (100, 11)))
    truth = torch.cdist(a.double(), b.double()).square()
    half, full = squared_distances(a, b, half=True), squared_distances(a, b, half=False)
    errors = [float((d.double() - truth).abs().max()) for d in (full, half)]
    assert errors[0] < 1e-3 < errors[1] < 2.0  # |a|^2 is about 300, where half has steps of 0.25
    large = a * 1000  # squares beyond half's 65504: float32 instead
    assert torch.equal(squared_distances(large, large, half=True), squared_distances(large, large, half=False))
    pairs = [precision_recall(a, b, d) for d in ("fp32", "adm-fp16")]
    assert pairs[0] == pytest.approx(pairs[1], abs=0.1)


def test_too_few_for_neighbours() -> None:
    with pytest.raises(UserError, match="3 images of the reference found, expected more than the 3 neighbours"):
        precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))


# ---------------------------------------------------------------------------------------------------------------------
# KID


def numpy_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.dot(b) / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kid_is_numpys_over_the_same_subsets() -> None:
    x, y = features(60, 7, 12).astype(np.float64), features(50, 7, 13, shift=0.3).astype(np.float64)
    assert float(squared_mmd(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(numpy_mmd(x, y), rel=1e-10)
    got = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subsets=3, size=20, seed=4)
    rng = np.random.default_rng(4)
    for value in got.tolist():
        truth = numpy_mmd(x[rng.choice(60, 20, replace=False)], y[rng.choice(50, 20, replace=False)])
        assert value == pytest.approx(truth, rel=1e-9)


def test_kid_of_one_distribution_is_zero_on_average() -> None:
    """Unbiased: the mean over many pairs of sets is within four of its standard errors of 0."""
    values = [
        float(squared_mmd(*(torch.from_numpy(features(30, 5, 2 * i + j)).double() for j in (0, 1)))) for i in range(200)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(200)
    assert float(kernel_distance(torch.randn(9, 3), torch.randn(5, 3), subsets=2, size=1000).shape[0]) == 2
    with pytest.raises(UserError, match="1 images found, expected at least 2 for KID"):
        kernel_distance(torch.randn(9, 3), torch.randn(1, 3))


# ---------------------------------------------------------------------------------------------------------------------
# Inception score


def test_inception_score_is_the_formula() -> None:
    logits = np.random.default_rng(14).normal(size=(230, 11)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = []
    for part in (p[:100], p[100:200], p[200:]):
        truth.append(np.exp(np.mean(np.sum(part * np.log(part / part.mean(0)), axis=1))))
    got = inception_scores(torch.from_numpy(logits), chunk=100)
    assert got.tolist() == pytest.approx(truth, rel=1e-12)


def test_inception_score_of_certain_and_even_classes() -> None:
    """Seven classes, each certain and as frequent: 7, though most probabilities are 0 in floating point."""
    logits = torch.eye(7).repeat(3, 1) * 2000
    assert inception_scores(logits).tolist() == pytest.approx([7.0], rel=1e-12)
    assert inception_scores(torch.zeros(10, 7)).tolist() == pytest.approx([1.0], rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# torch-fidelity, where it can be imported (it needs torchvision)


@pytest.fixture
def fidelity() -> Callable[[str], Any]:
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    import importlib

    return lambda name: importlib.import_module(f"torch_fidelity.{name}")


def test_torch_fidelity_agrees(fidelity: Callable[[str], Any]) -> None:
    a, b = (torch.from_numpy(features(n, 16, s, shift)) for n, s, shift in ((400, 15, 0.0), (300, 16, 0.4)))
    fid, kid, isc, prc = (fidelity(f"metric_{name}") for name in ("fid", "kid", "isc", "prc"))
    statistics = [fid.fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)
    ours = frechet_distance(gaussian(a.numpy()), gaussian(b.numpy()))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    few = a[:300]  # subsets of all rows, so that both draw the same
    theirs = kid.kid_features_to_metric(few.double(), b.double(), kid_subset_size=300, kid_subsets=1)
    kids = kernel_distance(few, b, subsets=1, size=300)
    assert float(kids[0]) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    theirs = isc.isc_features_to_metric(a, splits=4, shuffle=False)
    scores = inception_scores(a, chunk=100)
    assert float(scores.mean()) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    theirs = prc.prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=True)
    assert precision_recall(a, b) == pytest.approx(
        (theirs["precision"], theirs["recall"]), rel=1e-7
    )  # theirs is float32
