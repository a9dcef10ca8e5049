"""`lsep probe` on data of known separability, its parts against other implementations, its errors."""

import io
import json
import math
import re
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from test_cli import call
from torch import Tensor

from lsep.checks import resolve
from lsep.config import Config, ProbeConfig
from lsep.data.store import Store
from lsep.data.writer import write_store
from lsep.errors import UserError
from lsep.interpolant import Stream
from lsep.run import Run
from lsep.separability import encoder, features, linear, similarity
from lsep.separability.measure import Figures, Settings, Subject, measure
from lsep.train import train

# ---------------------------------------------------------------------------------------------------------------------
# The classifier


def mixture(n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four overlapping classes in twelve features, of scales from 1e-3 to 1e3 far from zero; one does not vary."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=g)
    means = torch.randn(4, 12, generator=g)
    x = means[y] + torch.randn(n, 12, generator=g) @ torch.randn(12, 12, generator=g) * 0.5
    x = x * torch.logspace(-3, 3, 12) + torch.logspace(-2, 3, 12)
    x[:, 5] = 7.3
    return x, y


def scikit_learn(l2: float) -> tuple[Tensor, float]:
    """Probabilities and loss of `mixture` at scikit-learn's optimum on standardised features, in float64."""
    from sklearn.linear_model import LogisticRegression

    x, y = mixture()
    z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0).clamp(min=1e-9)
    z[:, 5] = 0
    theirs = LogisticRegression(C=1 / (l2 * len(y)), tol=1e-12, max_iter=10_000).fit(z.numpy(), y.numpy())
    p = torch.from_numpy(theirs.predict_proba(z.numpy()))
    return p, loss(p, y, torch.from_numpy(theirs.coef_), l2)


def loss(p: Tensor, y: Tensor, weight: Tensor, l2: float) -> float:
    """Of probabilities `(N, classes)` and weights on standardised features."""
    return float(l2 / 2 * (weight**2).sum() - p[torch.arange(len(y)), y].log().mean())


def probabilities(probe: linear.Linear, x: Tensor) -> Tensor:
    return torch.softmax(torch.nn.functional.linear(x.double(), probe.weight.double(), probe.bias.double()), 1)


@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_optimum_is_that_of_scikit_learn(l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = mixture()
    truth, best = scikit_learn(l2)
    ours = linear.fit(x, y, 4, l2)
    assert ours.converged and (ours.predict(x) == truth.argmax(1)).float().mean() > 0.995
    weight = ours.weight.double() * x.double().std(0, correction=0)
    assert -1e-9 < loss(probabilities(ours, x), y, weight, l2) - best < 1e-6  # float32 tells no smaller losses apart
    monkeypatch.setattr(linear, "TOLERANCE", 1e-10)
    monkeypatch.setattr(linear, "MOST_ITERATIONS", 2000)
    exact = linear.fit(x.double(), y, 4, l2)
    assert (probabilities(exact, x) - truth).abs().max() < 2e-6  # scikit-learn's two solvers are 6e-7 apart


def test_the_best_of_several_l2_is_taken() -> None:
    """Few examples of many features ask for a large one, many of few for none."""
    g = torch.Generator().manual_seed(0)
    for width, rows, best in ((96, 600, 1e-1), (4, 4000, 1e-4)):
        y = torch.randint(10, (rows,), generator=g)
        x = torch.randn(10, width, generator=g)[y] * 3 / width**0.5 + torch.randn(rows, width, generator=g)
        held = torch.arange(rows) % 5 == 0
        right = {v: (linear.fit(x[~held], y[~held], 10, v).predict(x[held]) == y[held]).sum() for v in (1e-4, 1e-1)}
        assert max(right, key=lambda v: int(right[v])) == best
        found = linear.fit_best(x, y, held, 10, (1e-4, 1e-1))
        assert found.l2 == best and torch.equal(found.weight, linear.fit(x, y, 10, best).weight)


def test_a_search_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MOST_ITERATIONS", 1)
    assert not linear.fit(*mixture(), 4, 1e-4).converged


def test_a_class_without_examples_is_no_obstacle() -> None:
    x, y = mixture()
    probe = linear.fit(x[y < 3], y[y < 3], 4, 1e-4)
    assert probe.converged and set(probe.predict(x).tolist()) <= {0, 1, 2}


# ---------------------------------------------------------------------------------------------------------------------
# Similarity against formulas on whole matrices


def test_linear_cka_is_normalised_hsic_of_centred_kernels() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=g) + 5
    y = torch.cat([x[:, :3], torch.randn(30, 5, generator=g)], 1)
    h = torch.eye(30, dtype=torch.float64) - 1 / 30
    k_x, k_y = (h @ (a.double() @ a.double().T) @ h for a in (x, y))
    assert similarity.linear_cka(x, y) == pytest.approx(float((k_x * k_y).sum() / (k_x.norm() * k_y.norm())), abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=g)).Q
    assert similarity.linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-6)


def dense_cknna(x: Tensor, y: Tensor, k: int) -> float:
    """Entry by entry, as the formulas are written."""
    n = len(x)
    kernels = []
    for a in (x, y):
        a = a.double() / a.double().norm(dim=1, keepdim=True)
        kernels.append((a @ a.T).numpy())

    def near(kernel: np.ndarray, i: int) -> set[int]:
        return set(sorted((j for j in range(n) if j != i), key=lambda j: -kernel[i, j])[:k])

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        restricted = np.zeros((2, n, n))
        for i in range(n):
            for j in near(a, i) & near(b, i):
                restricted[:, i, j] = a[i, j], b[i, j]
        one, (ka, kb) = np.ones(n), restricted
        total = (one @ ka @ one) * (one @ kb @ one) / ((n - 1) * (n - 2))
        return (np.trace(ka @ kb) + total - 2 / (n - 2) * (one @ ka @ kb @ one)) / (n * (n - 3))

    a, b = kernels
    return hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))


@pytest.mark.parametrize("k", [3, 10])
def test_cknna_is_its_formula(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK", 16)  # several blocks, the last one smaller
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 5, generator=g)
    close, far = x + 0.3 * torch.randn(40, 5, generator=g), torch.randn(40, 7, generator=g)
    own = similarity.neighbours(x, k)
    for other in (close, far):
        assert similarity.cknna(own, similarity.neighbours(other, k)) == pytest.approx(
            dense_cknna(x, other, k), abs=1e-9
        )
    assert similarity.cknna(own, own) == pytest.approx(1)
    assert similarity.cknna(own, similarity.neighbours(close, k)) > 2 * similarity.cknna(
        own, similarity.neighbours(far, k)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Encoders


def test_an_encoder_of_latents_gets_the_means_as_stored(store: Path, tmp_path: Path) -> None:
    (tmp_path / "latents.py").write_text(
        "def flat(x):\n    assert x.dtype == 'float32' and x.shape[1:] == (3, 8, 8)\n    return x.reshape(len(x), -1)\n"
        "flat.latents = True\n"
    )
    source, ids = Store(store), np.array([40, 3, 17])
    found = encoder.from_function(f"{tmp_path / 'latents.py'}:flat", source, torch.device("cpu"), 2)(ids)
    np.testing.assert_array_equal(found.numpy(), source.read(ids).x[:, :3].reshape(3, -1))


def test_a_header_that_promises_more_than_the_file_holds(store: Path, tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (43, 10**12)})
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + b"1234")
    with pytest.raises(UserError, match=r"arr_0 of \(43, 1000000000000\) float32 does not fit its 4 bytes"):
        encoder.from_file(tmp_path / "f.npz", Store(store), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Gaussian data under a model that hands on its patches: Bayes rates in closed form

SHIFT, SIGMA, T = 0.15, 0.5, 0.5
ROWS = 3000


class Patches:
    """At depth 1 the patches of x_t as tokens, at depth 2 the same with the label, where there is one, added."""

    null_class = 2

    def features(self, x: Tensor, t: Tensor, y: Tensor, depths: Sequence[int]) -> list[Tensor]:
        tokens = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
        label = torch.where(y == self.null_class, 0, y - 0.5)[:, None, None]
        return [tokens if depth == 1 else tokens + 10 * label for depth in depths]


def gaussians(folder: Path, corner: bool = False, permuted: bool = False, seed: int = 0) -> Store:
    """Two classes whose latents are +-SHIFT in every pixel, or in one corner, and noise; stored at twice their size."""
    rng = np.random.default_rng(seed)
    y = np.arange(ROWS) % 2
    mean = np.full((3, 8, 8), SHIFT)
    if corner:
        mean[:, 4:], mean[:, :, 4:] = 0, 0
    x = (2 * y - 1)[:, None, None, None] * mean + SIGMA * rng.normal(size=(ROWS, 3, 8, 8))
    x, y = (x / 0.5).astype(np.float32), rng.permutation(y) if permuted else y
    write_store(folder, kind="samples", x=x, y=y, num_classes=2, scale=0.5)
    return Store(folder)


def gaussian_config(store: Store) -> Config:
    return resolve(tiny(model__hidden_size=12, probe__window_min=3, probe__window_max=3), store.manifest)


SETTINGS = Settings((1, 2), (T,), num=ROWS, seeds=2, tokens=20_000, l2=(1e-4,), batch_size=500)


def figures(store: Store, settings: Settings = SETTINGS, test: Store | None = None) -> Figures:
    return measure(Subject("test", Patches(), gaussian_config(store), store, test, torch.device("cpu")), settings)


def bayes(pixels: int) -> float:
    """Share that the best classifier of a mean over `pixels` gets right: the classes differ along one direction."""
    deviation = math.sqrt(((1 - T) * SIGMA) ** 2 + T**2)
    return 0.5 * (1 + math.erf((1 - T) * SHIFT * math.sqrt(pixels) / deviation / math.sqrt(2)))


def standard_error(p: float, n: int) -> float:
    return math.sqrt(p * (1 - p) / n)


def test_accuracy_is_the_bayes_rate(tmp_path: Path) -> None:
    """Tokens hold 12 pixels, windows 9 of 16 tokens. 2,000 images leave a classifier less than 0.01 from the best."""
    found = figures(gaussians(tmp_path / "store"))
    assert found.rows == (2000, 1000) and found.tokens == 20_000 and found.not_converged == 0
    assert found.chance == pytest.approx(0.5, abs=0.03)
    rates = {"pooled": (bayes(192), 2000), "windowed": (bayes(108), 2000), "token": (bayes(12), 32_000)}
    assert len({round(rate, 1) for rate, _ in rates.values()}) == 3  # they can be told apart
    for kind, (rate, tests) in rates.items():
        for depth in (0, 1):  # without a label the second depth is the first
            accuracy = found.accuracy[kind][:, depth, 0].mean()
            assert accuracy == pytest.approx(rate, abs=4 * standard_error(rate, tests) + 0.01), kind
    assert found.accuracy["pooled"].shape == (2, 2, 1)
    assert found.token_map.shape == (2, 1, 4, 4)
    assert found.token_map.mean((1, 2, 3)) == pytest.approx(found.accuracy["token"].mean((0, 2)))
    assert abs(found.token_map - bayes(12)).max() < 5 * standard_error(bayes(12), 2000) + 0.01
    # The control adds the label at the second depth and not at the first.
    control = found.accuracy["control"]
    assert (
        control.shape == (1, 2, 1) and control[0, 1, 0] == 1 and control[0, 0, 0] == found.accuracy["pooled"][0, 0, 0]
    )


def test_permuted_labels_give_chance_but_in_the_control(tmp_path: Path) -> None:
    found = figures(gaussians(tmp_path / "store", permuted=True))
    for kind, tests in (("pooled", 2000), ("windowed", 2000), ("token", 2000)):  # tokens of an image share their label
        assert abs(found.accuracy[kind].mean(0) - 0.5).max() < 4 * standard_error(0.5, tests), kind
    assert found.accuracy["control"][0, 1, 0] == 1


def test_the_map_shows_where_the_signal_is(tmp_path: Path) -> None:
    found = figures(gaussians(tmp_path / "store", corner=True))
    signal, rest = found.token_map[0, 0, :2, :2], np.delete(found.token_map[0, 0].flatten(), [0, 1, 4, 5])
    assert abs(signal - bayes(12)).max() < 5 * standard_error(bayes(12), 2000) + 0.01
    assert abs(rest - 0.5).max() < 5 * standard_error(0.5, 2000)


def test_figures_are_a_function_of_the_seed(tmp_path: Path) -> None:
    store = gaussians(tmp_path / "store")
    few = replace(SETTINGS, num=300, tokens=1000)
    a, b = figures(store, few), figures(store, replace(few, batch_size=7))
    for kind in a.accuracy:
        np.testing.assert_allclose(a.accuracy[kind], b.accuracy[kind], atol=0.011)  # rounding may turn one image
    assert a.tokens == 1000 and (a.accuracy["token"][0] != a.accuracy["token"][1]).all()
    chosen = figures(store, replace(few, l2=(1e-4, 1e5)))  # the second leaves no weights
    assert (chosen.l2["token"] == 1e-4).all() and (chosen.accuracy["pooled"] == a.accuracy["pooled"]).all()
    again = figures(store, few)
    assert all((a.accuracy[kind] == again.accuracy[kind]).all() for kind in a.accuracy)


def test_other_data_tests_other_rows(tmp_path: Path) -> None:
    """Trained on one set and tested on another whose labels are at random: chance."""
    store, other = gaussians(tmp_path / "a"), gaussians(tmp_path / "b", permuted=True, seed=1)
    found = figures(store, test=other)
    assert found.rows == (2000, 1000)
    assert abs(found.accuracy["pooled"].mean(0) - 0.5).max() < 4 * standard_error(0.5, 2000)
    assert found.accuracy["control"][0, 1, 0] == 1


def test_weights_that_have_diverged_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = gaussians(tmp_path / "store")
    monkeypatch.setattr(
        Patches, "features", lambda self, x, t, y, depths: [x.new_full((len(x), 16, 12), torch.nan)] * 2
    )
    with pytest.raises(UserError, match="test: features are not finite"):
        figures(store, replace(SETTINGS, num=90))


# ---------------------------------------------------------------------------------------------------------------------
# Draws


def test_split_is_a_function_of_the_seed_and_covers_all(tmp_path: Path) -> None:
    store = gaussians(tmp_path / "store")
    parts = features.split(store, 10**6, 0)
    assert sorted([*parts[0].ids, *parts[1].ids]) == list(range(ROWS)) and len(parts[1].ids) == ROWS // 3
    again, other, few = features.split(store, 10**6, 0), features.split(store, 10**6, 1), features.split(store, 90, 0)
    assert (again[1].ids == parts[1].ids).all() and (other[1].ids != parts[1].ids).any()
    assert [len(part.ids) for part in few] == [60, 30] and not set(few[0].ids) & set(few[1].ids)
    apart = features.split(store, 90, 0, store)[1]
    assert len(apart.ids) == 30 and set(apart.ids) != set(few[1].ids) and apart.number == 1


def test_windows_have_the_sides_of_training(tmp_path: Path) -> None:
    part = features.split(gaussians(tmp_path / "store"), 3000, 0)[0]
    ids = torch.from_numpy(part.ids)
    window = features.draw_windows(ProbeConfig(window_min=2, window_max=4), 5, 0, part, ids)
    torch.testing.assert_close(window.sum(1), torch.ones(len(ids)))
    sides = (window > 0).sum(1).float().sqrt()
    assert [float((sides == side).float().mean()) for side in (2, 3, 4)] == pytest.approx([1 / 3] * 3, abs=0.05)
    assert (window > 0).float().mean(0).min() > 0.05  # every place is seen
    whole = features.draw_windows(ProbeConfig(window_min=12), 4, 0, part, ids)  # a run without the LSEP term
    torch.testing.assert_close(whole, torch.full_like(whole, 1 / 16))


def test_tokens_are_chosen_evenly_and_exactly(tmp_path: Path) -> None:
    part = features.split(gaussians(tmp_path / "store"), 3000, 0)[0]
    chosen = features.choose_tokens(part, 5000, 16, 0)
    assert chosen.shape == (2000, 16) and int(chosen.sum()) == 5000
    assert abs(chosen.float().mean(0) - 5000 / 32_000).max() < 5 * standard_error(5000 / 32_000, 2000)
    assert features.choose_tokens(part, 10**9, 16, 0).all()


def test_streams_keep_their_numbers() -> None:
    names = "POSTERIOR NOISE TIME LABEL_DROP CROP WINDOW SAMPLE SDE"
    assert [Stream[name].value for name in names.split()] == list(range(8))


# ---------------------------------------------------------------------------------------------------------------------
# The command on trained runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Of the digits: a run with LSEP, an unconditional one of fewer blocks without; and one of other data."""
    folder = tmp_path_factory.mktemp("separability")
    rng = np.random.default_rng(0)
    write_store(folder / "store", kind="samples", x=rng.normal(size=(43, 1, 8, 8)).astype(np.float32),
                y=rng.integers(5, size=43), num_classes=5)  # fmt: skip
    quick = {"probe__window_min": 2, "train__steps": 2, "sample__steps": 1, "sample__num": 1}
    plain = {"probe__enabled": False, "model__conditional": False, "model__depth": 2}
    return {
        "lsep": train(tiny(data__path="digits", **quick), folder / "lsep"),
        "plain": train(tiny(data__path="digits", **quick, **plain), folder / "plain"),
        "latents": train(tiny(data__path=str(folder / "store"), **quick), folder / "latents"),
    }


QUICK = ["--num", "90", "--seeds", "2", "--times", "0.2", "0.8", "--tokens", "200"]


def probe(
    capsys: pytest.CaptureFixture[str], runs: Sequence[Run], out: Path | None, *flags: str
) -> tuple[int, str, str]:
    place = [] if out is None else ["--out", str(out)]
    return call(capsys, "probe", *(str(run.path) for run in runs), *QUICK, *place, *flags)


def test_page_of_one_run(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = probe(capsys, [runs["lsep"]], None)
    assert code == 0, err
    folder = runs["lsep"].path / "probe"
    assert out.endswith(f"page: {folder / 'probe.html'}\n")
    assert re.search(r"^  depth 3 +[\d.]+ ±[\d.]+ +[\d.]+ ±[\d.]+$", out, re.MULTILINE)
    assert "step 2, 60 images (200 tokens) train and 30 test, seeds: 2" in out
    assert "the denoiser has seen the testing images in training" in out
    assert {p.name for p in folder.iterdir()} == {
        "probe.json", "probe.html", "accuracy.png", "curves-pooled.png", "curves-windowed.png", "curves-token.png",
        "tokens.png",
    }  # fmt: skip
    page = (folder / "probe.html").read_text()
    outside = [u for u in re.findall(r'(?:src|href)="([^"]+)"', page) if not u.startswith(("data:", "#"))]
    assert page.count("<svg") == 5 and not outside
    (values,) = json.loads((folder / "probe.json").read_text())["runs"]
    assert values["depths"] == [1, 2, 3] and values["test_images_seen_in_training"]
    assert np.shape(values["accuracy"]["token"]) == (2, 3, 2) and np.shape(values["token_map"]) == (3, 2, 4, 4)
    assert np.shape(values["accuracy"]["control"]) == (1, 3, 2)


def test_runs_side_by_side_with_an_encoder(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unconditional run has no control, and one of fewer blocks fewer rows on the same axes."""
    (tmp_path / "encoder.py").write_text(
        "def mean(images, device):\n    assert images.dtype == 'uint8' and images.shape[1:] == (8, 8, 1)\n"
        "    return images.reshape(len(images), -1).astype('float64')\n"
    )
    pair, function = [runs["lsep"], runs["plain"]], f"{tmp_path / 'encoder.py'}:mean"
    copy = str(shutil.copytree(runs["lsep"].manifest().source, tmp_path / "copy"))
    code, out, err = probe(capsys, pair, tmp_path / "both", "--encoder", function, "--json", "--test-data", copy)
    assert code == 0, err
    first, second = json.loads(out)["runs"]
    assert out == (tmp_path / "both" / "probe.json").read_text()
    assert "control" in first["accuracy"] and "control" not in second["accuracy"]
    assert (first["depths"], second["depths"], second["lsep_depth"]) == ([1, 2, 3], [1, 2], None)
    assert not first["test_images_seen_in_training"]
    assert np.shape(first["cka"]) == (2, 3, 2) and np.shape(second["cknna"]) == (2, 2, 2)
    assert 0 < np.min(first["cka"]) < np.max(first["cka"]) < 1
    assert np.mean(np.array(first["cka"])[:, :, 0]) > np.mean(np.array(first["cka"])[:, :, 1])  # noise hides the image
    page = (tmp_path / "both" / "probe.html").read_text()
    assert "<th>lsep<td>" in page and "<th>plain<td>" in page and (tmp_path / "both" / "alike.png").exists()
    # The same features from a file give the same figures.
    without_figures(monkeypatch)
    images = Store(copy).read(np.arange(1797)).x
    np.savez(tmp_path / "features.npz", images.reshape(1797, -1).astype(np.float32))
    flags = ("--encoder-features", str(tmp_path / "features.npz"), "--json", "--test-data", copy)
    code, out, err = probe(capsys, [runs["lsep"]], tmp_path / "file", *flags)
    assert code == 0, err
    assert json.loads(out)["runs"][0]["cknna"] == first["cknna"]


def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time here."""
    monkeypatch.setattr("lsep.separability.page.write", lambda measured, out: [out / "probe.html"])


def test_data_that_has_moved(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_figures(monkeypatch)
    store = Path(runs["latents"].manifest().source)
    store.rename(tmp_path / "elsewhere")
    try:
        code, _, err = probe(capsys, [runs["latents"]], tmp_path / "out")
        assert code == 2 and "its data is not at" in err and err.count("\n") == 1
        code, out, _ = probe(capsys, [runs["latents"]], tmp_path / "out", "--data", str(tmp_path / "elsewhere"))
        assert code == 0 and "train and 14 test" in out
    finally:
        (tmp_path / "elsewhere").rename(store)


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        (["lsep"], ["--depths", "2", "4"], "--depths holds 4, but .* has 3 blocks, expected from 1 to 3"),
        (["lsep", "plain"], ["--depths", "3"], "--depths holds 3, but .*plain has 2 blocks"),
        (["lsep"], ["--times", "0.5", "1.5"], r"--times is \(0.5, 1.5\), expected numbers from 0 to 1"),
        (["lsep"], ["--times", "nan"], "--times is .*, expected numbers from 0 to 1"),
        (["lsep"], ["--depths", "1", "1"], "--depths is .*, expected each value once"),
        (["lsep"], ["--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["lsep"], ["--num", "3"], "--num is 3, expected at least 36"),
        (["lsep"], ["--l2", "0"], r"--l2 is \(0.0,\), expected numbers above 0"),
        (["lsep"], ["--memory", "1e-5"], "--memory is 1e-05 GB, but the features of .* take 0.000146: expected"),
        (["lsep"], ["--checkpoint", "9"], "no checkpoint of step 9, found: 2"),
        (["lsep"], ["--data", "nowhere"], "--data: nowhere: no manifest.json there"),
        (["lsep"], ["--test-data", "STORE"], "--test-data .*: other data than the run's .kind 'pixels' and 'samples'"),
        (["lsep"], ["--test-data", "digits"], "--test-data digits is what the run was trained on"),
        (["lsep"], ["--data", "STORE"], "is not the data of .*kind 'pixels' and 'samples'"),
        (["lsep", "latents"], [], "have different data .kind 'pixels' and 'samples'"),
        (["lsep"], ["--encoder", "numpy"], "--encoder is 'numpy', expected MODULE:FUNCTION"),
        (["lsep"], ["--encoder", "numpy:nothing"], "numpy has no function 'nothing'"),
        (["lsep"], ["--encoder", "no.such:thing"], "--encoder: no.such cannot be imported"),
        (["lsep"], ["--encoder", "nowhere.py:thing"], "--encoder: nowhere.py does not exist, expected a Python"),
        (["lsep"], ["--encoder", "builtins:len"], "features are of type int, expected a tensor"),
        (["lsep"], ["--encoder", "numpy:ravel"], r"features of 30 images have shape \(1920,\), expected \(30, E\)"),
        (["latents"], ["--encoder", "numpy:ravel"], "takes images, but .* holds latents: expected --encoder-features"),
        (["lsep"], ["--encoder", "a:b", "--encoder-features", "c"], "expected no --encoder-features beside it"),
        (["lsep"], ["--encoder-features", "gone.npz"], "gone.npz: cannot be read as .npz"),
        (["lsep"], ["--encoder-features", "short.npz"], r"short.npz: arr_0 has shape \(5, 2\), expected \(1797, E\)"),
        (["lsep"], ["--encoder-features", "named.npz"], "named.npz: no array arr_0"),
        (["lsep"], ["--encoder-features", "nan.npz"], "nan.npz: features hold values that are not finite"),
        (["lsep"], ["--out", "short.npz"], "--out short.npz: cannot be a folder"),
    ],
)  # fmt: skip
def test_bad_input(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    names: list[str], flags: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    np.savez("short.npz", np.zeros((5, 2)))
    np.savez("named.npz", features=np.zeros((1797, 2)))
    np.savez("nan.npz", np.full((1797, 2), np.nan))
    flags = [runs["latents"].manifest().source if flag == "STORE" else flag for flag in flags]
    out = None if "--out" in flags else tmp_path / "out"
    code, _, err = probe(capsys, [runs[name] for name in names], out, *flags)
    sentences = [line for line in err.splitlines() if line.startswith("lsep: error: ")]
    assert code == 2 and len(sentences) == 1 and re.search(message, sentences[0]), err
    assert not list(tmp_path.rglob("probe.*"))


def test_runs_must_be_named_and_several_need_a_folder(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected RUN first, then flags" in call(capsys, "probe", "--seeds", "1")[2]
    assert "nowhere: not a run directory" in call(capsys, "probe", "nowhere")[2]
    code, _, err = probe(capsys, [runs["lsep"], runs["plain"]], None)
    assert code == 2 and err == "lsep: error: --out is missing, expected a folder for the page of 2 runs\n"
