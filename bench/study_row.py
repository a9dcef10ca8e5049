"""One row of the study: a training, and at points along it the distance of its samples and the accuracy of a probe."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.study_task import Images, Task
from lsep import checkpoint, sample
from lsep.backbone import Backbone
from lsep.config import Config, override
from lsep.cost.flops import step_parts, total
from lsep.data.loader import open_source
from lsep.data.manifest import Manifest
from lsep.evaluate.frechet import Gaussian, Moments, frechet_distance
from lsep.presets import PRESETS
from lsep.separability.measure import Settings, Subject, measure
from lsep.step import pick_device
from lsep.train import train

VARIANTS: dict[str, dict[str, Any]] = {
    "plain SiT": {"probe.enabled": False},
    "paper": {"probe.branch": "paper"},
    "shared, e = 0.8": {},
    "shared, e = 0.2": {"probe.extra_fraction": 0.2},
    "shared, e = 0": {"probe.extra_fraction": 0.0},
    "without cropping": {"probe.window_min": "grid"},
    "constant weight": {"probe.weight_start": 0.02625, "probe.weight_end": 0.02625},
    "rho = 0": {"probe.rho": 0.0, "probe.branch": "paper"},
    "rho = 1": {"probe.rho": 1.0},
    "probe removed at half time": {"probe.end_step": "half"},
    "probe weight x 1/3": {"probe.weight_start": 0.0075, "probe.weight_end": 0.01},
    "probe weight x 3": {"probe.weight_start": 0.0675, "probe.weight_end": 0.09},
    "label noise 10 %": {"data.path": "noisy"},
    "label noise 10 %, plain SiT": {"data.path": "noisy", "probe.enabled": False},
    "label smoothing 0.1": {"probe.label_smoothing": 0.1},
    "logit-normal t": {"interpolant.time": "logit-normal"},
    "logit-normal t, plain SiT": {"interpolant.time": "logit-normal", "probe.enabled": False},
}
"""What differs from LSEP as it is by default; rho = 0.9 is the default's."""
MAIN = tuple(VARIANTS)[:5]
SAMPLING_SEEDS = 3
"""Of the last point: the spread that sampling alone has."""
STRIP = 20
"""Images kept of each point, the classes in turn, from the same noise in every row."""


@dataclass(frozen=True)
class Sizes:
    """How large the trainings and their judgements are."""

    changes: dict[str, Any] = field(repr=False)
    """What differs from the quickstart preset."""
    points: int
    """Checkpoints along a training, at equal distances."""
    samples: int
    """Class-balanced samples of a seed at the last point."""
    samples_on_the_way: int
    """At each point, the last too, so that a curve compares like with like."""
    probed: int
    """Images that the probe is fitted to, and as many as there are held out to judge it."""
    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Of the probe; the accuracy is the mean over them."""
    sampler_steps: int = 50

    def described(self) -> dict[str, Any]:
        """For the page and to tell whether rows are comparable."""
        own = {k: v for k, v in vars(self).items() if k != "changes"}
        return {**own, "times": list(self.times), **self.changes}


def row(
    task: Task, sizes: Sizes, variant: dict[str, Any], seed: int, folder: Path, strips: Path | None
) -> dict[str, Any]:
    """Train, or go on with what an earlier call has trained, and judge; the folder is removed in the end.

    A few samples of each point go to `strips` as STEP.png.
    """
    config = configuration(task, sizes, variant, seed)
    run = train(config, folder / "run", preset="quickstart")
    config, manifest = run.config(), run.manifest()
    seconds = {line["step"]: line["seconds"] for line in run.metrics()}
    reference = gaussian(task, task.train)
    points: list[dict[str, Any]] = []
    for path in checkpoint.steps(run.checkpoints):
        step = int(path.name)
        model = sample.load_ema(run, step, pick_device("auto").type)[0]
        images = draw(model, config, sizes.samples_on_the_way, 0, manifest)
        points.append({
            "step": step, "seconds": seconds[step], "distance": frechet_distance(gaussian(task, images), reference),
            "accuracy": accuracy(task, model, config, sizes),
        })  # fmt: skip
        if strips:
            strips.mkdir(parents=True, exist_ok=True)
            sample.save_grid(images[:STRIP], strips / f"{step}.png", columns=STRIP)
    final = [
        frechet_distance(gaussian(task, draw(model, config, sizes.samples, s, manifest)), reference)
        for s in range(SAMPLING_SEEDS)
    ]
    shutil.rmtree(folder)
    return {
        "points": points, "final": final, "final_accuracy": points[-1]["accuracy"],
        "floor": frechet_distance(gaussian(task, task.test), reference),
        "flops": training_flops(config, manifest.probe_classes),
        "images_per_second": config.train.steps * config.train.batch_size / seconds[step],
    }  # fmt: skip


def training_flops(config: Config, probe_classes: int) -> float:
    """Model FLOPs of a whole training, its steps without a probe counted as such."""
    steps = config.train.steps
    probed = min(steps, config.probe.end_step or steps) if config.probe.enabled else 0
    with_probe, without = (
        total(step_parts(config, probe_classes, p)).training if p or probed < steps else 0 for p in (True, False)
    )
    return float(probed * with_probe + (steps - probed) * without)


def configuration(task: Task, sizes: Sizes, variant: dict[str, Any], seed: int) -> Config:
    """The training of one row; words in `variant` stand for what depends on the sizes."""
    base = override(PRESETS["quickstart"], {
        "data.path": str(task.stores["train"]), "train.seed": seed, "train.sample_every": 0, "train.keep_last": 0,
        "train.overhead_rounds": 0, "sample.sampler": "ode", "sample.cfg": 1.0, "sample.steps": sizes.sampler_steps,
        **sizes.changes,
    })  # fmt: skip
    steps = base.train.steps
    grid = task.train.shape[1] // base.model.patch_size
    words = {"grid": grid, "half": steps // 2, "noisy": str(task.stores["noisy"])}
    changes = {k: words.get(v, v) if isinstance(v, str) else v for k, v in variant.items()}
    return override(base, {"train.checkpoint_every": steps // sizes.points, **changes})


def draw(model: Backbone, config: Config, count: int, seed: int, manifest: Manifest) -> Images:
    """Class-balanced samples of the averaged weights."""
    labels = sample.grid_labels(count, manifest.num_classes)
    return sample.to_images(sample.draw(model, config, labels, 1000 + seed), manifest)


def gaussian(task: Task, images: Images) -> Gaussian:
    moments = Moments()
    for start in range(0, len(images), 1000):
        moments.add(torch.from_numpy(task.features(images[start : start + 1000])))
    return moments.gaussian()


def accuracy(task: Task, model: Backbone, config: Config, sizes: Sizes) -> float:
    """Of a linear probe on the mean of all tokens after the probed block, unlabelled, on held-out images, mean over t.

    Fitted with the true labels, whatever labels the training saw.
    """
    source, test = (open_source(override(config, {"data.path": str(task.stores[s])}).data) for s in ("train", "test"))
    settings = Settings(
        depths=(config.probe.depth,), times=sizes.times, num=sizes.probed, seeds=1, tokens=1, l2=(1e-3,), batch_size=256
    )
    found = measure(Subject(task.name, model, config, source, test, model.pos_embed.device), settings)
    return float(np.mean(found.accuracy["pooled"]))
