"""What is computed again changes no bit of a step, and only what the policy names is computed again."""

from contextlib import nullcontext

import pytest
import torch
from conftest import DEVICE, MANIFEST, lively, random_batch, relative_error, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lsep.checks import resolve
from lsep.objective import Objective
from lsep.plan import branch_plan
from lsep_kernels import ops

POLICIES = ["keep", "recompute-elementwise", "recompute-blocks"]


def step(policy: str, compiled: bool = False, **changes: object) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients of one step, and the FLOPs of its matrix products, forward and backward."""
    config = resolve(tiny(train__memory=policy, **changes), MANIFEST)
    objective = lively(Objective(config, MANIFEST))
    forward = torch.compile(objective, fullgraph=True, backend="aot_eager") if compiled else objective
    counter = FlopCounterMode(display=False)
    with nullcontext() if compiled else counter:
        losses = forward(random_batch(10), branch_plan(config), torch.tensor(3), torch.tensor(0))
        losses.total.backward()
    return [losses.total, *(p.grad for p in objective.parameters() if p.grad is not None)], counter.get_total_flops()


@pytest.mark.parametrize("branch", [("shared", None), ("shared", 0.0), ("paper", None)])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_bits_are_the_same(policy: str, branch: tuple[str, float | None]) -> None:
    changes = {"probe__branch": branch[0], "probe__extra_fraction": branch[1]}
    for found, expected in zip(step(policy, **changes)[0], step("keep", **changes)[0], strict=True):
        assert torch.equal(found, expected)


def test_products_are_computed_once_or_twice() -> None:
    keep, elementwise, blocks = (step(policy)[1] for policy in POLICIES)
    assert elementwise == keep
    assert 1.2 * keep < blocks < 4 / 3 * keep  # the blocks' forward again: at most a third of forward and backward


def test_fewer_bytes_are_kept() -> None:
    """Tensors that live from the forward to the backward, as autograd packs them."""
    kept = []
    for policy in POLICIES:
        config = resolve(tiny(train__memory=policy, model__depth=6), MANIFEST)
        objective = lively(Objective(config, MANIFEST))
        before = {t.untyped_storage().data_ptr() for t in (*objective.parameters(), *objective.buffers())}
        losses = objective(random_batch(10), branch_plan(config), torch.tensor(3), torch.tensor(0))
        kept.append(_bytes_behind(losses.total.grad_fn, before))
    assert kept[2] < 0.5 * kept[0]


def _bytes_behind(node: object, known: set[int]) -> int:
    """Bytes of the tensors saved directly in the graph of `node`; what a checkpoint holds is computed again."""
    total, seen, stack = 0, set(known), [node]
    while stack:
        at = stack.pop()
        if at is None or id(at) in seen:
            continue
        seen.add(id(at))
        for name in dir(at):
            if not name.startswith("_raw_saved_"):
                continue
            for raw in value if isinstance(value := getattr(at, name), tuple | list) else (value,):
                tensor = raw.data if raw is not None else None
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in seen:
                    seen.add(tensor.untyped_storage().data_ptr())
                    total += tensor.untyped_storage().nbytes()
        stack += [n for n, _ in at.next_functions]  # type: ignore[attr-defined]
    return total


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_one_graph(policy: str) -> None:
    for found, expected in zip(step(policy, compiled=True)[0], step("keep")[0], strict=True):
        assert relative_error(found, expected) < 1e-5


class Calls(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("policy", "calls"), [("keep", 2), ("recompute-elementwise", 2), ("recompute-blocks", 4)])
def test_an_mlp_in_one_operator(policy: str, calls: int) -> None:
    """Two blocks of three call it; the same bits, and no matrix product twice but where blocks are."""
    pytest.importorskip("triton")
    chosen = ops.choose("reference", "sdpa", DEVICE, torch.float32, 16, 16, mlp="triton")
    batch = type(b := random_batch(10))(*(part.to(DEVICE) for part in b.tensors()))
    step, epoch = (torch.tensor(i, device=DEVICE) for i in (3, 0))
    found = []
    for name in ("keep", policy):
        config = resolve(tiny(train__memory=name), MANIFEST)
        objective = lively(Objective(config, MANIFEST, chosen)).to(DEVICE)
        with Calls() as seen:
            losses = objective(batch, branch_plan(config), step, epoch)
            losses.total.backward()
        found.append([losses.total, *(p.grad for p in objective.parameters() if p.grad is not None)])
    assert seen.names.count("mlp") == calls and seen.names.count("mlp_backward") == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
