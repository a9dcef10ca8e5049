"""The probe: standardised features, softmax regression with a small penalty, fitted to its optimum."""

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTY = 1e-3
"""Weight of |W|^2 / 2 beside the mean cross-entropy."""
ITERATIONS = 200


class LinearProbe:
    """Softmax regression on features `(N, D)`; the optimum of a convex loss, found by L-BFGS from zero."""

    def __init__(self, x: Tensor, y: Tensor, classes: int) -> None:
        """Fit to features x and labels y `(N,)`."""
        self.mean, self.scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
        z = self._standard(x)
        self.weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        self.bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=ITERATIONS, tolerance_grad=1e-6, tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(z @ self.weight.T + self.bias, y) + PENALTY / 2 * self.weight.square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)

    def _standard(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale

    @torch.no_grad()
    def hits(self, x: Tensor, y: Tensor) -> Tensor:
        """Which of the features `(N, D)` are put into their class, `(N,)` bool."""
        return (self._standard(x) @ self.weight.T + self.bias).argmax(1) == y
