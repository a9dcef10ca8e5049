"""`python -m bench.resources`: kernels compile for GPUs that are not here, and what must not be is named."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
from bench.resources import SHARED_LIMIT, Row

ROOT = Path(__file__).parents[1]
GOOD = Row(90, "attention", "attention_forward", 4, 195, 0, 92_160, 37, 0, 4, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared": SHARED_LIMIT[90] + 1}, "takes 232449 bytes of shared memory, at most 232448 fit"),
        ({"hmma": 1}, "has 37 HGMMA and 1 HMMA instructions, expected HGMMA only"),
        ({"hgmma": 0}, "has 0 HGMMA"),
        ({"waits": 37}, "waits 37 times for 37 HGMMA instructions"),
        ({"arch": 80, "shared": 200_000, "wants_hgmma": False}, "takes 200000 bytes of shared memory, at most 166912"),
    ],
)
def test_problems_are_seen(change: dict[str, int], message: str) -> None:
    assert GOOD.problem is None
    assert message in str(replace(GOOD, **change).problem)


PROGRAM = """
import sys, torch, triton, triton.language as tl
from bench import resources

@triton.jit
def _greedy(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i[:, None] * N + i[None, :])
    tl.store(y + i[:, None] * N + i[None, :], tl.dot(a, a).to(tl.float16) + tl.sum(a, 0)[None, :])

x = torch.zeros(256, 256, dtype=torch.float16)
case = resources.Case("greedy", lambda: _greedy[(1,)](x, x, N=256, num_warps=4), 0)
resources.cases = lambda: [case]
resources.MATRIX_KERNELS.add("greedy")
sys.argv = ["resources", "--arch", "90"]
rows = [resources.measure(90, case, name, kernel) for name, kernel in resources.compiled(90, case.run)]
print(resources.table(rows))
assert rows[0].spill_bytes > 0 and "spills" in rows[0].problem, rows
"""


def test_a_kernel_that_spills_is_found(tmp_path: Path) -> None:
    """A product of 256 x 256 on four warps: 512 registers a thread."""
    program = tmp_path / "greedy.py"  # a file: Triton reads a kernel's source
    program.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(program)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| greedy \| greedy \| 90 \|", done.stdout)
