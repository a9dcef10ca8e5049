"""A Frechet distance of the EMA weights' samples while they train (`--train.eval-every`).

The same noise and labels at every evaluation, functions of `train.seed` alone: a resumed run repeats the figures. All
processes draw a share of the samples and join their moments, so none waits for another to draw them all.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from lsep import sample
from lsep.backbone import Backbone
from lsep.errors import UserError
from lsep.evaluate.archives import Archive
from lsep.evaluate.features import open_extractor
from lsep.evaluate.frechet import Gaussian, Moments, frechet_distance
from lsep.evaluate.images import of_rows
from lsep.evaluate.reference import Reference, load, save, statistics
from lsep.step import State, average_model

REFERENCE_FILE = "reference.npz"
REFERENCE_OF_VAE = "reference-of-vae.npz"
"""Of latents that were normalised on the way in; earlier versions left the other file in their units."""


class Monitor:
    """Built before a run begins, so that what is missing is said then."""

    def __init__(self, state: State) -> None:
        """Raises UserError where extractor or reference cannot be had, or the extractor does not take this data."""
        config, manifest = state.config, state.source.manifest
        settings = config.evaluate
        if settings.features is None:
            raise UserError(
                f"--train.eval-every is {config.train.eval_every}, but --evaluate.features is missing, expected "
                "inception, MODULE:FUNCTION or FILE.py:FUNCTION"
            )
        weights = None if settings.weights is None else Path(settings.weights)
        self.state = state
        self.extractor = open_extractor(settings.features, weights, "fp32", state.device)
        if self.extractor.latents != (manifest.kind != "pixels"):
            found, wanted = ("images", "latents") if self.extractor.latents else ("latents", "images")
            raise UserError(
                f"--evaluate.features {settings.features} takes {wanted}, but the data at {manifest.source} is "
                f"{found}: expected an extractor of {found}, or --train.eval-every 0"
            )
        if settings.num < state.world.size:
            raise UserError(f"--evaluate.num is {settings.num}, expected at least the {state.world.size} processes")
        self.known: Gaussian | None = None
        if settings.reference is not None:
            self.known = statistics(settings.reference, self.extractor).pool

    def prepare(self, run_dir: Path) -> None:
        """Make the reference of the training data, once a run. All processes call this."""
        world, source = self.state.world, self.state.source
        way = source.manifest.latents
        file = run_dir / (REFERENCE_OF_VAE if way is not None and way.changed else REFERENCE_FILE)
        if self.known is not None or world.on_main(partial(self._load, file)):
            return
        rows = source.manifest.rows
        moments = self._moments(rows, lambda a, b: of_rows(source, np.arange(a, b)), "the reference of the evaluation")
        self.known = moments.gaussian()
        made = Reference(source.manifest.source, self.known, rows, precision=self.extractor.precision)
        world.on_main(lambda: save(made, self.extractor, file))

    def _load(self, file: Path) -> bool:
        """Take the reference that an earlier session of the run has made with this extractor."""
        if not file.exists():
            return False
        try:
            self.known = load(Archive(file), self.extractor).pool
        except UserError:  # damaged, or of another extractor: made anew
            return False
        return True

    def distance(self, step: int) -> float:
        """The distance between samples of the EMA weights and the reference. All processes call this."""
        state = self.state
        model = average_model(state, everywhere=True)
        assert model is not None
        moments = self._moments(state.config.evaluate.num, partial(self._draw, model), f"the evaluation of step {step}")

        def measured() -> float:
            assert self.known is not None
            return frechet_distance(self.of_width(moments), self.known)

        return state.world.on_main(measured)

    def of_width(self, moments: Moments) -> Gaussian:
        """The samples' Gaussian; raises UserError where the reference is of another width."""
        assert self.known is not None
        if len(moments.mean) != self.known.width:
            raise UserError(
                f"--evaluate.reference: statistics of width {self.known.width}, expected {len(moments.mean)} as the "
                "features of the samples"
            )
        return moments.gaussian()

    def _draw(self, model: Backbone, first: int, last: int) -> np.ndarray:
        config, manifest = self.state.config, self.state.source.manifest
        labels = sample.grid_labels(config.evaluate.num, manifest.num_classes)[first:last]
        return sample.to_arrays(sample.draw(model, config, labels, config.train.seed, first), manifest)

    def _moments(self, count: int, batch: Callable[[int, int], np.ndarray], place: str) -> Moments:
        """Of `count` images, of which `batch(first, last)` gives some, over all processes."""
        world, size = self.state.world, self.state.config.sample.batch_size
        first, last = (count * r // world.size for r in (world.rank, world.rank + 1))
        own = Moments()
        for start in range(first, last, size):
            world.at(place)  # again and again: the others need not think that this one hangs
            own.add(self.extractor(batch(start, min(start + size, last))).features)
        if world.size == 1:
            return own
        whole = Moments()
        mean = world.average(own.mean * own.count) * (world.size / count)
        apart = own.mean - mean
        scatter = own.scatter + apart.outer(apart) * own.count
        whole.join(count, mean, world.average(scatter) * world.size)
        return whole
