"""The benches on the device `cuda` of a machine without a GPU: they run to their end, whatever the values are."""

import json
from pathlib import Path
from typing import Any

import pytest
import standin_run

from bench.schedule import SCHEDULE

pytestmark = [
    pytest.mark.standin,
    pytest.mark.skipif(standin_run.missing() is not None, reason=str(standin_run.missing())),
]
ROOT = Path(__file__).parent.parent
MEANT = ("running", "hung", "ended", "could not be used")
"""Words of failures that are not a value's: values mean nothing here, so that checks of them fail as they should."""


def sections(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    assert found["finished"] == found["planned"]
    return {s["name"]: s for s in found["sections"]}


def run(tmp_path: Path, *only: str) -> dict[str, Any]:
    """bench.gpu's sections; none may raise an error, hang or die."""
    file = tmp_path / "gpu.json"
    command = ["-m", "bench.gpu", "--smoke", "--seed", "7", "--only", *only, "--json", str(file)]
    done = standin_run.run(command, cwd=ROOT, timeout=900)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert not done.log.violations
    by = sections(file)
    for name, section in by.items():
        assert "tracebacks" not in section["details"], (name, section["details"]["tracebacks"])
        assert not [text for text in section["failures"] if any(word in text for word in MEANT)], name
    return by


def test_the_rows_of_most_worth_and_the_compiled_block(tmp_path: Path) -> None:
    by = run(tmp_path, "step", "compiled")
    rows = {row["variant"]: row for row in by["step"]["rows"]}
    cudnn, cublaslt = "shared-0.8+backend.attention=cudnn", "shared-0.8+backend.mlp=cublaslt"
    assert list(rows) == ["plain", "shared-0.8", cudnn, cublaslt] and not by["step"]["failures"]
    for row in rows.values():
        program = {what: row[what] for what in ("kernels", "optimizer", "bf16 weights", "compile", "graphs")}
        assert program == {
            "kernels": "triton", "optimizer": "csrc", "bf16 weights": "yes", "compile": "block", "graphs": "yes",
        }  # fmt: skip
    assert rows[cudnn]["attention"] == "cudnn" and rows[cublaslt]["MLP"] == "cublaslt"
    assert all(row["checked"] >= 18 for row in by["compiled"]["rows"])
    # Nothing is computed here: a check that passed would check nothing.
    assert all(row["ok"] == "NO" for row in by["compiled"]["rows"])


@pytest.mark.parametrize("only", [["correctness", "determinism"], ["kernels", "csrc", "candidates"], ["training"]])
def test_every_other_section_runs_to_its_end(tmp_path: Path, only: list[str]) -> None:
    by = run(tmp_path, *only)
    assert all(by[name]["rows"] for name in only if name != "csrc")
    if "correctness" in only:
        assert len(by["correctness"]["rows"]) > 40


def test_the_others_with_the_authors_step(tmp_path: Path) -> None:
    by = run(tmp_path, "step", "variants", "pretraining")
    assert [row["variant"] for row in by["variants"]["rows"]] == ["authors", "paper", "shared-0", "shared-0.2", "fp8"]
    assert any("time / authors" in text for text in by["variants"]["notes"])
    assert list(SCHEDULE)[-1] == "pretraining" and by["pretraining"]["rows"]
