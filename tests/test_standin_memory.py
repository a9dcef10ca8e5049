"""`lsep.cost.memory` beside torch's allocator, on the stand-in for a GPU: the real step, compiled and captured.

The committed table (bench/results/memory.md) has all presets, policies and batches, and tests/test_cost.py holds the
model to it. These cases hold the table's program: each preset, policy and batch comes once, and what else changes what
a step keeps.
"""

import json
from pathlib import Path

import pytest
import standin_run

pytestmark = [
    pytest.mark.standin,
    pytest.mark.skipif(standin_run.missing() is not None, reason=str(standin_run.missing())),
]
ROOT = Path(__file__).parents[1]
WITHIN = 0.05
CASES = (
    "sit-xl-2-256:256+train.memory=keep",
    "sit-l-2-256:128+train.memory=recompute-elementwise",
    "sit-b-2-256:32+train.memory=recompute-blocks",
    "sit-b-2-256:256+optim.accumulate=2",
    "sit-b-2-256:128+probe.branch=paper+probe.pool_before_fc2=false",
)
TABLE = {row["case"]: row for row in json.loads((ROOT / "bench" / "results" / "memory.json").read_text())["cases"]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """All cases, measured in one process."""
    file = tmp_path_factory.mktemp("memory") / "memory.json"
    command = ["-m", "bench.memory", "--within", str(WITHIN), "--json", str(file), "--cases", *CASES]
    done = standin_run.run(command, memory=160 * 2**30, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert not done.log.violations
    return {row["case"]: row for row in json.loads(file.read_text())["cases"]}


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_what_is_computed(found: dict[str, dict[str, int]], name: str) -> None:
    row = found[name]
    assert row["peak"] > row["after setup"] > 0
    assert row["computed"] == pytest.approx(row["peak"], rel=WITHIN)


@pytest.mark.parametrize("name", [name for name in CASES if name in TABLE])
def test_the_committed_table_is_of_this_program(found: dict[str, dict[str, int]], name: str) -> None:
    """Within what garbage that Python has not collected yet makes of it."""
    assert found[name]["peak"] == pytest.approx(TABLE[name]["peak"], rel=0.02)


def test_xl_runs_on_80_gib_as_computed() -> None:
    """What `lsep.cost.fit` says fits does, with what the allocator reserves: B = 256 in two micro-batches."""
    command = ["-m", "bench.memory", "--within", str(WITHIN), "--cases", "sit-xl-2-256:256+optim.accumulate=2"]
    done = standin_run.run(command, card="h100", memory=80 * 2**30, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
