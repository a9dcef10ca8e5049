"""The figures of one run: accuracy of linear probes by depth and time, and likeness to an encoder's features.

Probes are fitted to one part of the images and judged on another, once for each seed, which draws noise, windows and
the parts anew. Features are extracted once for each time and seed, for all depths.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lsep.config import Config
from lsep.data.manifest import Ids, Manifest, Source
from lsep.errors import UserError
from lsep.model import SiT
from lsep.separability.features import Features, extract, tokens_an_image
from lsep.separability.linear import LinearProbe
from lsep.separability.similarity import cka, cknna

KINDS = ("pooled", "windowed", "token", "control")
"""Means over all tokens; over a window; each token by itself; over all tokens, with the label in the conditioning."""
_COMPARED = 2000
"""Images whose features are compared with an encoder's, at most."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    depths: tuple[int, ...] | None = None
    seeds: int = 3
    num: int = 10_000
    test_share: float = 0.2
    batch_size: int = 256


@dataclass
class Measured:
    """Of one run, arrays by depth, time and seed; token_map by depth, time, row and column, averaged over seeds."""

    name: str
    step: int
    depths: tuple[int, ...]
    times: tuple[float, ...]
    train_images: int
    test_images: int
    held_out: bool
    """Whether the test images were not trained on by the denoiser."""
    probe_classes: int
    accuracy: dict[str, np.ndarray] = field(default_factory=dict)
    token_map: np.ndarray = field(default_factory=lambda: np.zeros(0))
    likeness: dict[str, np.ndarray] = field(default_factory=dict)
    """CKA and CKNNA of pooled features and the encoder's, where one was given."""

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        out = {k: v for k, v in vars(self).items() if k not in ("accuracy", "token_map", "likeness")}
        arrays = {name: getattr(self, name) for name in ("accuracy", "likeness")}
        out |= {name: {k: v.tolist() for k, v in values.items()} for name, values in arrays.items()}
        return {**out, "token_map": self.token_map.tolist()}


Encoder = Callable[[Source, Ids], torch.Tensor]
"""Features `(n, E)` of images by their ids."""


def measure(
    name: str, model: SiT, config: Config, manifest: Manifest, step: int, source: Source, test: Source | None,
    settings: Settings, encoder: Encoder | None = None,
) -> Measured:  # fmt: skip
    """All figures of `model`, with `source` its data and `test` held-out data, or None to set a part aside."""
    depths = settings.depths or tuple(range(1, config.model.depth + 1))
    for depth in depths:
        if not 1 <= depth <= config.model.depth:
            raise UserError(f"--depths holds {depth}, expected from 1 to the model's {config.model.depth} blocks")
    kinds = KINDS if config.model.conditional else KINDS[:-1]
    shape, grid = (len(depths), len(settings.times), settings.seeds), config.grid
    parts = [_parts(source, test, settings, seed) for seed in range(settings.seeds)]
    found = Measured(
        name, step, depths, settings.times, len(parts[0][0]), len(parts[0][1]), test is not None,
        manifest.probe_classes, {kind: np.zeros(shape) for kind in kinds},
    )  # fmt: skip
    hits = np.zeros((2, len(depths), len(settings.times), grid**2))
    if encoder is not None:
        found.likeness = {which: np.zeros(shape) for which in ("CKA", "CKNNA")}
    tokens = tokens_an_image(found.train_images + found.test_images, len(depths), config)
    bar = tqdm(total=settings.seeds * len(settings.times), desc=name, unit="time", disable=not sys.stderr.isatty())
    for seed, (learned, judged) in enumerate(parts):
        other = test or source
        y, y_test = (torch.from_numpy(s.read(ids).probe_y) for s, ids in ((source, learned), (other, judged)))
        known = None if encoder is None else encoder(other, judged[:_COMPARED])
        for j, t in enumerate(settings.times):

            def of(data: Source, ids: Ids, labelled: bool, t: float = t, seed: int = seed) -> Features:
                return extract(
                    model, config, manifest, data, ids, t, seed, depths, tokens, settings.batch_size, labelled
                )

            x, x_test = of(source, learned, False), of(other, judged, False)
            control = (of(source, learned, True), of(other, judged, True)) if "control" in kinds else None
            for i in range(len(depths)):
                pairs = {"pooled": (x.pooled, x_test.pooled), "windowed": (x.windowed, x_test.windowed)}
                if control is not None:
                    pairs["control"] = control[0].pooled, control[1].pooled
                for kind, (a, b) in pairs.items():
                    probe = LinearProbe(a[:, i], y, manifest.probe_classes)
                    found.accuracy[kind][i, j, seed] = float(probe.hits(b[:, i], y_test).double().mean())
                right = _tokens(x, x_test, i, y, y_test, manifest.probe_classes)
                found.accuracy["token"][i, j, seed] = float(right.double().mean())
                places = x_test.places.flatten()
                hits[0, i, j] += torch.bincount(places, right.flatten().double(), grid**2).numpy()
                hits[1, i, j] += torch.bincount(places, minlength=grid**2).numpy()
                if known is not None:
                    own = x_test.pooled[: len(known), i]
                    found.likeness["CKA"][i, j, seed], found.likeness["CKNNA"][i, j, seed] = (
                        cka(own, known), cknna(own, known),
                    )  # fmt: skip
            bar.update()
    bar.close()
    found.token_map = (hits[0] / np.maximum(hits[1], 1)).reshape(len(depths), len(settings.times), grid, grid)
    return found


def _tokens(
    x: Features, x_test: Features, depth: int, y: torch.Tensor, y_test: torch.Tensor, classes: int
) -> torch.Tensor:
    """Which tokens of the test images are put into their image's class by one probe for all tokens, `(n, k)` bool."""
    k = x.tokens.shape[1]
    probe = LinearProbe(x.tokens[:, :, depth].flatten(0, 1), y.repeat_interleave(k), classes)
    right = probe.hits(x_test.tokens[:, :, depth].flatten(0, 1), y_test.repeat_interleave(k))
    return right.view(-1, k)


def _parts(source: Source, test: Source | None, settings: Settings, seed: int) -> tuple[Ids, Ids]:
    """Ids to fit to and ids to judge by, drawn without replacement."""
    rng = np.random.default_rng([seed, 0])
    ids = rng.permutation(source.manifest.rows)[: settings.num]
    if test is not None:
        return ids, rng.permutation(test.manifest.rows)[: settings.num]
    held = max(1, round(settings.test_share * len(ids)))
    if held >= len(ids):
        raise UserError(f"{source.manifest.source} has {len(ids)} images to probe, expected at least 2")
    return ids[held:], ids[:held]
