"""How alike two representations of the same images are: linear CKA, and CKNNA, which looks at neighbours only."""

import torch
from torch import Tensor

NEIGHBOURS = 10


def cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of features `(N, D)` and `(N, E)`, from 0 to 1 (arXiv 1905.00414, equation 3)."""
    return _aligned(_centred(a), _centred(b), None)


def cknna(a: Tensor, b: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """CKA over the pairs that are among each other's nearest neighbours in both (arXiv 2405.07987, appendix A)."""
    kernels = _centred(a), _centred(b)
    near = [_nearest(kernel, neighbours) for kernel in (_gram(a), _gram(b))]
    own = [_aligned_sum(kernel, kernel, mask) for kernel, mask in zip(kernels, near, strict=True)]
    cross = _aligned_sum(kernels[0], kernels[1], near[0] & near[1])
    return cross / max((own[0] * own[1]) ** 0.5, 1e-30)


def _gram(x: Tensor) -> Tensor:
    x = x.double()
    return x @ x.T


def _centred(x: Tensor) -> Tensor:
    """The Gram matrix of features less their mean, float64."""
    return _gram(x.double() - x.double().mean(0))


def _nearest(gram: Tensor, k: int) -> Tensor:
    """Whether j is among the k nearest of i by inner product, `(N, N)` bool; nothing is its own neighbour."""
    gram = gram.clone()
    gram.fill_diagonal_(-torch.inf)
    mask = torch.zeros_like(gram, dtype=torch.bool)
    return mask.scatter_(1, gram.topk(min(k, len(gram) - 1), dim=1).indices, True)


def _aligned(a: Tensor, b: Tensor, mask: Tensor | None) -> float:
    own = _aligned_sum(a, a, mask) * _aligned_sum(b, b, mask)
    return _aligned_sum(a, b, mask) / max(own**0.5, 1e-30)


def _aligned_sum(a: Tensor, b: Tensor, mask: Tensor | None) -> float:
    product = a * b
    return float(product.sum() if mask is None else product[mask].sum())
