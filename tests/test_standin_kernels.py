"""The binaries that a training step really runs, Triton's and Inductor's, of the width of SiT-XL/2 at its batch.

Two steps are compiled, captured and replayed on the stand-in for a GPU (`standin_run`): with compiled blocks, as by
default, and with the whole model compiled. Blocks of a shape share their code, so that a few stand for all 28.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

standin_run = pytest.importorskip("standin_run")
pytest.importorskip("triton")

pytestmark = [
    pytest.mark.standin,
    pytest.mark.skipif(standin_run.missing() is not None, reason=str(standin_run.missing())),
]
if standin_run.missing() is None:
    from bench.resources import Row, collected

DEPTH = 3
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from bench.variants import with_data
from lsep.config import override
from lsep.graphs import WARM_UP
from lsep.inductor import COMPILE
from lsep.presets import PRESETS
from lsep.step import open_loader, setup, train_step

folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
launched, run = {}, CachingAutotuner.run

def record(self, *args, **kwargs):
    if id(self) not in launched:  # before it is run, and with that timed, for the first time
        count = max(len(self.configs or ()), len(self.launchers))
        launched[id(self)] = self.fn.__name__, self.heuristic_type.name, count
        record.held.append(self)
    return run(self, *args, **kwargs)

record.held = []
CachingAutotuner.run = record
state = setup(with_data(override(PRESETS["sit-xl-2-256"], changes), folder / "data"))
steps = WARM_UP + 2
wrapped = []
for i, batches in enumerate(open_loader(state, 0, steps)):
    train_step(state, i, batches)
    wrapped.append(len(kernel_side_table.id_to_kernel))
torch.cuda.synchronize()
found, sums = list(launched.values()), {}
for name, keywords in (("inductor", {}), ("lsep", COMPILE)):  # a sum of partial sums, such as Inductor times
    launched.clear()
    torch._dynamo.reset()
    torch.compile(lambda x: (2 * x).sum(1), **keywords)(torch.zeros(256, 8, 1152, device="cuda"))
    sums[name] = [count for _, kind, count in launched.values() if "REDUCTION" in kind]
(folder / "launched.json").write_text(json.dumps({"autotuners": found, "wrapped": wrapped, "sums": sums}))
"""


class Step:
    """What the steps left behind."""

    def __init__(self, folder: Path, compiled: str) -> None:
        (folder / "step.py").write_text(PROGRAM)
        changes = {"model.depth": DEPTH, "probe.depth": 2, "train.compile": compiled}
        caches = {f"{name}_CACHE_DIR": str(folder / name.lower()) for name in ("TRITON", "TORCHINDUCTOR")}
        command = [str(folder / "step.py"), str(folder), json.dumps(changes)]
        done = standin_run.run(command, card="h200", env=caches, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        self.log = done.log
        self.rows: list[Row] = collected(folder)
        found: dict[str, Any] = json.loads((folder / "launched.json").read_text())
        self.autotuners: list[tuple[str, str, int]] = [tuple(x) for x in found["autotuners"]]
        self.wrapped: list[int] = found["wrapped"]
        self.sums: dict[str, list[int]] = found["sums"]


@pytest.fixture(scope="module", params=["block", "model"])
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Step:
    return Step(tmp_path_factory.mktemp(request.param), request.param)


def test_binaries_keep_the_rules(step: Step) -> None:
    """No spill, no double precision (but in a sine of huge angles), WGMMA in attention and the probe's products."""
    assert [f"{row.kernel} {row.problem}" for row in step.rows if row.problem] == []
    names = {row.kernel for row in step.rows}
    expected = {
        "adaln_forward", "adaln_backward", "attention_forward", "attention_backward_q", "attention_backward_kv",
        "mlp_gelu", "mlp_gelu_backward", "row_sums", "token_pool_forward", "token_pool_backward", "probe_norm",
        "probe_matmul", "probe_loss", "probe_norm_backward", "interpolate", "uniform", "windows",
        "velocity_loss_forward", "velocity_loss_backward",
    }  # fmt: skip
    assert names >= expected
    assert any(name.startswith("triton_") for name in names), "no kernel of Inductor's was collected"
    for row in step.rows:
        if row.kernel.startswith("attention"):
            assert row.hgmma > 0 and row.hmma == 0


def test_no_order_of_sums_is_timed(step: Step) -> None:
    """What Inductor launches has one configuration, or is pointwise, where all give the same bits."""
    kinds = Counter(kind for _, kind, _ in step.autotuners)
    assert kinds["USER_AUTOTUNE"] > 5 and kinds["REDUCTION"] > 2 and kinds["POINTWISE"] > 2, kinds
    assert [x for x in step.autotuners if x[2] != 1 and x[1] != "POINTWISE"] == []
    assert step.sums["inductor"][0] > 1 and step.sums["lsep"] == [1], step.sums


def test_steps_leave_no_wrapped_kernel(step: Step) -> None:
    """What the first step compiled is all: a launch outside of a compiler makes no entry."""
    assert step.wrapped[0] > 0 and set(step.wrapped) == {step.wrapped[0]}


def test_draws_are_a_launch_each(step: Step) -> None:
    """Times, windows and the noise; of integers on torch's own kernels, 564 in the past, a few for labels remain."""
    assert step.log.violations == []
    captured = step.log.captured()
    count = Counter(x.name for x in captured if x.kind == "triton")
    assert count["_uniform_kernel"] == count["_windows_kernel"] == count["_interpolate_kernel"] == 1
    assert count["_attention_forward_kernel"] == DEPTH
    assert not [x.name for x in captured if "BitwiseXor" in x.name or "rshift" in x.name]
