"""One run's figures: for every seed and time features are extracted once, for all depths, and probes fitted on them.

    training rows -> pooled features and some tokens, in memory -> probes
    testing rows  -> classified batch by batch, every token; only pooled features stay, and only for an encoder

The features of the training rows are what takes memory: `cached_bytes`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsep.backbone import Features
from lsep.config import Config
from lsep.data.manifest import Source
from lsep.errors import UserError
from lsep.separability import linear, similarity
from lsep.separability.encoder import Encode
from lsep.separability.features import Batch, Part, batches, choose_tokens, split
from lsep_kernels.reference import pool

Classifiers = dict[str, list[linear.Linear]]
"""Of each kind, one for each depth."""


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    depths: tuple[int, ...]
    """Blocks, counted from 1; 1 is a U-Net's mid-block."""
    times: tuple[float, ...]
    num: int
    """Images of a seed, a third of them for testing."""
    seeds: int
    """Seeds 0, 1, ..."""
    tokens: int
    """Tokens that train a per-token probe, at most."""
    l2: tuple[float, ...]
    """Weights of the squared weights to choose from, see `linear`."""
    batch_size: int


@dataclass(frozen=True)
class Figures:
    """Accuracies and similarities as arrays `(seeds, depths, times)`."""

    depths: tuple[int, ...]
    times: tuple[float, ...]
    accuracy: dict[str, np.ndarray]
    """By kind: pooled (mean over all tokens), windowed, token, and for conditional models control (pooled, labelled),
    which the first seed alone has: it costs as much as the others together."""
    token_map: np.ndarray
    """Accuracy of the tokens at each place of the grid, mean over seeds `(depths, times, grid, grid)`."""
    l2: dict[str, np.ndarray]
    """Of each probe, by kind."""
    alike: dict[str, np.ndarray]
    """cka and cknna of the pooled features of the testing rows with an encoder's; empty without one."""
    rows: tuple[int, int]
    """Images that trained and tested."""
    tokens: int
    """Tokens that trained a per-token probe."""
    chance: float
    """Accuracy of always naming the class most common among the testing rows, mean over seeds."""
    not_converged: int
    """Probes whose search ended before the optimum."""


class Cell(NamedTuple):
    """Figures of a seed and a time, by depth; the control is among the first seed's."""

    accuracy: dict[str, list[float]]
    token_map: Tensor
    """Share of right tokens `(depths, T)`."""
    l2: dict[str, list[float]]
    alike: dict[str, list[float]]
    chance: float
    """Share of the testing rows' most common class."""
    not_converged: int


@dataclass(frozen=True)
class Subject:
    """What is measured on: a model, its run's configuration, and the data."""

    name: str
    """For messages."""
    model: Features
    config: Config
    source: Source
    test_source: Source | None
    """Other data to test on; None splits the run's own."""
    device: torch.device
    encode: Encode | None = None
    """Features to compare with."""

    @property
    def classes(self) -> int:
        return self.source.manifest.probe_classes

    def has_control(self, seed: int) -> bool:
        """Whether features under the label are probed too: once is enough for what only shows that a label leaks."""
        return self.config.model.conditional and seed == 0


def cached_bytes(config: Config, settings: Settings, train: int, test: int, encoder: bool) -> int:
    """Bytes of the features kept at a time, where `train` images train and `test` images test."""
    kinds = 3 if config.model.conditional else 2
    vectors = train * kinds + min(settings.tokens, train * config.grid**2) + test * encoder
    return vectors * len(settings.depths) * config.model.hidden_size * 4


@torch.no_grad()
def measure(subject: Subject, settings: Settings, advance: Callable[[int], object] = lambda images: None) -> Figures:
    """All figures of a run; `advance` is told of every batch of images whose features are there.

    Raises UserError where features are not finite.
    """
    seeds, depths, times = range(settings.seeds), settings.depths, settings.times
    cells, rows, tokens = [], (0, 0), 0
    for seed in seeds:
        train, test = split(subject.source, settings.num, seed, subject.test_source)
        rows = len(train.ids), len(test.ids)
        chosen = choose_tokens(train, settings.tokens, subject.config.grid**2, seed)
        tokens = int(chosen.sum())
        other = None if subject.encode is None else Other(subject.encode(test.ids))
        cells.append([_cell(subject, settings, train, test, chosen, t, seed, other, advance) for t in times])

    def by_kind(values: Callable[[Cell], dict[str, list[float]]]) -> dict[str, np.ndarray]:
        """Arrays `(seeds, depths, times)`, of the seeds that have the kind."""
        lists = [[values(cell) for cell in of_seed] for of_seed in cells]
        return {
            kind: np.array([[cell[kind] for cell in of_seed] for of_seed in lists if kind in of_seed[0]]).swapaxes(1, 2)
            for kind in lists[0][0]
        }

    grid = subject.config.grid
    maps = np.mean([[cell.token_map.cpu().numpy() for cell in of_seed] for of_seed in cells], axis=0)
    return Figures(
        depths, times,
        accuracy=by_kind(lambda cell: cell.accuracy),
        token_map=maps.swapaxes(0, 1).reshape(len(depths), len(times), grid, grid),
        l2=by_kind(lambda cell: cell.l2),
        alike=by_kind(lambda cell: cell.alike),
        rows=rows, tokens=tokens,
        chance=float(np.mean([of_seed[0].chance for of_seed in cells])),
        not_converged=sum(cell.not_converged for of_seed in cells for cell in of_seed),
    )  # fmt: skip


class Other:
    """An encoder's features of the testing rows, `(N, E)`."""

    def __init__(self, features: Tensor) -> None:
        self.features, self.neighbours = features, similarity.neighbours(features)

    def alike(self, pooled: Tensor) -> dict[str, float]:
        """Their likeness to pooled features `(N, D)` of the same images."""
        return {
            "cka": similarity.linear_cka(pooled, self.features),
            "cknna": similarity.cknna(similarity.neighbours(pooled), self.neighbours),
        }


def _cell(
    subject: Subject, settings: Settings, train: Part, test: Part, chosen: Tensor, t: float, seed: int,
    other: Other | None, advance: Callable[[int], object],
) -> Cell:  # fmt: skip
    control = subject.has_control(seed)

    def of(part: Part) -> Iterator[Batch]:
        depths, size = settings.depths, settings.batch_size
        for batch in batches(subject.model, subject.config, part, t, seed, depths, size, subject.device, control):
            yield batch
            advance(len(batch.y))

    probes = _train(subject, settings, train, chosen, of(train), control)
    n, count = len(test.ids), len(settings.depths)
    hits = {kind: torch.zeros(count, dtype=torch.int64, device=subject.device) for kind in probes}
    right = torch.zeros(count, subject.config.grid**2, dtype=torch.int64, device=subject.device)
    labels = torch.zeros(subject.classes, dtype=torch.int64, device=subject.device)
    kept = torch.empty(count if other else 0, n, subject.config.model.hidden_size, device=subject.device)
    for batch in of(test):
        labels += torch.bincount(batch.y, minlength=subject.classes)
        for i in range(count):
            features = _pooled(batch, i)
            for kind, x in features.items():
                hits[kind][i] += (probes[kind][i].predict(x) == batch.y).sum()
            right[i] += (probes["token"][i].predict(batch.tokens[i].float()) == batch.y[:, None]).sum(0)
            if other is not None:
                kept[i, batch.place] = features["pooled"]
    hits["token"] = right.sum(1)
    trials = {kind: n * right.shape[1] if kind == "token" else n for kind in probes}
    likeness = [other.alike(kept[i]) for i in range(count)] if other is not None else []
    return Cell(
        {kind: (found / trials[kind]).tolist() for kind, found in hits.items()},
        right / n,
        {kind: [probe.l2 for probe in of_kind] for kind, of_kind in probes.items()},
        {name: [values[name] for values in likeness] for name in (likeness[0] if likeness else ())},
        float(labels.max() / n),
        sum(not probe.converged for of_kind in probes.values() for probe in of_kind),
    )


def _pooled(batch: Batch, i: int) -> dict[str, Tensor]:
    """One row of features an image at the i-th depth, by kind: `(B, D)` float32."""
    tokens = batch.tokens[i].float()
    features = {"pooled": tokens.mean(1), "windowed": pool(tokens, batch.window)}
    if batch.labelled is not None:
        features["control"] = batch.labelled[i].float().mean(1)
    return features


def _train(
    subject: Subject, settings: Settings, part: Part, chosen: Tensor, extracted: Iterator[Batch], control: bool
) -> Classifiers:
    """Collect the features of the training rows and fit the probes on them."""
    count, width, device = len(settings.depths), subject.config.model.hidden_size, subject.device
    chosen = chosen.to(device)
    kinds = ["pooled", "windowed", *(["control"] if control else [])]
    x = {kind: torch.empty(count, len(part.ids), width, device=device) for kind in kinds}
    x["token"] = torch.empty(count, int(chosen.sum()), width, device=device)
    y = torch.empty(len(part.ids), dtype=torch.int64, device=device)
    first = 0
    for batch in extracted:
        own = chosen[batch.place]
        last = first + int(own.sum())
        y[batch.place] = batch.y
        for i in range(count):
            for kind, features in _pooled(batch, i).items():
                x[kind][i, batch.place] = features
            x["token"][i, first:last] = batch.tokens[i][own].float()
        first = last
    if not all(features.isfinite().all() for features in x.values()):
        raise UserError(f"{subject.name}: features are not finite, expected a checkpoint whose EMA weights are sound")
    images = torch.arange(len(y), device=device)
    index = dict.fromkeys(kinds, images) | {"token": images[:, None].expand(-1, chosen.shape[1])[chosen]}
    return {
        kind: [
            linear.fit_best(x[kind][i], y[index[kind]], index[kind] % 5 == 0, subject.classes, settings.l2)
            for i in range(count)
        ]
        for kind in x
    }
