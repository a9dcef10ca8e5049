"""Improved precision and recall (arXiv 1904.06991): who lies within whose k-nearest-neighbour balls.

A point is covered by a set when its distance to one of the set's points is at most that point's distance to its k-th
neighbour in the set, itself not counted. Precision is the share of samples that the reference covers, recall the share
of the reference that the samples cover. Distances are computed in blocks, so 50,000 x 50,000 fit any memory.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lsep.errors import UserError

Distances = Literal["fp32", "adm-fp16"]
K = 3
ROWS, COLUMNS = 2048, 8192
"""A block of distances: 64 MiB in float32."""


def precision_recall(
    samples: Tensor, reference: Tensor, distances: Distances = "fp32", k: int = K
) -> tuple[float, float]:
    """Precision and recall of features `(N, D)` against `(M, D)`; float64 ones are compared in float64.

    adm-fp16: the distances of ADM's evaluator, products of half precision where these stay finite.
    """
    for name, x in (("samples", samples), ("the reference", reference)):
        if len(x) <= k:
            raise UserError(
                f"{len(x)} images of {name} found, expected more than the {k} neighbours of precision and recall"
            )
    if distances == "fp32":  # distances stay as they are, but the squares they are differences of become small
        middle = reference.mean(0)
        samples, reference = samples - middle, reference - middle
    half = distances == "adm-fp16"
    precision = covered(samples, reference, radii(reference, k, half), half)
    recall = covered(reference, samples, radii(samples, k, half), half)
    return float(precision.double().mean()), float(recall.double().mean())


def squared_distances(a: Tensor, b: Tensor, half: bool) -> Tensor:
    """`(N, M)` from `(N, D)` and `(M, D)`."""
    if half:
        d = _expanded(a.half(), b.half())
        if d.isfinite().all():
            return d.float()
    return _expanded(a, b)


def _expanded(a: Tensor, b: Tensor) -> Tensor:
    return (a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)).clamp(min=0)


def radii(x: Tensor, k: int, half: bool) -> Tensor:
    """Squared distance `(N,)` of each row to its k-th neighbour; the nearest of all, place 0, is the row itself."""
    out = []
    for rows in x.split(ROWS):
        nearest = rows.new_empty(len(rows), 0)
        for columns in x.split(COLUMNS):
            d = squared_distances(rows, columns, half)
            nearest = torch.cat([nearest, d], 1).topk(min(k + 1, nearest.shape[1] + d.shape[1]), largest=False).values
        out.append(nearest[:, k])
    return torch.cat(out)


def covered(points: Tensor, centres: Tensor, squared_radii: Tensor, half: bool) -> Tensor:
    """Which points `(N, D)` lie in at least one ball around `centres` `(M, D)`: bool `(N,)`."""
    return torch.cat([_covered_rows(rows, centres, squared_radii, half) for rows in points.split(ROWS)])


def _covered_rows(rows: Tensor, centres: Tensor, squared_radii: Tensor, half: bool) -> Tensor:
    inside = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for columns, limit in _blocks(centres, squared_radii):
        inside |= (squared_distances(rows, columns, half) <= limit).any(1)
    return inside


def _blocks(centres: Tensor, squared_radii: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(centres.split(COLUMNS), squared_radii.split(COLUMNS), strict=True)
