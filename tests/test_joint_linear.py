"""Many linear maps as one matrix product: values, gradients, memory, and the model that uses it."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import MANIFEST, lively, random, relative_error, tiny
from torch import nn

from lsep.checks import resolve
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.step import setup
from lsep_kernels.joint_linear import join, joint_linear

SIZES = (12, 5, 12)


def maps(dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(7, rows).to(dtype) for rows in SIZES]


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_maps(dtype: torch.dtype, joined: bool) -> None:
    separate = maps(dtype)
    linears = copy.deepcopy(separate)
    if joined:
        join([m.weight for m in linears])
        join([m.bias for m in linears])
    xs = [random(4, 7).to(dtype).requires_grad_() for _ in range(2)]
    back = random(4, sum(SIZES), seed=1).to(dtype)
    got = joint_linear(xs[0], [m.weight for m in linears], [m.bias for m in linears])
    wanted = torch.cat([m(xs[1]) for m in separate], dim=1)
    got.backward(back)
    wanted.backward(back)
    limit = 1e-12 if dtype == torch.float64 else 0.01
    assert relative_error(got, wanted) < limit
    pairs = [(xs[0], xs[1])] + [(p, q) for a, b in zip(linears, separate, strict=True)
                                for p, q in zip(a.parameters(), b.parameters(), strict=True)]  # fmt: skip
    for ours, theirs in pairs:
        assert ours.grad is not None and theirs.grad is not None and ours.grad.is_contiguous()
        assert relative_error(ours.grad, theirs.grad) < limit


def test_joined_weights_are_not_copied() -> None:
    """They lie behind one another and stay there when an optimizer writes them in place."""
    linears = maps()
    before = [m.weight.detach().clone() for m in linears]
    join([m.weight for m in linears])
    place = linears[0].weight.data_ptr()
    for m, weight in zip(linears, before, strict=True):
        assert m.weight.data_ptr() == place and torch.equal(m.weight, weight)
        place += m.weight.numel() * 4
    with torch.no_grad():
        linears[1].weight.fill_(2.0)
    y = joint_linear(torch.ones(1, 7), [m.weight for m in linears], [torch.zeros(n) for n in SIZES])
    assert torch.equal(y[0, 12:17], torch.full((5,), 14.0))


def test_operator() -> None:
    linears = maps()
    arguments = (random(4, 7).requires_grad_(), [m.weight for m in linears], [m.bias for m in linears])
    torch.library.opcheck(torch.ops.lsep.joint_linear.default, arguments)


@pytest.mark.parametrize("extra", [0.0, 0.4])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_with_joint_modulations_computes_the_same(extra: float, depth: int, compiled: bool) -> None:
    config = resolve(tiny(probe__depth=depth), MANIFEST)
    plain = lively(Objective(config, MANIFEST)).double().model
    joint = copy.deepcopy(plain)
    joint.join_modulations()
    if compiled:
        compiler = torch.compile(backend="aot_eager", fullgraph=True)
        joint.forward_with_probe = compiler(joint.forward_with_probe)  # type: ignore[method-assign]
    n, second = 5, int(5 * extra)
    x, t = random(n, 3, 8, 8).double(), torch.linspace(0.1, 0.9, n).double()
    y, extra_y = torch.arange(n), torch.full((second,), plain.null_class)
    window = torch.full((n, 16), 1 / 16).double()
    results = []
    for model in (plain, joint):
        patches, features = model.forward_with_probe(x, t, y, extra_y, depth, window)
        (patches.sum() + features.square().sum()).backward()
        results.append((patches, features))
    # float64 but for the sines of t, which are float32 in both
    for got, wanted in zip(*results, strict=True):
        assert relative_error(wanted, got) < 1e-6
    for (name, p), q in zip(joint.named_parameters(), plain.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None, name
            continue
        assert q.grad is not None and relative_error(p.grad, q.grad) < 1e-6, name


def test_joint_modulations_need_weights_in_the_type_of_the_products(store: Path) -> None:
    with pytest.raises(UserError, match="--backend.modulation is 'joint', but the weights are float32"):
        setup(tiny(data__path=str(store), backend__modulation="joint"))
    bf16 = {"data__path": str(store), "train__precision": "bf16", "backend__optimizer": "reference"}
    assert setup(tiny(**bf16)).learning.model.joint_modulation
    assert not setup(tiny(**bf16, backend__modulation="block")).learning.model.joint_modulation
