"""Sampling: Euler, Heun, dopri5 and the SDE, guidance inside an interval, images out.

    from lsep.sample import load_ema, draw

The noise of an image is a function of (seed, image index) alone, and the model always runs on units of 32 images, each
at its place: matrix products of other sizes round otherwise. So an image has the same bits however many are drawn at
once, and by however many processes.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lsep import averages, backends, checkpoint
from lsep.backbone import Backbone
from lsep.config import BackendConfig, Config, SampleConfig
from lsep.data.latents import as_stored, in_units, of_vae
from lsep.data.manifest import Manifest
from lsep.errors import UserError
from lsep.files import replacing
from lsep.interpolant import Stream, velocity_to_score
from lsep.objective import Objective
from lsep.run import Run
from lsep_kernels.reference import normal

Velocity = Callable[[Tensor, float], Tensor]
Rounding = Literal["nearest", "truncate"]

UNIT = 32
"""Images the model runs on at once, twice as many under guidance; the last ones are filled up."""
GRID_MARK = ("lsep", "grid")
"""Entry of the text in a PNG of `save_grid`."""
DOPRI5_ERROR = {"atol": 1e-6, "rtol": 1e-3}
"""SiT's own setting; the step adapts to a unit's error, so its images depend on one another."""
SDE_LAST_TIME = 0.04
"""The stochastic steps end here; one deterministic step leads to t = 0."""


def times(sampler: str, steps: int) -> list[float]:
    """The times a sampler visits, from 1 (noise) to 0 (data): `steps` of them are evaluated.

    Each is the float64 nearest to its fraction, as 0.3 in a program is: a guidance interval has its ends at such times,
    and `np.linspace(1, 0, 51)[35]` is below 0.3.
    """
    if sampler != "sde":
        return [(steps - i) / steps for i in range(steps + 1)]
    if steps == 1:
        return [1.0, 0.0]
    last = Fraction(str(SDE_LAST_TIME))
    return [*(float(1 - (1 - last) * Fraction(i, steps - 1)) for i in range(steps)), 0.0]


def integrate(
    velocity: Velocity, x: Tensor, sampler: str, steps: int, kind: str, step_noise: Callable[[int], Tensor],
    corrector: Callable[[Tensor, float, float], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Carry noise x `(N, ...)` float64 at t = 1 to data at t = 0.

    ode: Euler. heun: Euler, then the mean of both slopes, but for the last step. sde: Euler-Maruyama on the reverse SDE
    dx = (v - w s / 2) dt + sqrt(w) dW with diffusion w = 2t and score s, the last step without noise.
    dopri5: torchdiffeq's adaptive Runge-Kutta of order 5, whatever `steps`.
    `velocity(x, t)` and `step_noise(i)` are float64 like x; `kind` names the path. Heun's second slope is
    `velocity(x, end of the step)`, or `corrector(x, end, start)` where that is given.
    """
    if sampler == "dopri5":
        return _dopri5(velocity, x)
    schedule = times(sampler, steps)
    for i, (t, t_next) in enumerate(pairwise(schedule)):
        dt, last = t_next - t, t_next == 0
        slope = velocity(x, t)
        if sampler == "sde":
            score = velocity_to_score(slope, x, torch.tensor(t, dtype=torch.float64), kind)
            slope = slope - t * score  # w / 2 = t
            x = x + slope * dt
            if not last:
                x = x + math.sqrt(2 * t * -dt) * step_noise(i)
        elif sampler == "heun" and not last:
            there = x + slope * dt
            ahead = velocity(there, t_next) if corrector is None else corrector(there, t_next, t)
            x = x + (slope + ahead) / 2 * dt
        else:
            x = x + slope * dt
    return x


def require(sampler: str) -> None:
    """Raises UserError where `sampler` needs a package that is not installed, before anything is begun."""
    if sampler == "dopri5":
        try:
            import torchdiffeq  # noqa: F401
        except ImportError:
            raise UserError(
                "the sampler dopri5 needs torchdiffeq, which is not installed: pip install torchdiffeq"
            ) from None


def _dopri5(velocity: Velocity, x: Tensor) -> Tensor:
    require("dopri5")
    from torchdiffeq import odeint

    ends = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)
    return odeint(lambda t, x: velocity(x, float(t)), x, ends, method="dopri5", **DOPRI5_ERROR)[-1]


class Guided:
    """A model's velocity under labels y `(N,)`, where guidance acts extrapolated from the unlabelled one.

    Guidance acts at times from guidance_low to guidance_high, both included, on the first `cfg_channels` channels. A
    model without labels has nothing to be guided by but a weaker one.
    """

    def __init__(
        self, model: Backbone, y: Tensor, config: SampleConfig, weak: Backbone | None, unlabelled: bool
    ) -> None:
        self.model, self.y, self.config, self.weak = model, y, config, weak
        self.null = torch.full_like(y, model.null_class)
        self.off = config.cfg == 1 or (unlabelled and weak is None)

    def __call__(self, x: Tensor, t: float, decides: float | None = None) -> Tensor:
        """The velocity at x `(N, C, H, W)` and t, float64; decides: the time that must be in the interval, if not t."""
        time = torch.full((len(x),), t, device=x.device)
        decides, config = t if decides is None else decides, self.config
        if self.off or not config.guidance_low <= decides <= config.guidance_high:
            return self.model(x.float(), time, self.y).double()
        if self.weak is not None:
            strong, base = (m(x.float(), time, self.y).double() for m in (self.model, self.weak))
        else:
            both = torch.cat([self.y, self.null])
            strong, base = self.model(x.float().repeat(2, 1, 1, 1), time.repeat(2), both).double().chunk(2)
        guided = base + config.cfg * (strong - base)
        if config.cfg_channels is None:
            return guided
        return torch.cat([guided[:, : config.cfg_channels], strong[:, config.cfg_channels :]], dim=1)


def guided(
    model: Backbone, y: Tensor, config: SampleConfig, weak: Backbone | None = None, unlabelled: bool = False
) -> Guided:
    """The velocity of `model` under labels y `(N,)` with the guidance of `config`, see `Guided`.

    weak: extrapolate from the velocity of this model under the same labels instead (autoguidance, arXiv 2406.02507).
    unlabelled: the model was trained without labels.
    """
    return Guided(model, y, config, weak, unlabelled)


@torch.no_grad()
def draw(
    model: Backbone, config: Config, labels: Tensor, seed: int, first: int = 0, weak: Backbone | None = None
) -> Tensor:
    """Samples `(N, C, H, W)` float32 for labels `(N,)` on the model's device; image i has index `first + i`.

    weak: the model of autoguidance, see `guided`.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    shape = (config.model.in_channels or 0, config.model.input_size or 0, config.model.input_size or 0)
    if not config.model.conditional:
        labels = torch.full_like(labels, model.null_class)
    before = first % UNIT
    after = -(before + len(labels)) % UNIT
    filled = torch.nn.functional.pad(labels.to(device), (before, after), value=model.null_class)
    parts = []
    for start in range(0, len(filled), UNIT):
        y = filled[start : start + UNIT]
        ids = torch.arange(first - before + start, first - before + start + UNIT, device=device)
        x = normal(seed, Stream.SAMPLE, 0, ids, shape).double()

        def step_noise(i: int, ids: Tensor = ids) -> Tensor:
            return normal(seed, Stream.SDE, i, ids, shape).double()

        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            velocity = guided(model, y, config.sample, weak, not config.model.conditional)
            corrector = velocity if config.sample.guidance_rule == "repa" else None
            sampler, steps = config.sample.sampler, config.sample.steps
            x = integrate(velocity, x, sampler, steps, config.interpolant.path, step_noise, corrector)
        parts.append(x.float())
    model.train(training)
    return torch.cat(parts)[before : before + len(labels)]


def grid_labels(num: int, num_classes: int) -> Tensor:
    """Labels `(num,)` of a sample grid: the classes in turn."""
    return torch.arange(num) % num_classes


def to_images(x: Tensor, manifest: Manifest) -> np.ndarray:
    """uint8 images `(N, H, W, channels)`; of latents a preview, their first three channels from -3 to 3.

    Where their VAE is known a preview does not depend on how they were normalised on the way in.
    """
    if manifest.kind == "pixels":
        return to_uint8(x)
    shown = in_units(latents(x, manifest), manifest)
    x = x if shown is None else shown
    return to_uint8(x[:, : 3 if x.shape[1] >= 3 else 1] / 3)


def to_uint8(x: Tensor, rounding: Rounding = "nearest") -> np.ndarray:
    """Images `(N, C, H, W)` from -1 to 1 as uint8 `(N, H, W, C)`.

    nearest: 127.5 x + 128, cut off (SiT, DiT); truncate: 127.5 (x + 1), cut off (REPA, LSEP).
    """
    x = 127.5 * x.float() + (128 if rounding == "nearest" else 127.5)
    return x.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_arrays(x: Tensor, manifest: Manifest, rounding: Rounding = "nearest") -> np.ndarray:
    """Samples as they are stored: uint8 images `(N, H, W, C)`, or float32 latents `(N, C, H, W)` as a VAE decodes."""
    return to_uint8(x, rounding) if manifest.kind == "pixels" else latents(x, manifest).cpu().numpy()


def latents(x: Tensor, manifest: Manifest) -> Tensor:
    """From what the model sees to what a VAE decodes."""
    return of_vae(x / manifest.scale + manifest.shift, manifest)


def seen(z: Tensor, manifest: Manifest) -> Tensor:
    """The inverse of `latents`: from what a VAE decodes to what the model sees."""
    return (as_stored(z, manifest) - manifest.shift) * manifest.scale


def save_grid(images: np.ndarray, path: Path, columns: int | None = None, side: int = 48) -> None:
    """Tile uint8 images `(N, H, W, 1 or 3)` into one PNG; small ones are enlarged to about `side` pixels."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    zoom = max(1, side // height)
    sheet = np.full((rows, columns, height + 1, width + 1, channels), 255, np.uint8)
    sheet.reshape(-1, *sheet.shape[2:])[:n, :-1, :-1] = images
    sheet = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * (height + 1), columns * (width + 1), channels)
    sheet = sheet.repeat(zoom, 0).repeat(zoom, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = PngInfo()
    mark.add_text(*GRID_MARK)  # so that it is not taken for a sample
    with replacing(path) as temporary:
        Image.fromarray(sheet[..., 0] if channels == 1 else sheet).save(temporary, format="PNG", pnginfo=mark)


def load_ema(
    run: Run, step: int | None = None, device: str = "cpu", average: str = "ema"
) -> tuple[Backbone, Config, Manifest, int]:
    """EMA model of a run's newest checkpoint (or that of `step`) in eval mode, configuration, data and step.

    average: another of the checkpoint's (`lsep.averages`); raises UserError where it has none of that name.
    """
    config, manifest = run.config(), run.manifest()
    path = checkpoint.find(run.checkpoints, step)
    averages.require(average, path)
    # What a run was trained with need not be here; to sample, whatever runs will do.
    anywhere = replace(config, backend=BackendConfig(), train=replace(config.train, fp8=False))
    chosen = backends.choose(anywhere, torch.device(device))
    objective = Objective(config, manifest, chosen.ops)
    checkpoint.load_weights(path, average, objective)
    return objective.model.to(device).eval(), config, manifest, int(path.name)
