"""Weight averages as profiles over the steps, and how to make one out of others afterwards (EDM2, arXiv 2312.02696).

An average after T steps is sum_k p_k theta_k over the weights theta_k after step k. Its profile p is for
a power function of exponent gamma   p_k = (k / T)^(gamma + 1) - ((k - 1) / T)^(gamma + 1),  k = 1..T,
a constant decay b                   p_k = (1 - b) b^(T - k),  k = 1..T, and b^T for the weights before the first step.
The first is what the update theta_hat <- beta_t theta_hat + (1 - beta_t) theta_t with beta_t = (1 - 1/t)^(gamma + 1)
amounts to (EDM2, equations 122 to 124): no approximation for a finite number of steps is made here.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = npt.NDArray[np.float64]
NARROWEST, WIDEST = 0.001, 0.28
"""Relative widths go up to 1/sqrt(12), where the power function is constant: all steps count alike."""
_ROWS = 8192
"""Steps at once, of the least squares."""


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function whose standard deviation is `sigma_rel` of the training (EDM2, algorithm 2).

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def step_weight(at_step: Tensor, gamma: float) -> Tensor:
    """1 - beta_t, the share of the newest weights at step `at_step` (from 0), float32 on its device."""
    t = at_step.double() + 1
    return (1 - (1 - 1 / t) ** (gamma + 1)).float()


@dataclass(frozen=True)
class Profile:
    """An average after `step` steps: of a power function, or of a constant decay."""

    step: int
    sigma_rel: float | None = None
    decay: float | None = None

    def weights(self, first: int, stop: int) -> Array:
        """p_k for k = first..stop - 1; 0 stands for the weights before the first step."""
        k = np.arange(first, stop, dtype=np.float64)
        if self.decay is not None:
            share = np.where(k > 0, 1 - self.decay, 1.0)
            p = share * np.power(self.decay, np.maximum(self.step - k, 0))
        else:
            assert self.sigma_rel is not None
            exponent = gamma_of(self.sigma_rel) + 1
            safe = np.maximum(k, 1)
            with np.errstate(divide="ignore"):  # at k = 1 all of it
                p = np.power(safe / self.step, exponent) * -np.expm1(exponent * np.log1p(-1 / safe))
            p = np.where(k > 0, p, 0.0)
        return np.where(k <= self.step, p, 0.0)


def coefficients(target: Profile, bases: list[Profile]) -> tuple[Array, float]:
    """Those of the averages `bases` whose sum comes closest to `target`, and the error left, relative to its profile.

    Least squares over the steps, as in EDM2's section 3.2, but with coefficients that add up to 1: weights differ
    little beside their size, so a sum of 0.999 would shrink all of them by more than the profiles differ.
    """
    stop = max(profile.step for profile in (target, *bases)) + 1
    # The triangular factor of all steps' rows, some rows at a time: what least squares needs of them.
    factor = np.zeros((0, len(bases) + 1))
    for first in range(0, stop, _ROWS):
        rows = [p.weights(first, min(first + _ROWS, stop)) for p in (*bases, target)]
        factor = np.asarray(np.linalg.qr(np.vstack([factor, np.stack(rows, 1)]), mode="r"))
    columns, wanted = factor[:, :-1], factor[:, -1]
    # The last coefficient is what the others leave of 1.
    last = columns[:, -1]
    others = np.linalg.lstsq(columns[:, :-1] - last[:, None], wanted - last, rcond=None)[0]
    found = np.append(others, 1 - others.sum())
    error = np.linalg.norm(columns @ found - wanted) / np.linalg.norm(wanted)
    return found, float(error)
