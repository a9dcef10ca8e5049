"""The update: torch's AdamW in two groups, clipping, schedule, EMA."""

import copy
import math

import pytest
import torch
from conftest import MANIFEST, lively, random_batch, tiny

from lsep.checks import resolve
from lsep.objective import Objective
from lsep.optim import build_optimizer, rate_factor
from lsep.plan import branch_plan


@pytest.mark.parametrize("by", ["torch", "csrc", "reference"])
def test_step_is_adamw_with_two_rates_clip_and_ema(by: str) -> None:
    """Against the update rule written out (Kingma & Ba; Loshchilov & Hutter), five steps in float64."""
    config = resolve(tiny(optim__weight_decay=0.1, optim__clip=0.05), MANIFEST)
    objective = lively(Objective(config, MANIFEST))
    ema = copy.deepcopy(objective)
    o = config.optim
    optimizer = build_optimizer(objective, ema, o, by)
    p = {n: q.detach().double() for n, q in objective.named_parameters()}
    m, v, average = ({n: q * k for n, q in p.items()} for k in (0, 0, 1))
    for step in range(5):
        losses = objective(random_batch(10, step), branch_plan(config), torch.tensor(step), torch.tensor(0))
        losses.total.backward()
        grads = {n: q.grad.double() for n, q in objective.named_parameters() if q.grad is not None}
        truth_norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        optimizer.set_rate(0.5)
        norm = optimizer.step()
        assert float(norm) == pytest.approx(truth_norm, rel=1e-5)
        assert truth_norm > o.clip
        for n, g in grads.items():
            g = g * o.clip / truth_norm
            lr = 0.5 * (o.probe_lr if n.startswith("classifier") else o.lr)
            m[n], v[n] = o.beta1 * m[n] + (1 - o.beta1) * g, o.beta2 * v[n] + (1 - o.beta2) * g**2
            unbiased = m[n] / (1 - o.beta1 ** (step + 1)), v[n] / (1 - o.beta2 ** (step + 1))
            p[n] = p[n] * (1 - lr * o.weight_decay) - lr * unbiased[0] / (unbiased[1].sqrt() + o.eps)
            average[n] = o.ema_decay * average[n] + (1 - o.ema_decay) * p[n]
    for n, q in objective.named_parameters():
        torch.testing.assert_close(q.double(), p[n], rtol=1e-4, atol=2e-6, msg=n)
    for n, q in ema.named_parameters():
        torch.testing.assert_close(q.double(), average[n], rtol=1e-4, atol=2e-6, msg=n)


def test_schedule() -> None:
    config = tiny(optim__warmup_steps=4, optim__schedule="cosine").optim
    factors = [rate_factor(s, config, 24) for s in range(24)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[14] == pytest.approx(0.5)
    assert factors == sorted(factors[:4]) + sorted(factors[4:], reverse=True)
    constant = tiny(optim__warmup_steps=2).optim
    assert [rate_factor(s, constant, 9) for s in range(4)] == [0.5, 1, 1, 1]
