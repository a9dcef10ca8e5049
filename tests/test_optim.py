"""The update: torch's AdamW in two groups, clipping, schedule, EMA."""

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import MANIFEST, lively, random_batch, relative_error, tiny

from lsep import checkpoint
from lsep.checks import resolve
from lsep.dist import World
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.optim import build_optimizer, rate_factor
from lsep.plan import branch_plan
from lsep.step import open_loader, setup, train_step


@pytest.mark.parametrize("by", ["torch", "csrc", "reference"])
def test_step_is_adamw_with_two_rates_clip_and_ema(by: str) -> None:
    """Against the update rule written out (Kingma & Ba; Loshchilov & Hutter), five steps in float64."""
    config = resolve(tiny(optim__weight_decay=0.1, optim__clip=0.05), MANIFEST)
    objective = lively(Objective(config, MANIFEST))
    ema = copy.deepcopy(objective)
    o = config.optim
    optimizer = build_optimizer(objective, ema, o, by, World(torch.device("cpu")))
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


BF16 = {"train__precision": "bf16"}


@pytest.mark.parametrize("by", ["csrc", "reference"])
def test_bf16_weights_are_copies_of_the_masters(store: Path, tmp_path: Path, by: str) -> None:
    """Matmuls read what rounding the masters gives; training is as good, resuming exact, checkpoints stay float32."""
    changes = {"data__path": str(store), "backend__optimizer": by, **BF16}
    states = {weights: setup(tiny(train__weights=weights, **changes)) for weights in ("fp32", "bf16")}
    curves = {w: [train_step(s, i, b) for i, b in enumerate(open_loader(s, 0, 6))] for w, s in states.items()}
    assert relative_error(torch.stack(curves["bf16"])[:, :3], torch.stack(curves["fp32"])[:, :3]) < 0.02
    state = states["bf16"]
    assert state.learning is not state.objective
    for master, work in zip(state.objective.parameters(), state.learning.parameters(), strict=True):
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), work)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(checkpoint.Progress(6, 0.0), state.objective, state.ema, state.optimizer)
    checkpoints.finish()
    path = tmp_path / "0000006"
    assert {t.dtype for t in checkpoint.read_tensors(path, "model").values()} == {torch.float32}
    again = setup(tiny(train__weights="bf16", **changes))
    checkpoint.load(path, again.objective, again.ema, again.optimizer)
    for s in (state, again):
        for i, batches in enumerate(open_loader(s, 6, 8), 6):
            train_step(s, i, batches)
    for a, b in zip(state.objective.parameters(), again.objective.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend__optimizer": "csrc"}, "but --train.precision is 'fp32', expected 'bf16'"),
        ({"backend__optimizer": "torch", **BF16}, "but the optimizer is 'torch', expected 'csrc' or 'reference'"),
        ({"backend__optimizer": "csrc", "optim__accumulate": 2, **BF16}, "but --optim.accumulate is 2"),
    ],
)
def test_bf16_weights_that_cannot_be_are_refused(store: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=f"--train.weights is 'bf16', {message}"):
        setup(tiny(data__path=str(store), train__weights="bf16", **changes))
