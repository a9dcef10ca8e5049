"""The linear classifier: standardised features, softmax regression with a small L2, full-batch L-BFGS to its optimum.

The loss is the mean cross-entropy plus l2 / 2 times the squared weights (not the bias) on features of mean 0 and
variance 1. It is convex, and with l2 > 0 its optimum is one point, so that the start (zero) does not matter and no
learning rate has to be found. scikit-learn's LogisticRegression with C = 1 / (l2 N) has the same optimum.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_ITERATIONS = 300
TOLERANCE = 1e-5
"""Largest entry of the gradient, in the coordinates of `_coordinates`, at which the search ends."""
LOOSE = 1e-3
"""A larger one at the end counts as not converged: float32 and the last iterations leave less than this."""


class Linear(NamedTuple):
    """Logits of raw features: the standardisation is folded in."""

    weight: Tensor
    """`(classes, D)`"""
    bias: Tensor
    """`(classes,)`"""
    gradient: float
    """Largest entry of the loss's gradient at the end, in the coordinates of the search."""
    l2: float

    @property
    def converged(self) -> bool:
        return self.gradient <= LOOSE

    def predict(self, x: Tensor) -> Tensor:
        """The likeliest class of features `(..., D)`: `(...)` int64."""
        return torch.nn.functional.linear(x, self.weight, self.bias).argmax(-1)


@torch.no_grad()
def fit(x: Tensor, y: Tensor, classes: int, l2: float) -> Linear:
    """The softmax regression of float32 features `(N, D)` on labels `(N,)` below `classes`."""
    mean, std = x.mean(0), x.std(0, correction=0)
    # A feature that does not vary says nothing; dividing by its rounding would make noise of it.
    std = torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, torch.inf)
    z = (x - mean) / std
    basis, scale = _coordinates(z, classes, l2)
    u, penalty, step = z @ basis, l2 * scale**2, 1 / math.sqrt(_curvature(classes))
    a = torch.zeros(classes, x.shape[1] + 1, dtype=x.dtype, device=x.device)  # the last column is the bias
    a.grad = torch.zeros_like(a)
    rows = torch.arange(len(y), device=y.device)

    def loss() -> float:
        assert a.grad is not None
        logits = torch.addmm(a[:, -1] * step, u, a[:, :-1].T)
        log_p = logits.log_softmax(1)
        value = (penalty * a[:, :-1] ** 2).sum() / 2 - log_p[rows, y].mean()
        error = log_p.exp_()
        error[rows, y] -= 1
        error /= len(y)
        torch.addmm(penalty * a[:, :-1], error.T, u, out=a.grad[:, :-1])
        torch.mul(error.sum(0), step, out=a.grad[:, -1])
        return float(value)

    search = torch.optim.LBFGS(
        [a], max_iter=MOST_ITERATIONS, tolerance_grad=TOLERANCE, history_size=20, line_search_fn="strong_wolfe",
        tolerance_change=TOLERANCE**2,  # what is left of the loss is quadratic in the gradient
    )  # fmt: skip
    search.step(loss)
    loss()
    weight = (a[:, :-1] @ basis.T) / std
    return Linear(weight, a[:, -1] * step - weight @ mean, float(a.grad.abs().max()), l2)


def fit_best(x: Tensor, y: Tensor, held: Tensor, classes: int, l2: Sequence[float]) -> Linear:
    """`fit` with that of several `l2` which is right most often on the rows `held` `(N,)`, fitted on the others."""
    if len(l2) == 1:
        return fit(x, y, classes, l2[0])
    rest = ~held
    right = [(fit(x[rest], y[rest], classes, value).predict(x[held]) == y[held]).sum() for value in l2]
    return fit(x, y, classes, l2[int(torch.stack(right).argmax())])


def _curvature(classes: int) -> float:
    """Second derivative of the cross-entropy by a logit where all classes are equally likely."""
    return (1 - 1 / classes) / classes if classes > 1 else 1.0


def _coordinates(z: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """`basis` (D, D) and its columns' lengths `(D,)`: principal axes, scaled to unit curvature of the loss at zero.

    Features of a trained network are so correlated that along axes they differ in variance by orders of magnitude. On
    those of a quickstart run the search took 8 to 58 evaluations in these coordinates, and 130 to over 300 without
    reaching its tolerance in the plain ones. The loss, and so the optimum, stays the same.
    """
    gram = (z.T @ z).double() / len(z)
    values, axes = torch.linalg.eigh(gram)
    scale = (_curvature(classes) * values.clamp(min=0) + l2).rsqrt()
    return (axes * scale).to(z.dtype), scale.to(z.dtype)
