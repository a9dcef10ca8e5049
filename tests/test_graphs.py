"""A captured step is the step: nothing the host decides is frozen in it, and all it reads is its own memory.

Without a GPU `make_fx` stands in for the capture: it records the step's operations on the tensors they touch without
running them, backward and optimizer included, and replays them.
"""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import tiny
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lsep.errors import UserError
from lsep.graphs import WARM_UP, Graphs, Replay
from lsep.step import State, open_loader, setup, train_step


class Recorded(Graphs):
    """`Graphs` with operations recorded by `make_fx` in place of a CUDA graph."""

    captures = 0

    def warm_up(self, call: Replay) -> Tensor:
        return call()

    def capture(self, call: Replay) -> Replay:
        self.captures += 1
        with patch.dict(
            torch.fx.traceback.current_meta
        ):  # checkpoint policies leave their marks for later graphs there
            recorded = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)()
        return torch.no_grad()(recorded)


def curve(state: State, steps: int) -> Tensor:
    return torch.stack([train_step(state, i, b) for i, b in enumerate(open_loader(state, 0, steps))])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"probe__branch": "paper", "backend__optimizer": "csrc"},
        {"train__precision": "bf16", "backend__optimizer": "csrc"},
        {"optim__accumulate": 2, "train__memory": "recompute-blocks"},
        {"train__memory": "recompute-elementwise"},
        {"optim__ema_extra": (0.8,), "optim__ema_profiles": (0.1,)},
    ],
)
def test_replays_are_steps(store: Path, changes: dict[str, object]) -> None:
    """Other batches, epochs, rates and the end of the probe: a replay gives the same bits as the step itself."""
    steps = 16  # of 4 to an epoch
    config = tiny(**{
        "data__path": str(store), "optim__schedule": "cosine", "optim__warmup_steps": 6, "train__steps": steps,
        "probe__end_step": 10, "probe__decay_start_epoch": 0, "backend__optimizer": "reference", **changes,
    })  # fmt: skip
    eager, recorded = setup(config), setup(config)
    recorded.compute = graphs = Recorded(recorded.compute, recorded.device)
    assert torch.equal(curve(recorded, steps), curve(eager, steps))
    assert graphs.captures == 2 and steps > 10 + WARM_UP
    of_both = [(s.objective, s.ema, *s.averages.values()) for s in (recorded, eager)]
    for modules in zip(*of_both, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in modules), strict=True))
    assert len(of_both[0]) == 2 + 2 * ("optim__ema_extra" in changes)


def test_no_graph_is_kept_while_the_other_step_warms_up() -> None:
    """A graph holds the memory of a whole step, and so does a warm-up: both at once would be two steps."""
    seen: list[tuple[str, bool, bool]] = []

    class Watched(Graphs):
        def warm_up(self, call: Replay) -> Tensor:
            other = self.graphs[not call().item()]
            seen.append(("warm-up", bool(call().item()), other.replay is not None))
            return call()

        def capture(self, call: Replay) -> Replay:
            probe = bool(call().item())
            seen.append(("capture", probe, self.graphs[not probe].replay is not None))
            return call

    graphs = Watched(lambda probe, batches: torch.tensor(probe), torch.device("cpu"))
    for probe in [True] * (WARM_UP + 2) + [False] * (WARM_UP + 2) + [True, False] * 2:
        assert bool(graphs(probe, [])) == probe
    assert seen == [
        *[("warm-up", True, False)] * WARM_UP, ("capture", True, False),
        *[("warm-up", False, False)] * WARM_UP, ("capture", False, False),
        ("capture", True, True),  # nothing to warm up any more: both share a pool from here on
    ]  # fmt: skip


def test_graphs_that_cannot_be_are_refused(store: Path) -> None:
    with pytest.raises(UserError, match=r"--train.graphs is 'on', but a CUDA graph needs a GPU"):
        setup(tiny(data__path=str(store), train__graphs="on"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", ["off", "block", "model"])
def test_a_graph_on_a_gpu_has_the_bits_of_the_step(store: Path, compiled: str) -> None:
    steps = 16
    changes = {"data__path": str(store), "train__device": "cuda", "train__compile": compiled, "probe__end_step": 10}
    curves = [
        curve(setup(tiny(backend__optimizer="reference", train__graphs=graphs, **changes)), steps).cpu()
        for graphs in ("off", "on")
    ]
    assert torch.equal(*curves)
