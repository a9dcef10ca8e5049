"""How alike two feature spaces are: linear CKA (arXiv 1905.00414) and CKNNA (arXiv 2405.07987).

Rows are the same images in the same order. Both are 1 for equal spaces, whatever their rotation and scale; float64.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 10
"""k of CKNNA, as in published figures."""
_BLOCK = 1024  # rows of the kernel matrix held at a time


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of features x `(N, D)` and y `(N, E)`: ||X'Y||^2 / (||X'X|| ||Y'Y||) of centred features."""
    x, y = (features.double() - features.double().mean(0) for features in (x, y))
    cross, x_own, y_own = ((a.T @ b).norm() for a, b in ((x, y), (x, x), (y, y)))
    return float(cross**2 / (x_own * y_own).clamp(min=1e-300))


class Neighbours(NamedTuple):
    """Of each row of N the k others with the largest kernel, and the kernel's values: both `(N, k)`."""

    nearest: Tensor
    kernel: Tensor


def neighbours(x: Tensor, k: int = NEIGHBOURS) -> Neighbours:
    """By cosine similarity of features `(N, D)`; N above k. Takes N rows by blocks, never N x N at once."""
    x = F.normalize(x.double(), dim=1)
    kernels, indices = [], []
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK] @ x.T
        rows = torch.arange(len(block), device=x.device)
        block[rows, rows + start] = -torch.inf
        top = block.topk(k, dim=1)
        kernels.append(top.values)
        indices.append(top.indices)
    return Neighbours(torch.cat(indices), torch.cat(kernels))


def cknna(a: Neighbours, b: Neighbours) -> float:
    """CKA restricted to neighbours shared by both spaces, in the form of its authors' code, which REPA's figures use.

    K_ij and L_ij, cosine similarities, count where j is among the k nearest of i in both spaces and are 0 elsewhere;
    HSIC is Song et al.'s unbiased estimate, and the result HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).
    """
    own = _hsic(a, a) * _hsic(b, b)
    return _hsic(a, b) / max(own, 1e-300) ** 0.5


def _hsic(a: Neighbours, b: Neighbours) -> float:
    """Unbiased HSIC (Song et al. 2012, equation 5) of the restricted kernels, from their non-zero entries."""
    n = len(a.nearest)
    same = a.nearest[:, :, None] == b.nearest[:, None, :]  # (N, k, k)
    row, in_a, in_b = same.nonzero(as_tuple=True)
    column, k_value, l_value = a.nearest[row, in_a], a.kernel[row, in_a], b.kernel[row, in_b]
    # tr(K L): entry (i, j) of K meets entry (j, i) of L, where that is not zero as well.
    key, mirrored = row * n + column, column * n + row
    order = key.argsort()
    place = torch.searchsorted(key, mirrored, sorter=order).clamp(max=max(len(key) - 1, 0))
    found = key[order[place]] == mirrored
    trace = (k_value * l_value[order[place]] * found).sum()
    k_columns, l_rows = (torch.zeros(n, dtype=torch.float64, device=row.device) for _ in range(2))
    k_columns.index_add_(0, column, k_value)
    l_rows.index_add_(0, row, l_value)
    total = k_value.sum() * l_value.sum() / ((n - 1) * (n - 2))
    return float((trace + total - 2 * (k_columns @ l_rows) / (n - 2)) / (n * (n - 3)))
