"""kernels/operator.py: what a launch refuses, and that only a compiler's tensors take the way through `wrap_triton`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from conftest import DEVICE

from lsep_kernels import gelu_pool
from lsep_kernels.operator import launch

ROOT = Path(__file__).parents[1]


@triton.jit
def _scaled_kernel(x_ptr, y_ptr, scale, FACTOR: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) * scale * FACTOR)


def test_floats_are_constants() -> None:
    """Inductor types a Python float as double, and everything it meets becomes double."""
    x, y = torch.ones(16, device=DEVICE), torch.empty(16, device=DEVICE)
    launch(_scaled_kernel, (1,), x, y, 2, FACTOR=0.5, BLOCK=16)
    assert torch.equal(x, y)
    for args, meta in (((x, y, 2.0), {}), ((x, y), {"scale": 2.0})):
        with pytest.raises(TypeError, match="_scaled_kernel: scale is the Python float 2.0, .* expected .* tl.constex"):
            launch(_scaled_kernel, (1,), *args, FACTOR=0.5, BLOCK=16, **meta)


@triton.jit
def _streaming_kernel(x_ptr, stream):  # type: ignore[no-untyped-def]
    tl.store(x_ptr, stream)


def test_a_reserved_name_is_refused() -> None:
    """Inductor's launcher is a function of the kernel's arguments and of `stream`."""
    with pytest.raises(TypeError, match="_streaming_kernel: stream is the stream of torch.compile's launch"):
        launch(_streaming_kernel, (1,), torch.empty(1, device=DEVICE), 1)


def test_memory_is_launched_on_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 refuses interpreted kernels in `wrap_triton`."""

    def refuse(kernel: object) -> None:
        raise RuntimeError("wrap_triton only works on functions annotated with triton.jit or triton.autotune")

    monkeypatch.setattr(torch.library, "wrap_triton", refuse)
    x = torch.ones(1, 16, 16, device=DEVICE)
    assert torch.equal(gelu_pool.pool(x, x[:, 0] / 16), x[:, 0])


PROGRAM = """
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from bench.resources import compiled
from lsep_kernels import adaln, cublaslt, mlp

def tensor(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

def norm(x, m):
    return adaln.norm_modulate(x, m, m)

weights = tensor(128, 64), tensor(128), tensor(64, 128), tensor(64)
def products(x, *weights):  # cuBLASLt's two need a GPU
    return x.new_zeros(len(x), 128), x.new_zeros(len(x), 128)
cublaslt.linear_gelu, cublaslt.linear_gelu_backward = products, lambda dy, w, z: (z.clone(), z[0].clone())

def eager():
    for _ in range(3):
        norm(tensor(2, 16, 64), tensor(2, 64)).sum().backward()
        mlp.mlp_cublaslt(tensor(1, 64, 64), *weights).sum().backward()

launched = {name for name, _ in compiled(90, eager)}
assert launched == {"adaln_forward", "adaln_backward", "row_sums", "mlp_gelu"}, launched
assert not kernel_side_table.id_to_kernel and not kernel_side_table.constant_args

graphs = []
def keep(graph, inputs):
    graphs.append(graph.code)
    raise RuntimeError("seen, and nothing here could run it")

try:
    torch.compile(norm, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(tensor(2, 16, 64), tensor(2, 64))
except Exception as error:
    assert graphs, error
assert "triton_kernel_wrapper" in graphs[0], graphs
"""


def test_only_compilers_get_a_wrapped_kernel(tmp_path: Path) -> None:
    """Eager operators, Triton's and opaque ones, leave the table of wrapped kernels empty; compilers see the kernel."""
    program = tmp_path / "launches.py"
    program.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(program)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
