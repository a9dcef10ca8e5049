"""Kernel inception distance (arXiv 1801.01401): the unbiased squared MMD under the kernel (x.y / D + 1)^3.

Its mean does not depend on the number of samples, which FID's does; values a little below 0 are right.
"""

import numpy as np
import torch
from torch import Tensor

from lsep.errors import UserError

SUBSETS, SUBSET_SIZE = 100, 1000


def kernel_distance(
    samples: Tensor, reference: Tensor, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> Tensor:
    """Squared MMDs `(subsets,)` float64 of pairs of random subsets of features `(N, D)` and `(M, D)`.

    `size` is cut to that of the smaller set.
    """
    size = min(size, len(samples), len(reference))
    if size < 2:
        raise UserError(f"{size} images found, expected at least 2 for KID")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            f[torch.from_numpy(rng.choice(len(f), size, replace=False)).to(f.device)].double()
            for f in (samples, reference)
        )
        values.append(squared_mmd(x, y))
    return torch.stack(values)


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased: pairs of a row with itself are left out."""
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    n, m = len(x), len(y)
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return within - 2 * xy.mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
