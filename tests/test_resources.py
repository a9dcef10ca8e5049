"""`python -m bench.resources`: kernels compile for GPUs that are not here, and what must not be is named."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from bench.resources import SHARED_LIMIT, Row

ROOT = Path(__file__).parents[1]
GOOD = Row(90, "attention", "attention_forward", 4, 195, 0, 92_160, 37, 0, 4, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"spill_bytes": 32, "kernel": "triton_poi_fused_sinh_0"}, "spills 32 bytes"),
        ({"spill_bytes": 40, "kernel": "triton_poi_fused_cat_cos_mul_sin_3"}, "spills 40 bytes"),
        ({"fp64": 1}, "has 1 instructions in double precision, expected none"),
        ({"shared": SHARED_LIMIT[90] + 1}, "takes 232449 bytes of shared memory, at most 232448 fit"),
        ({"hmma": 1}, "has 37 HGMMA and 1 HMMA instructions, expected HGMMA only"),
        ({"hgmma": 0}, "has 0 HGMMA"),
        ({"waits": 37}, "waits 37 times for 37 HGMMA instructions"),
        ({"arch": 80, "shared": 200_000, "wants_hgmma": False}, "takes 200000 bytes of shared memory, at most 166912"),
    ],
)
def test_problems_are_seen(change: dict[str, Any], message: str) -> None:
    assert GOOD.problem is None
    assert message in str(replace(GOOD, **change).problem)


def test_a_sine_may_reduce_huge_angles() -> None:
    assert replace(GOOD, kernel="triton_poi_fused_cat_cos_mul_sin_3", spill_bytes=32, fp64=12).problem is None


PROGRAM = """
import os, sys, torch, triton, triton.language as tl
from pathlib import Path
from bench import resources

@triton.jit
def _greedy(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i[:, None] * N + i[None, :])
    tl.store(y + i[:, None] * N + i[None, :], tl.dot(a, a).to(tl.float16) + tl.sum(a, 0)[None, :])

@triton.jit
def _double(x, y, eps: tl.float64, N: tl.constexpr):  # as Inductor declares a Python float
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i) + eps)

@triton.jit
def _single(x, y, EPS: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    wide = tl.load(x + i).to(tl.int64).to(tl.float32)
    tl.store(y + i, wide + EPS)

x = torch.zeros(256, 256, dtype=torch.float16)
def run():
    _greedy[(1,)](x, x, N=256, num_warps=4)
    _double[(1,)](x, x, 1e-6, N=256)
    _single[(1,)](x, x, EPS=1e-6, N=256)

case = resources.Case("all", run, 0)
resources.cases = lambda: [case]
resources.MATRIX_KERNELS.add("greedy")
sys.argv = ["resources", "--arch", "90"]
rows = [resources.measure(90, case, name, kernel) for name, kernel in resources.compiled(90, case.run)]
print(resources.table(rows))
greedy, double, single = rows
assert greedy.spill_bytes > 0 and greedy.fp64 == 0 and "spills" in greedy.problem, greedy
assert double.fp64 > 0 and "double precision" in double.problem, double
assert single.fp64 == 0 and single.problem is None, single

def content(row):
    return {**vars(row), "case": ""}

found = resources.collected(Path(os.environ["TRITON_CACHE_DIR"]))
assert sorted(map(content, found), key=str) == sorted(map(content, rows), key=str), found
"""


def test_spills_and_double_precision_are_found(tmp_path: Path) -> None:
    """A product of 256 x 256 on four warps, 512 registers a thread; compiled here, and from a cache."""
    program, cache = tmp_path / "greedy.py", tmp_path / "cache"  # a file: Triton reads a kernel's source
    program.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, str(program)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| all \| greedy \| 90 \|", done.stdout)
    command = [sys.executable, "-m", "bench.resources", "--collected"]
    done = subprocess.run([*command, cache], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "greedy on sm_90 spills" in done.stderr and "double on sm_90 has" in done.stderr
    done = subprocess.run([*command, tmp_path / "none"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "has no file *.cubin, expected a cache of Triton's" in done.stderr
