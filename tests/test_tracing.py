"""What torch.compile sees of the kernels on a GPU, without one: `triton_op`s traced down to their launches.

In the interpreter an operator is opaque. Here, in a process without it, a driver that launches nothing stands in for a
GPU, and the graphs that would go to Inductor are looked at.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]

PROGRAM = """
import torch
from torch._dynamo.backends.common import aot_autograd
from triton.runtime import driver
from bench.resources import CompileOnly
from lsep_kernels import adaln, attention, draws, fp8, gelu_pool, interpolate, mlp, probe_head, velocity_loss

driver.set_active(CompileOnly(90))
graphs = []


def look(module, example):
    launches = [n for n in module.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    for launch in launches:
        for name in launch.kwargs["tensors_to_clone"]:
            written = launch.kwargs["kwargs"][name]
            if "getitem" in str(written.target) and written.args[0] in launches:  # by an earlier launch as well
                continue
            assert "empty" in str(written.target), f"{name}, taken to be written, comes from {written.target}"
    graphs.append(len(launches))

    def zeros(args):
        found = module.graph.output_node().args[0]
        return [torch.zeros(o.meta["val"].shape, dtype=o.meta["val"].dtype) if hasattr(o, "meta") else o for o in found]

    zeros._boxed_call = True
    return zeros


def graphs_of(function, *shapes, dtype=torch.bfloat16):
    graphs.clear()
    torch._dynamo.reset()
    inputs = [torch.zeros(s, dtype=dtype, requires_grad=True) for s in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))(*inputs)
    out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    if out:
        sum(o.float().sum() for o in out).backward()
    return graphs.copy()


window, labels, weights = torch.zeros(2, 64), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
v, ids, epoch = torch.zeros(2, 4, 16, 16), torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
found = {
    "norm_modulate": graphs_of(lambda x, m: adaln.norm_modulate(x, *m.chunk(2, -1)), (2, 64, 64), (2, 128)),
    "gate_residual_norm_modulate": graphs_of(
        lambda x, y, m: adaln.gate_residual_norm_modulate(x, m.chunk(3, -1)[0], y, *m.chunk(3, -1)[1:]),
        (2, 64, 64), (2, 64, 64), (2, 192)),
    "norm_modulate, fp8": graphs_of(
        lambda x, m: adaln.norm_modulate(x, *m.chunk(2, -1), quantize=True)[0], (2, 64, 64), (2, 128)),
    "fp8 linear": graphs_of(fp8.linear, (2, 64, 64), (32, 64), (32,)),
    "fp8 mlp": graphs_of(fp8.mlp, (2, 64, 64), (128, 64), (128,), (64, 128), (64,)),
    "attention": graphs_of(lambda x: attention.attention(x, 2), (2, 64, 3 * 144)),
    "gelu_pool": graphs_of(lambda x: gelu_pool.gelu_pool(x, window), (2, 64, 64)),
    "pool": graphs_of(lambda x: gelu_pool.pool(x, window), (2, 64, 64)),
    "mlp": graphs_of(mlp.mlp, (2, 64, 64), (256, 64), (256,), (64, 256), (64,)),
    "mlp, weights in float32": graphs_of(
        lambda x, *weights: mlp.mlp(x.bfloat16(), *weights),
        (2, 64, 64), (256, 64), (256,), (64, 256), (64,), dtype=torch.float32),
    "probe_head": graphs_of(
        lambda x, a, b, w, c: probe_head.probe_head(x, a, b, w, c, labels, weights, 0.1, torch.bfloat16),
        (4, 64), (64,), (64,), (10, 64), (10,), dtype=torch.float32),
    "velocity_loss": graphs_of(lambda x: velocity_loss.velocity_loss(x, v, 2), (2, 64, 16)),
    "interpolate": graphs_of(
        lambda t: interpolate.interpolate(v, ids, epoch, t, 2**62, "moments", "linear", 0.0, 1.0, (0, 1)), (2,)),
    "uniform": graphs_of(lambda t: t + draws.uniform(2**63, 2, epoch, ids)[:, 0], (2,))[:1],
    "normal": graphs_of(lambda t: t + draws.normal(2**63, 2, epoch, ids, (1,))[:, 0], (2,))[:1],
    "windows": graphs_of(lambda t: t + draws.windows(1, (5, 4), epoch, epoch, ids, (2, 4), 4)[:, 0], (2,))[:1],
}
print(found)
assert found == {
    "norm_modulate": [1, 2], "gate_residual_norm_modulate": [1, 2], "norm_modulate, fp8": [1, 2],
    "fp8 linear": [2, 3], "fp8 mlp": [4, 6], "attention": [1, 2], "gelu_pool": [1, 1],
    "pool": [1, 1], "probe_head": [6, 0], "velocity_loss": [1, 1], "interpolate": [1],
    "mlp": [1, 2], "mlp, weights in float32": [1, 2],
    "uniform": [1], "normal": [1], "windows": [1],
}
"""


def test_launches_are_in_one_graph_each_way(tmp_path: Path) -> None:
    """Launches of the forward and of the backward graph; nothing but fresh memory is written."""
    program = tmp_path / "trace.py"
    program.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
