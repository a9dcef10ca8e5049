"""`lsep probe`: its classifier against scikit-learn's, known separability, likeness by formula, and the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import lively, tiny

from lsep.cli import main
from lsep.config import Config
from lsep.data.loader import open_source
from lsep.data.writer import write_store
from lsep.model import SiT
from lsep.objective import Objective
from lsep.run import Run
from lsep.sample import load_ema
from lsep.separability.features import extract
from lsep.separability.linear import PENALTY, LinearProbe
from lsep.separability.measure import Settings, measure
from lsep.separability.similarity import cka, cknna
from lsep.train import train

CLASSES = 4


def write(folder: Path, seed: int, means: float = 1.0, shuffled: bool = False) -> Path:
    """Images whose class is a constant added to noise: separable, or, shuffled, not at all."""
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=240)
    pattern = np.random.default_rng(0).normal(size=(CLASSES, 3, 8, 8)) * means
    x = 127 + 40 * (pattern[y] + rng.normal(size=(240, 3, 8, 8)))
    labels = rng.permutation(y) if shuffled else y
    write_store(folder, kind="pixels", x=x.clip(0, 255).astype(np.uint8), y=labels, num_classes=CLASSES)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("separable")
    return train(settings(write(folder / "store", 0)), folder / "run")


def settings(store: Path) -> Config:
    return tiny(data__path=str(store), train__steps=4, sample__num=2, sample__steps=1)


def measured(run: Run, store: Path, model: SiT | None = None) -> dict[str, np.ndarray]:
    averaged, config, manifest, step = load_ema(run)
    chosen = Settings(times=(0.05, 0.95), depths=(1, 3), seeds=2)
    source = open_source(settings(store).data)
    return measure("x", model or averaged, config, manifest, step, source, None, chosen).accuracy


def test_the_probe_is_at_sklearns_optimum() -> None:
    from sklearn.linear_model import LogisticRegression

    g = torch.Generator().manual_seed(0)
    y = torch.randint(3, (150,), generator=g)
    x = torch.randn(150, 6, generator=g).double() + torch.randn(3, 6, generator=g).double()[y]
    probe = LinearProbe(x, y, 3)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    theirs = LogisticRegression(C=1 / (len(x) * PENALTY), tol=1e-10, max_iter=5000).fit(z, y.numpy())
    assert np.abs(probe.weight.detach().numpy() - theirs.coef_).max() < 1e-4
    np.testing.assert_array_equal(probe.hits(x, y).numpy(), theirs.predict(z) == y.numpy())


def test_accuracy_of_two_gaussians_is_bayes() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40_000, 2, generator=g), torch.arange(40_000) % 2
    x[:, 0] += y * 2.0
    probe = LinearProbe(x[:20_000], y[:20_000], 2)
    bayes = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    error = math.sqrt(bayes * (1 - bayes) / 20_000)
    assert abs(float(probe.hits(x[20_000:], y[20_000:]).double().mean()) - bayes) < 4 * error


def test_separable_images_are_and_shuffled_labels_are_not(run: Run, tmp_path: Path) -> None:
    found = measured(run, Path(run.config().data.path or ""))
    assert found["pooled"][:, 0].mean() > 0.6 > 2 * found["token"][:, 1].mean()
    assert set(found) == {"pooled", "windowed", "token", "control"} and found["pooled"].shape == (2, 2, 2)
    shuffled = measured(run, write(tmp_path / "shuffled", 1, shuffled=True))
    for kind in ("pooled", "windowed", "token"):
        chance = math.sqrt(0.25 * 0.75 / (48 * 2))  # of one place: 48 images, two seeds
        assert abs(shuffled[kind][:, 0].mean() - 0.25) < 4 * chance, kind


def test_the_control_reads_the_label(run: Run, tmp_path: Path) -> None:
    """Where images say nothing, only the label in the conditioning can; random weights let it through."""
    model = lively(Objective(run.config(), run.manifest())).model
    found = measured(run, write(tmp_path / "blank", 2, means=0.0), model)
    assert found["control"].mean() > 0.9
    assert found["pooled"].mean() < 0.45


def test_figures_depend_on_the_seed_only(run: Run) -> None:
    store = Path(run.config().data.path or "")
    one, again = (measured(run, store) for _ in range(2))
    for kind in one:
        np.testing.assert_array_equal(one[kind], again[kind])
    assert not np.array_equal(one["pooled"][..., 0], one["pooled"][..., 1])


def test_features_are_the_models(run: Run) -> None:
    model, config, manifest, _ = load_ema(run)
    source, ids = open_source(config.data), np.arange(5)
    found = extract(model, config, manifest, source, ids, 0.5, 0, (1, 2, 3), 16, 2)
    assert found.tokens.shape == (5, 16, 3, 32)
    order = found.places.argsort(1)
    whole = found.tokens.gather(1, order[:, :, None, None].expand_as(found.tokens))
    torch.testing.assert_close(whole.mean(1), found.pooled)
    clean = extract(model, config, manifest, source, ids, 0.0, 0, (1,), 16, 5)
    x = torch.from_numpy(source.read(ids).x).float() / 127.5 - 1
    with torch.no_grad():
        (tokens,) = model.features(x, torch.zeros(5), torch.full((5,), CLASSES), [1])
    torch.testing.assert_close(clean.pooled[:, 0], tokens.mean(1))


def test_likeness_by_its_formulas() -> None:
    rng = np.random.default_rng(0)
    a, b, k = rng.normal(size=(12, 3)), rng.normal(size=(12, 5)), 4
    center = np.eye(12) - 1 / 12
    ka, kb = center @ a @ a.T @ center, center @ b @ b.T @ center

    def aligned(p: np.ndarray, q: np.ndarray, mask: np.ndarray) -> float:
        return sum(p[i, j] * q[i, j] for i in range(12) for j in range(12) if mask[i, j])

    def near(x: np.ndarray) -> np.ndarray:
        mask = np.zeros((12, 12), bool)
        for i in range(12):
            order = sorted((j for j in range(12) if j != i), key=lambda j: -(x[i] @ x[j]))
            mask[i, order[:k]] = True
        return mask

    every, na, nb = np.ones((12, 12), bool), near(a), near(b)
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    truth = aligned(ka, kb, every) / math.sqrt(aligned(ka, ka, every) * aligned(kb, kb, every))
    assert cka(ta, tb) == pytest.approx(truth, abs=1e-12)
    truth = aligned(ka, kb, na & nb) / math.sqrt(aligned(ka, ka, na) * aligned(kb, kb, nb))
    assert cknna(ta, tb, k) == pytest.approx(truth, abs=1e-12)
    turned = ta @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] * 7
    assert cka(ta, turned) == pytest.approx(1) and cknna(ta, turned) == pytest.approx(1)


def encoder(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)[:, ::7].astype(np.float32)


def test_the_command_shows_runs_side_by_side(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = write(tmp_path / "held", 3)
    flags = [
        "--times",
        "0.1",
        "0.5",
        "--seeds",
        "1",
        "--num",
        "100",
        "--test-data",
        str(held),
        "--encoder",
        f"{__file__}:encoder",
    ]
    assert main(["probe", str(run.path), str(run.path), *flags, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "control" in printed and "CKNNA" in printed
    found = json.loads((tmp_path / "out" / "probe.json").read_text())["runs"]
    assert len(found) == 2 and found[0]["held_out"] and np.shape(found[0]["accuracy"]["token"]) == (3, 2, 1)
    assert np.shape(found[0]["token_map"]) == (3, 2, 4, 4)
    page = (tmp_path / "out" / "probe.html").read_text()
    assert page.count("data:image/png;base64,") == 8 and "held-out data" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "lsep probe: expected RUN ... first"),
        (["RUN", "--depths", "4"], "--depths holds 4, expected from 1 to the model's 3 blocks"),
        (["RUN", "--times", "1.5"], "--times holds 1.5, expected from 0 to 1"),
        (["RUN", "--seeds", "0"], "--seeds is 0, expected at least 1"),
        (["RUN", "--test-share", "1"], "--test-share is 1.0, expected above 0 and below 1"),
        (["RUN", "--data", "nowhere"], "no manifest.json there"),
        (["RUN", "--data", "digits"], "digits: shape is (1, 8, 8), and"),
        (["nowhere"], "nowhere: not a run directory"),
    ],
)
def test_bad_input(run: Run, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", *(str(run.path) if f == "RUN" else f for f in flags)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
