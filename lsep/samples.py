"""`lsep sample`: many images from a run, by one process or several, into one .npz.

Images are drawn in parts, which are files beside the .npz until all are there; a sampling that is started again after a
kill keeps the whole parts and draws the others. Of several guidance scales those that are whole are kept too. Parts are
dealt over the processes of torchrun. What an image looks like depends on none of that (`lsep.sample`).
"""

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lsep import backends, checkpoint, sample, shards
from lsep.backbone import Backbone
from lsep.config import Config, DistConfig, SampleConfig
from lsep.data.encode import fingerprint
from lsep.data.manifest import Manifest
from lsep.decode import Decoder
from lsep.dist import World, world
from lsep.errors import UserError, nearest, shown
from lsep.files import read_plain, require
from lsep.interpolant import Stream
from lsep.parts import SETTINGS, Parts, assemble
from lsep.run import Run, write_atomic
from lsep.sample import UNIT, Rounding
from lsep.step import pick_device
from lsep.voice import heard
from lsep_kernels.reference import uniform

GRID = 400
"""Images in the PNG grid, at most: the first ones."""
_TIMES = "fractions"
"""How `sample.times` has them; what was drawn by those before does not mix with these."""
_PATIENCE = 86400.0
"""Seconds."""


@dataclass(frozen=True)
class Request:
    """What is drawn, besides the sampler's settings."""

    seed: int = 0
    labels: Literal["balanced", "random"] = "balanced"
    classes: tuple[int, ...] | None = None
    shuffle: bool = True
    vae: str | None = None
    rounding: Rounding = "nearest"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    autoguidance: str | None = None
    average: str = "ema"


def sample_run(
    run: Run, config: Config, request: Request, scales: tuple[float, ...], out: Path | None, step: int | None,
    device: str,
) -> list[Path]:  # fmt: skip
    """Draw `config.sample.num` images for each guidance scale; under torchrun all processes call this.

    Returns the PNG grids and .npz files: `arr_0` uint8 images (N, H, W, C), or float32 latents (N, C, H, W) as a VAE
    decodes them, and `arr_1` their labels. Raises UserError before anything is drawn where something is missing.
    """
    _check(config, request, scales, out)
    files = []
    # A process may wait long for another one's parts.
    with world(replace(config, dist=DistConfig(timeout=_PATIENCE)), pick_device(device)) as here:
        here.at("the start of a sampling")
        job = here.together(lambda: Job(run, config, request, step, here))
        for scale in scales:
            files += job.draw(scale, out, several=len(scales) > 1)
    return files


def _check(config: Config, request: Request, scales: tuple[float, ...], out: Path | None) -> None:
    if not scales:
        raise UserError("--cfg is empty, expected at least one guidance scale")
    names = [f"{scale:g}" for scale in scales]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--cfg holds {name} {names.count(name)} times, expected scales that differ in 6 digits")
    if out is not None and out.suffix == ".npz" and len(scales) > 1:
        raise UserError(f"--out {out} is one file, but --cfg has {len(scales)} scales: expected a folder")
    if request.classes == ():
        raise UserError("--classes is empty, expected at least one class")
    if request.seed < 0:
        raise UserError(f"--seed is {request.seed}, expected at least 0")
    if not config.model.conditional and request.autoguidance is None and set(scales) != {1.0}:
        raise UserError(
            f"--cfg is {', '.join(names)}, but the run's model is unconditional, so there is no label to guide by: "
            "expected 1, or --autoguidance"
        )
    if request.autoguidance is not None and set(scales) == {1.0}:
        raise UserError("--autoguidance acts where --cfg is not 1, and it is 1: expected another scale")


def class_numbers(given: tuple[str, ...], manifest: Manifest) -> tuple[int, ...]:
    """Classes by their numbers or names; what is a number counts as one. Raises UserError for another name."""
    numbers = []
    for name in given:
        if name.removeprefix("-").isdecimal() and name.isascii():
            numbers.append(int(name[:20]))
        elif name in manifest.class_names:
            numbers.append(manifest.class_names.index(name))
        elif manifest.class_names:
            raise UserError(f"--classes holds {shown(name)}{nearest(name, manifest.class_names[:2000])}")
        else:
            raise UserError(f"--classes holds {shown(name)}, but the run's classes have no names: expected numbers")
    return tuple(numbers)


class Job:
    """A model, loaded and checked, and what is drawn of it."""

    def __init__(self, run: Run, config: Config, request: Request, step: int | None, here: World) -> None:
        self.run, self.request, self.world = run, request, here
        device = str(here.device)
        self.model, _, self.manifest, self.step = sample.load_ema(run, step, device, request.average)
        precision = config.train.precision if request.precision == "auto" else request.precision
        self.config = replace(config, train=replace(config.train, precision=precision))
        for c in request.classes or ():
            if not 0 <= c < self.manifest.num_classes:
                raise UserError(f"--classes holds {c}, expected from 0 to {self.manifest.num_classes - 1}")
        unseen = self.manifest.unseen(request.classes) if config.model.conditional else None
        if unseen and here.main:
            print(f"{unseen}: the model has not learned them; --classes leaves them out", file=sys.stderr)
        sample.require(config.sample.sampler)
        problem = backends.missing_compiler(here.device) if request.compile else None
        if problem:
            raise UserError(f"--compile on {here.device.type} needs {problem}")
        self.sources = {"device": here.device.type, "checkpoint": _identity(run, self.step)}
        self.weak = None if request.autoguidance is None else self._load_weak(request.autoguidance, device)
        self.decoder = None
        if request.vae is not None:
            if self.manifest.kind == "pixels":
                raise UserError(f"--vae {request.vae}: {run.path} was trained on pixels, which need no decoder")
            self.decoder = Decoder(request.vae, self.manifest, request.rounding, here.device)
            self.sources["vae_sha256"] = fingerprint(self.decoder.vae)[:16]
        if request.compile:
            for model in (self.model, self.weak):
                if model is not None:
                    model.compile_blocks()

    def _load_weak(self, place: str, device: str) -> Backbone:
        path, _, step = place.partition("@")
        if step and not step.isdecimal():
            raise UserError(f"--autoguidance is {shown(place)}, expected RUN or RUN@STEP")
        run = Run.existing(path)
        weak, config, manifest, found = sample.load_ema(run, int(step) if step else None, device)
        if config.interpolant.path != self.config.interpolant.path:
            own, there = self.config.interpolant.path, config.interpolant.path
            raise UserError(f"--autoguidance {path}: its path is {there}, expected {own} as in {self.run.path}")
        if config.model.conditional != self.config.model.conditional:
            kinds = {True: "class-conditional", False: "unconditional"}
            found_kind, wanted = (kinds[c.model.conditional] for c in (config, self.config))
            raise UserError(
                f"--autoguidance {path}: its model is {found_kind}, expected {wanted} as in {self.run.path}"
            )
        for name in ("kind", "shape", "num_classes", "scale", "shift", "latents"):
            own, there = getattr(self.manifest, name), getattr(manifest, name)
            if own != there:
                raise UserError(f"--autoguidance {path}: its {name} is {there}, expected {own} as in {self.run.path}")
        self.sources["autoguidance"] = _identity(run, found)
        return weak

    def draw(self, scale: float, out: Path | None, several: bool) -> list[Path]:
        """The grid and the .npz of one guidance scale."""
        config = replace(self.config, sample=replace(self.config.sample, cfg=scale))
        out = out / f"cfg-{scale:g}" if out is not None and several else out
        own = self.run.samples / self._folder_name(config.sample)
        if out is None:  # a folder of the run's is no link to elsewhere
            self.world.on_main(lambda: require(own, folder=True))
        out = out or own
        npz = out if out.suffix == ".npz" else out / "samples.npz"
        grid = npz.with_suffix(".png") if out.suffix == ".npz" else out / "grid.png"
        self.world.on_main(lambda: _make_folder(npz, out))
        settings = self._settings(config.sample)
        parts = Parts(npz.with_name(npz.name + ".parts"), config.sample.num, config.sample.batch_size)
        if several and self.world.on_main(lambda: _finished(npz, grid, parts, settings)):
            return [grid, npz]
        self.world.at("the parts of a sampling")
        self.world.on_main(lambda: parts.open(settings))
        todo = [i for i in range(self.world.rank, parts.count, self.world.size) if parts.whole(i) is None]
        progress = Progress(sum(b - a for a, b in map(parts.range, todo)), self.world)
        for index in todo:
            self.world.at(f"part {index} of a sampling")
            first, last = parts.range(index)
            parts.write(index, self._draw(config, first, last))
            progress.drawn(last - first)
        self.world.at("the end of a sampling")
        self.world.barrier()
        self.world.on_main(lambda: self._put_together(parts, npz, grid, out, settings))
        return [grid, npz]

    def labels(self, first: int, last: int) -> Tensor:
        """Of the images `first` to `last - 1`, a function of their numbers and the seed."""
        classes = torch.tensor(self.request.classes or range(self.manifest.num_classes))
        ids = torch.arange(first, last)
        if self.request.labels == "balanced":
            return classes[ids % len(classes)]
        return classes[(uniform(self.request.seed, Stream.SAMPLE_LABEL, 0, ids)[:, 0] * len(classes)).long()]

    def _draw(self, config: Config, first: int, last: int) -> np.ndarray:
        x = sample.draw(self.model, config, self.labels(first, last), self.request.seed, first, weak=self.weak)
        broken = (~x.isfinite()).flatten(1).any(1).nonzero()
        if len(broken):  # as bytes they would look like images
            raise UserError(f"image {first + int(broken[0])} of {self.run.path} is not finite: expected finite weights")
        return self.decoder(x) if self.decoder else sample.to_arrays(x, self.manifest, self.request.rounding)

    def _settings(self, config: SampleConfig) -> dict[str, Any]:
        """All that decides about the images."""
        given = {k: v for k, v in asdict(self.request).items() if k not in ("precision", "autoguidance")}
        return {
            "step": self.step, **given, "classes": self.request.classes and list(self.request.classes),
            **asdict(config), "times": _TIMES, "precision": self.config.train.precision, **self.sources,
        }  # fmt: skip

    def _folder_name(self, config: SampleConfig) -> str:
        """A name that tells the settings that are changed most, so that others do not replace earlier samples."""
        request = self.request
        name = f"step-{self.step:07d}-{config.sampler}-{config.steps}-cfg-{config.cfg:g}-seed-{request.seed}"
        if config.cfg != 1 and (config.guidance_low, config.guidance_high) != (0, 1):
            name += f"-from-{config.guidance_low:g}-to-{config.guidance_high:g}"
        if config.cfg != 1:
            name += "" if config.guidance_rule == "time" else f"-{config.guidance_rule}"
            name += "" if config.cfg_channels is None else f"-of-{config.cfg_channels}-channels"
        name += "" if request.average == "ema" else f"-{request.average}"
        name += "" if request.classes is None else "-classes-" + "-".join(map(str, request.classes))
        name += "" if request.labels == "balanced" else "-random"
        return name + ("" if self.weak is None else "-auto") + ("" if self.decoder is None else "-decoded")

    def _put_together(self, parts: Parts, npz: Path, grid: Path, out: Path, settings: dict[str, Any]) -> None:
        order = np.arange(parts.num)
        if self.request.shuffle:
            order = np.random.default_rng(self.request.seed).permutation(parts.num)
        files = parts.files()
        if out.suffix != ".npz":  # those of earlier samples must not stand beside these
            (out / SETTINGS).unlink(missing_ok=True)
        assemble(npz, files, order, self.labels(0, parts.num).numpy())
        first = np.concatenate([np.load(f, mmap_mode="r")[:GRID] for f in files[: -(-GRID // parts.size)]])[:GRID]
        sample.save_grid(_pictures(first, self.manifest), grid)
        if out.suffix != ".npz":
            write_atomic(out / SETTINGS, json.dumps(settings, indent=2) + "\n")
        parts.remove()


def _make_folder(npz: Path, out: Path) -> None:
    try:
        npz.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be a folder ({error.strerror}), expected one or a file .npz") from None
    if npz.is_dir():
        raise UserError(f"--out {out}: {npz} is a folder, expected a file or nothing there")


def _finished(npz: Path, grid: Path, parts: Parts, settings: dict[str, Any]) -> bool:
    """Whether an earlier sampling has drawn this scale to the end; its settings are written after all else."""
    if parts.folder.exists() or not (npz.is_file() and grid.is_file()):
        return False
    try:
        there = json.loads(read_plain(npz.parent / SETTINGS))
    except (OSError, ValueError, UserError):
        return False
    if there != json.loads(json.dumps(settings)):
        return False
    print(f"{npz}: already drawn with these settings", file=sys.stderr)
    return True


def _pictures(images: np.ndarray, manifest: Manifest) -> np.ndarray:
    """For the grid: images, or a preview of latents."""
    if images.dtype == np.uint8:
        return images
    return sample.to_images(sample.seen(torch.from_numpy(images), manifest), manifest)


def _identity(run: Run, step: int) -> str:
    """Which weights those are, by the checkpoint's own sha256."""
    content = (checkpoint.find(run.checkpoints, step) / shards.MANIFEST).read_bytes()
    return f"step {step}, sha256 {hashlib.sha256(content).hexdigest()[:16]}"


class Progress:
    """Images and images/s of all processes on the terminal, from the first one's share."""

    def __init__(self, todo: int, here: World) -> None:
        """todo: images that this process draws."""
        self.world, self.start, self.images, self.todo = here, time.perf_counter(), 0, todo

    def drawn(self, images: int) -> None:
        self.images += images
        if self.world.main and self.todo > UNIT and heard("info"):
            rate = self.images / (time.perf_counter() - self.start)
            left = round((self.todo - self.images) / rate)
            done, todo = self.images * self.world.size, self.todo * self.world.size
            print(
                f"{done} of {todo} images, {rate * self.world.size:.1f} images/s, {left // 60}:{left % 60:02d} left",
                file=sys.stderr, flush=True,
            )  # fmt: skip
