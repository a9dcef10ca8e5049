"""Frechet distances while a run trains: right, repeated by a resumed run, shared by processes, and refused early."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import lively, tiny
from test_dist import torchrun
from test_evaluate import scipy_fid

from lsep import sample
from lsep.config import Config, from_dict
from lsep.data.writer import write_store
from lsep.dist import world
from lsep.errors import UserError
from lsep.evaluate.features import open_extractor
from lsep.evaluate.images import open_images
from lsep.evaluate.monitor import REFERENCE_FILE, Monitor
from lsep.evaluate.reference import compute, save
from lsep.run import Run
from lsep.step import open_loader, setup, train_step
from lsep.train import train

CODE = """
import torch

def means(images):
    return torch.from_numpy(images).float().unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2)).flatten(1) / 255

def latent_means(x):
    return torch.from_numpy(x).unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)).flatten(1)

latent_means.latents = True

def pixels(images):
    return images.reshape(len(images), -1)[:, :5] / 255
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixels `images` (60 of 3 x 8 x 8), and the functions `mine.py`."""
    folder = tmp_path_factory.mktemp("monitor")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 200, (60, 3, 8, 8), np.uint8)
    write_store(folder / "images", kind="pixels", x=x, y=rng.integers(5, size=60), num_classes=5, scale=1.0)
    (folder / "mine.py").write_text(CODE)
    return folder


def config(folder: Path, **changes: Any) -> Config:
    return tiny(
        **{
            "data__path": str(folder / "images"), "train__eval_every": 3, "train__steps": 12, "sample__steps": 2,
            "sample__num": 4, "sample__batch_size": 16, "evaluate__features": f"{folder / 'mine.py'}:means",
            "evaluate__num": 40, **changes,
        }
    )  # fmt: skip


def distances(run: Run) -> dict[int, float]:
    return {m["step"]: m["frechet_distance"] for m in run.metrics() if "frechet_distance" in m}


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    return train(config(folder), folder / "whole")


def test_the_distance_is_that_of_the_ema_models_samples(folder: Path, whole: Run) -> None:
    """At the last step, drawn again from the checkpoint, with scipy's root, from all training images."""
    found = distances(whole)
    assert list(found) == [3, 6, 9, 12]
    assert [m["step"] for m in whole.metrics()] == [2, 3, 4, 6, 8, 9, 10, 12]
    model, settings, manifest, step = sample.load_ema(whole)
    assert step == 12
    drawn = sample.to_images(sample.draw(model, settings, torch.arange(40) % 5, settings.train.seed), manifest)
    call = open_extractor(f"{folder / 'mine.py'}:means", None, "fp32", torch.device("cpu"))
    real = np.concatenate(list(open_images(str(folder / "images")).batches(60)))
    truth = scipy_fid(*(call(images).features.numpy() for images in (drawn, real)))
    assert found[12] == pytest.approx(truth, rel=1e-6)
    assert len(set(found.values())) == 4
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole.path / "tensorboard")).Reload()
    scalars = {s.step: s.value for s in events.Scalars("frechet_distance")}
    assert scalars == pytest.approx(found, rel=1e-6)
    assert whole.report_file.read_text().count("Frechet distance of samples") == 2  # over steps and seconds


def test_a_resumed_run_repeats_the_figures(folder: Path, whole: Run, tmp_path: Path) -> None:
    train(config(folder, train__steps=7), tmp_path / "run")
    reference = (tmp_path / "run" / REFERENCE_FILE).read_bytes()
    again = train(config(folder), tmp_path / "run")
    assert distances(again) == distances(whole)
    assert (tmp_path / "run" / REFERENCE_FILE).read_bytes() == reference
    losses = [{m["step"]: m["loss"] for m in run.metrics()} for run in (again, whole)]
    assert all(losses[0][step] == losses[1][step] for step in (3, 9, 12))


def test_evaluation_changes_nothing_of_a_run(folder: Path, whole: Run, tmp_path: Path) -> None:
    plain = train(config(folder, train__eval_every=0, evaluate__features=None), tmp_path / "plain")
    assert not distances(plain) and not (plain.path / REFERENCE_FILE).exists()
    models = [sample.load_ema(run)[0].state_dict() for run in (plain, whole)]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])


def test_its_time_is_not_the_trainings(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch of features takes a thousand seconds by the clock that training is timed with."""
    ahead = 0.0

    def slow(images: np.ndarray) -> np.ndarray:
        nonlocal ahead
        ahead += 1000
        return images.reshape(len(images), -1)[:, :4].astype(np.float32)

    monkeypatch.setitem(sys.modules, "slow_features", SimpleNamespace(slow=slow))
    monkeypatch.setattr("lsep.window.time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + ahead))
    run = train(config(folder, evaluate__features="slow_features:slow", train__steps=3), tmp_path / "run")
    assert list(distances(run)) == [3] and ahead >= 2000
    assert run.metrics()[-1]["seconds"] < 1000


def test_a_damaged_or_foreign_reference_is_made_anew(folder: Path, whole: Run, tmp_path: Path) -> None:
    made = (whole.path / REFERENCE_FILE).read_bytes()
    pixels = config(folder, evaluate__features=f"{folder / 'mine.py'}:pixels")
    Monitor(setup(pixels)).prepare(tmp_path)
    assert (tmp_path / REFERENCE_FILE).read_bytes() != made
    for content in (None, b"damaged", b""):
        if content is not None:
            (tmp_path / REFERENCE_FILE).write_bytes(content)
        Monitor(setup(config(folder))).prepare(tmp_path)
        assert (tmp_path / REFERENCE_FILE).read_bytes() == made


def test_statistics_from_a_file(folder: Path, tmp_path: Path) -> None:
    extractor = open_extractor(f"{folder / 'mine.py'}:means", None, "fp32", torch.device("cpu"))
    save(compute(open_images(str(folder / "images")), extractor, 7), extractor, tmp_path / "made.npz")
    found = []
    for changes in ({}, {"evaluate__reference": str(tmp_path / "made.npz")}):
        monitor = Monitor(setup(config(folder, **changes)))
        monitor.prepare(tmp_path / "nowhere" if changes else tmp_path)
        found.append(monitor.distance(0))
    assert found[0] == pytest.approx(found[1], rel=1e-9) and found[0] > 0


def test_latents_with_an_extractor_of_latents(folder: Path, store: Path, tmp_path: Path) -> None:
    """On samples as they are stored: shift and scale taken back."""
    name = f"{folder / 'mine.py'}:latent_means"
    state = setup(config(folder, data__path=str(store), evaluate__features=name))
    lively(state.ema)
    monitor = Monitor(state)
    monitor.prepare(tmp_path)
    x = sample.draw(state.ema.model, state.config, torch.arange(40) % 5, 0) / state.source.manifest.scale
    call = open_extractor(name, None, "fp32", torch.device("cpu"))
    real = np.concatenate(list(open_images(str(store), latents=True).batches(60)))
    truth = scipy_fid(*(call(part).features.numpy() for part in (x.numpy(), real)))
    assert monitor.distance(0) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluate__features": None},
            "--train.eval-every is 3, but --evaluate.features is missing, expected inception",
        ),
        ({"evaluate__features": "nothing_here:f"}, "--features: nothing_here cannot be imported"),
        ({"evaluate__reference": "no.npz"}, "no.npz: cannot be read"),
        ({"evaluate__num": 0}, "--evaluate.num is 0, expected at least 1"),
        ({"train__eval_every": -1}, "--train.eval-every is -1, expected at least 0"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(config(folder, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_latents_need_an_extractor_of_latents(folder: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="means takes images, but the data at .* is latents: expected an extractor of lat"
    ):
        train(config(folder, data__path=str(store)), tmp_path / "run")
    name = f"{folder / 'mine.py'}:latent_means"
    with pytest.raises(
        UserError, match="latent_means takes latents, but the data at .* is images: expected an extractor"
    ):
        train(config(folder, evaluate__features=name), tmp_path / "run")


def measured(settings: Config, run_dir: Path) -> float:
    """The distance after three steps, by the processes that call this; the first one's answer."""
    with world(settings, torch.device("cpu")) as here:
        state = setup(settings, here)
        for step, batches in enumerate(open_loader(state, 0, 3)):
            train_step(state, step, batches)
        monitor = Monitor(state)
        monitor.prepare(run_dir)
        return monitor.distance(3)


def test_processes_share_the_work(folder: Path, whole: Run, tmp_path: Path) -> None:
    """Two processes have the distance of one, but for the rounding of their weights; ddp, and fsdp's shards."""
    one = measured(config(folder), tmp_path)
    assert one == pytest.approx(distances(whole)[3], rel=1e-9)
    for mode in ("ddp", "fsdp"):
        (tmp_path / mode).mkdir()
        (tmp_path / f"{mode}.json").write_text(json.dumps(asdict(config(folder, dist__mode=mode))))
    done = torchrun(2, __file__, str(tmp_path / "ddp.json"), str(tmp_path / "fsdp.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    for mode in ("ddp", "fsdp"):
        assert float((tmp_path / mode / "distance").read_text()) == pytest.approx(one, rel=1e-5), mode
        assert (tmp_path / mode / REFERENCE_FILE).exists()


if __name__ == "__main__":  # one of those processes
    dist.init_process_group("gloo")
    for file in map(Path, sys.argv[1:]):
        found = measured(from_dict(json.loads(file.read_text()), str(file)), file.with_suffix(""))
        if dist.get_rank() == 0:
            (file.with_suffix("") / "distance").write_text(repr(found))
    dist.destroy_process_group()
