"""`lsep sample`: many images from a run, by one process or several, into one .npz.

Images are drawn in parts, which are files beside the .npz until all are there; a sampling that is started again after a
kill keeps the whole parts and draws the others. Parts are dealt over the processes of torchrun. What an image looks
like depends on none of that (`lsep.sample`).
"""

import hashlib
import json
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lsep import checkpoint, sample, shards
from lsep.config import Config, DistConfig, SampleConfig
from lsep.data.manifest import Manifest
from lsep.decode import Decoder
from lsep.dist import World, world
from lsep.errors import UserError, shown
from lsep.interpolant import Stream
from lsep.model import SiT
from lsep.run import Run, write_atomic
from lsep.sample import UNIT, Rounding
from lsep.step import pick_device
from lsep_kernels.reference import uniform

GRID = 400
"""Images in the PNG grid, at most: the first ones."""
_PATIENCE = 86400.0
"""Seconds."""
_ROWS = 256
"""Images copied at once when parts are put together."""


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


def sample_run(
    run: Run, config: Config, request: Request, scales: tuple[float, ...], out: Path | None, step: int | None,
    device: str,
) -> list[Path]:  # fmt: skip
    """Draw `config.sample.num` images for each guidance scale; under torchrun all processes call this.

    Returns the PNG grids and .npz files: `arr_0` uint8 images (N, H, W, C), or float32 latents (N, C, H, W) as a VAE
    decodes them, and `arr_1` their labels. Raises UserError before anything is drawn where something is missing.
    """
    if out is not None and out.suffix == ".npz" and len(scales) > 1:
        raise UserError(f"--out {out} is one file, but --cfg has {len(scales)} scales: expected a folder")
    files = []
    # A process may wait long for another one's parts.
    with world(replace(config, dist=DistConfig(timeout=_PATIENCE)), pick_device(device)) as here:
        here.at("the start of a sampling")
        job = here.together(lambda: Job(run, config, request, step, here))
        for scale in scales:
            files += job.draw(scale, out, several=len(scales) > 1)
    return files


class Job:
    """A model, loaded and checked, and what is drawn of it."""

    def __init__(self, run: Run, config: Config, request: Request, step: int | None, here: World) -> None:
        self.run, self.request, self.world = run, request, here
        device = str(here.device)
        self.model, _, self.manifest, self.step = sample.load_ema(run, step, device)
        precision = config.train.precision if request.precision == "auto" else request.precision
        self.config = replace(config, train=replace(config.train, precision=precision))
        for c in request.classes or ():
            if not 0 <= c < self.manifest.num_classes:
                raise UserError(f"--classes holds {c}, expected from 0 to {self.manifest.num_classes - 1}")
        self.sources = {"checkpoint": _identity(run, self.step)}
        self.weak = None if request.autoguidance is None else self._load_weak(request.autoguidance, device)
        self.decoder = None
        if request.vae is not None:
            if self.manifest.kind == "pixels":
                raise UserError(f"--vae {request.vae}: {run.path} was trained on pixels, which need no decoder")
            self.decoder = Decoder(request.vae, self.manifest, request.rounding, here.device)
        if request.compile:
            for model in (self.model, self.weak):
                if model is not None:
                    model.run = torch.compile(model.run, fullgraph=True, dynamic=False)

    def _load_weak(self, place: str, device: str) -> SiT:
        path, _, step = place.partition("@")
        if step and not step.isdecimal():
            raise UserError(f"--autoguidance is {shown(place)}, expected RUN or RUN@STEP")
        run = Run.existing(path)
        weak, config, manifest, found = sample.load_ema(run, int(step) if step else None, device)
        if config.interpolant.path != self.config.interpolant.path:
            own, there = self.config.interpolant.path, config.interpolant.path
            raise UserError(f"--autoguidance {path}: its path is {there}, expected {own} as in {self.run.path}")
        for name in ("kind", "shape", "num_classes", "scale", "shift"):
            own, there = getattr(self.manifest, name), getattr(manifest, name)
            if own != there:
                raise UserError(f"--autoguidance {path}: its {name} is {there}, expected {own} as in {self.run.path}")
        self.sources["autoguidance"] = _identity(run, found)
        return weak

    def draw(self, scale: float, out: Path | None, several: bool) -> list[Path]:
        """The grid and the .npz of one guidance scale."""
        config = replace(self.config, sample=replace(self.config.sample, cfg=scale))
        out = out / f"cfg-{scale:g}" if out is not None and several else out
        out = out or self.run.samples / self._folder_name(config.sample)
        npz = out if out.suffix == ".npz" else out / "samples.npz"
        grid = npz.with_suffix(".png") if out.suffix == ".npz" else out / "grid.png"
        self.world.on_main(lambda: _make_folder(npz.parent, out))
        settings = self._settings(config.sample)
        parts = Parts(npz.with_name(npz.name + ".parts"), config.sample.num, config.sample.batch_size)
        self.world.at("the parts of a sampling")
        self.world.on_main(lambda: parts.open(settings))
        progress = Progress(parts, self.world)
        for index in range(self.world.rank, parts.count, self.world.size):
            if parts.whole(index) is None:
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
        if self.manifest.kind == "pixels":
            return sample.to_uint8(x, self.request.rounding)
        return self.decoder(x) if self.decoder else (x / self.manifest.scale + self.manifest.shift).cpu().numpy()

    def _settings(self, config: SampleConfig) -> dict[str, Any]:
        """All that decides about the images."""
        given = {k: v for k, v in asdict(self.request).items() if k not in ("precision", "compile", "autoguidance")}
        return {
            "step": self.step, **given, "classes": self.request.classes and list(self.request.classes),
            **asdict(config), "precision": self.config.train.precision, **self.sources,
        }  # fmt: skip

    def _folder_name(self, config: SampleConfig) -> str:
        """A name that tells the settings, so that other settings do not replace earlier samples."""
        request = self.request
        name = f"step-{self.step:07d}-{config.sampler}-{config.steps}-cfg-{config.cfg:g}-seed-{request.seed}"
        name += "" if request.classes is None else "-classes-" + "-".join(map(str, request.classes))
        name += "" if request.labels == "balanced" else "-random"
        return name + ("" if self.weak is None else "-auto") + ("" if self.decoder is None else "-decoded")

    def _put_together(self, parts: "Parts", npz: Path, grid: Path, out: Path, settings: dict[str, Any]) -> None:
        order = np.arange(parts.num)
        if self.request.shuffle:
            order = np.random.default_rng(self.request.seed).permutation(parts.num)
        arrays = parts.arrays()
        assemble(npz, arrays, order, self.labels(0, parts.num).numpy())
        first = np.concatenate([np.asarray(a[:GRID]) for a in arrays[: -(-GRID // parts.size)]])[:GRID]
        sample.save_grid(_pictures(first, self.manifest), grid)
        if out.suffix != ".npz":
            write_atomic(out / "settings.json", json.dumps(settings, indent=2) + "\n")
        parts.remove()


def _make_folder(folder: Path, out: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be a folder ({error.strerror}), expected one or a file .npz") from None


def _pictures(images: np.ndarray, manifest: Manifest) -> np.ndarray:
    """For the grid: images, or a preview of latents."""
    if images.dtype == np.uint8:
        return images
    return sample.to_images((torch.from_numpy(images) - manifest.shift) * manifest.scale, manifest)


def _identity(run: Run, step: int) -> str:
    """Which weights those are, by the checkpoint's own sha256."""
    path = checkpoint.find(run.checkpoints, step)
    return f"{path}, {hashlib.sha256((path / shards.MANIFEST).read_bytes()).hexdigest()[:16]}"


class Parts:
    """The parts of a sampling: `part-00000-CRC32.npy` in a folder that is removed in the end."""

    def __init__(self, folder: Path, num: int, batch_size: int) -> None:
        self.folder, self.num = folder, num
        self.size = -(-batch_size // UNIT) * UNIT
        self.count = -(-num // self.size)

    def range(self, index: int) -> tuple[int, int]:
        """First image of a part, and the one after its last."""
        return index * self.size, min((index + 1) * self.size, self.num)

    def open(self, settings: dict[str, Any]) -> None:
        """Begin, or go on with what was drawn under the same settings; raises UserError where they differ."""
        file = self.folder / "settings.json"
        settings = json.loads(json.dumps({**settings, "part": self.size}))
        if file.exists():
            try:
                before = json.loads(file.read_text())
                changed = [k for k in settings if before[k] != settings[k]]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{file}: not settings of this program, remove {self.folder}") from None
            if changed:
                told = "; ".join(f"{k}: {shown(before[k])} -> {shown(settings[k])}" for k in changed)
                raise UserError(
                    f"{self.folder} holds parts of other samples ({told}): remove it or give the same flags"
                )
            return
        self.folder.mkdir(exist_ok=True)
        write_atomic(file, json.dumps(settings, indent=2) + "\n")

    def whole(self, index: int) -> Path | None:
        """The file of a part that is there and undamaged; a damaged one is removed."""
        for path in self.folder.glob(f"part-{index:05d}-*.npy"):
            if f"{zlib.crc32(path.read_bytes()):08x}" == path.stem.rpartition("-")[2]:
                return path
            path.unlink()
        return None

    def write(self, index: int, images: np.ndarray) -> None:
        temporary = self.folder / f".part-{index:05d}.tmp"
        with temporary.open("wb") as file:
            np.save(file, images)
        crc = zlib.crc32(temporary.read_bytes())
        shards.flush(temporary)
        temporary.rename(self.folder / f"part-{index:05d}-{crc:08x}.npy")

    def arrays(self) -> list[np.ndarray]:
        """All parts in order, on the disk; raises UserError where one is missing."""
        paths = [self.whole(i) for i in range(self.count)]
        missing = [i for i, path in enumerate(paths) if path is None]
        if missing:
            raise UserError(f"{self.folder}: part {missing[0]} is missing or damaged, sample again to draw it")
        return [np.load(path, mmap_mode="r") for path in paths if path is not None]

    def remove(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


def assemble(npz: Path, parts: list[np.ndarray], order: np.ndarray, labels: np.ndarray) -> None:
    """Write the images of `parts` in `order` as arr_0, and their labels as arr_1; little of it is in memory at once."""
    size, shape = len(parts[0]), parts[0].shape[1:]
    temporary = npz.with_name(npz.name + ".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": parts[0].dtype.str, "fortran_order": False, "shape": (len(order), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(order), _ROWS):
                rows = [parts[i // size][i % size] for i in order[start : start + _ROWS]]
                file.write(np.stack(rows).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels[order])
    shards.flush(temporary)
    temporary.replace(npz)


class Progress:
    """Images and images/s of all processes on the terminal, from the first one's share."""

    def __init__(self, parts: Parts, here: World) -> None:
        self.world, self.start, self.images = here, time.perf_counter(), 0
        mine = range(here.rank, parts.count, here.size)
        self.todo = sum(b - a for a, b in (parts.range(i) for i in mine if parts.whole(i) is None))

    def drawn(self, images: int) -> None:
        self.images += images
        if self.world.main and self.todo > UNIT:
            rate = self.images / (time.perf_counter() - self.start)
            left = round((self.todo - self.images) / rate)
            done, todo = self.images * self.world.size, self.todo * self.world.size
            print(
                f"{done} of {todo} images, {rate * self.world.size:.1f} images/s, {left // 60}:{left % 60:02d} left",
                file=sys.stderr, flush=True,
            )  # fmt: skip
