"""Images through an extractor: what of their features the metrics need, and no more."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lsep.errors import UserError
from lsep.evaluate.features import Extractor
from lsep.evaluate.frechet import Moments
from lsep.evaluate.images import Images


@dataclass
class Extracted:
    """Features of `count` images; of spatial ones the moments only."""

    count: int
    halves: tuple[Moments, Moments] = field(default_factory=lambda: (Moments(), Moments()))
    """Of every second image: their distance is the least that this many images can have."""
    spatial: Moments | None = None
    features: Tensor | None = None
    logits: Tensor | None = None

    @property
    def moments(self) -> Moments:
        both = Moments()
        for half in self.halves:
            if half.count:
                both.join(half.count, half.mean, half.scatter)
        return both


def extract(
    images: Images, extractor: Extractor, batch_size: int, keep: int | None = None, logits: bool = False
) -> Extracted:
    """One pass over `images`. Of their features `keep` are kept, drawn with a fixed seed; all for None."""
    if images.count < 2:
        raise UserError(f"{images.source}: {images.count} image found, expected at least 2")
    kept_ids = None
    if keep is not None and keep < images.count:
        kept_ids = np.sort(np.random.default_rng(0).choice(images.count, keep, replace=False))
    out = Extracted(images.count)
    kept: list[Tensor] = []
    scores: list[Tensor] = []
    start = 0
    for batch in _shown(images, batch_size):
        found = extractor(batch)
        width = out.halves[0].mean.shape[0]
        if start and found.features.shape[1] != width:
            raise UserError(
                f"--features {extractor.identity.name}: {found.features.shape[1]} features of an image, and {width} of "
                "one before, expected always as many"
            )
        for i, half in enumerate(out.halves):
            half.add(found.features[(i - start) % 2 :: 2])
        if found.spatial is not None:
            out.spatial = out.spatial or Moments()
            out.spatial.add(found.spatial)
        if logits and found.logits is not None:
            scores.append(found.logits)
        if kept_ids is None:
            kept.append(found.features)
        else:
            first, last = np.searchsorted(kept_ids, [start, start + len(batch)])
            rows = torch.from_numpy(kept_ids[first:last] - start).to(found.features.device)
            kept.append(found.features[rows])
        start += len(batch)
    out.features = torch.cat(kept)
    out.logits = torch.cat(scores) if scores else None
    return out


def _shown(images: Images, batch_size: int) -> Iterable[np.ndarray]:
    """The batches under a progress bar, on a terminal."""
    with tqdm(total=images.count, disable=not sys.stderr.isatty(), unit="image", desc=images.source[-40:]) as bar:
        for batch in images.batches(batch_size):
            yield batch
            bar.update(len(batch))
