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
UNMEANT = ("not done after", "ended early", "its process ended", "could not be used", "Error:")
"""Of failures that are no value's: values mean nothing here, and checks of them fail as they should."""


def sections(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    assert found["finished"] == found["planned"]
    return {s["name"]: s for s in found["sections"]}


@pytest.fixture(scope="module")
def by(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All sections of bench.gpu at their smallest, one command."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = ["-m", "bench.gpu", "--smoke", "--seed", "7", "--json", str(file)]
    done = standin_run.run(command, cwd=ROOT, timeout=900)
    assert done.returncode == 1, done.stdout + done.stderr  # checks of values fail, and with them the whole
    assert not done.log.violations
    return sections(file)


@pytest.mark.parametrize("name", list(SCHEDULE))
def test_every_section_runs_to_its_end(by: dict[str, Any], name: str) -> None:
    """None raises an error, hangs or dies."""
    section = by[name]
    assert section["rows"] or name == "csrc"
    assert "tracebacks" not in section["details"], section["details"]["tracebacks"]
    assert not [text for text in section["failures"] if any(word in text for word in UNMEANT)]
    assert not [text for text in section["skipped"] if "time is over" in text or "cut off" in text]


def test_the_rows_of_most_worth(by: dict[str, Any]) -> None:
    rows = {row["variant"]: row for row in by["step"]["rows"]}
    cudnn, cublaslt = "shared-0.8+backend.attention=cudnn", "shared-0.8+backend.mlp=cublaslt"
    assert list(rows) == ["plain", "shared-0.8", cudnn, cublaslt] and not by["step"]["failures"]
    for row in rows.values():
        program = {what: row[what] for what in ("kernels", "optimizer", "bf16 weights", "compile", "graphs")}
        assert program == {
            "kernels": "triton", "optimizer": "csrc", "bf16 weights": "yes", "compile": "block", "graphs": "yes",
        }  # fmt: skip
    assert rows[cudnn]["attention"] == "cudnn" and rows[cublaslt]["MLP"] == "cublaslt"
    assert [row["variant"] for row in by["variants"]["rows"]] == ["authors", "fp8"]
    assert any(text.startswith("shared-0.8: time / authors") for text in by["variants"]["notes"])


def test_checks_of_values_fail_where_nothing_is_computed(by: dict[str, Any]) -> None:
    """One that passed here would check nothing."""
    assert all(row["ok"] == "NO" and row["checked"] >= 18 for row in by["compiled"]["rows"])
    assert len(by["compiled"]["rows"]) == 6 and len(by["correctness"]["rows"]) > 40
    passed = [row["operator"] for row in by["correctness"]["rows"] if row["ok"] != "NO"]
    assert not passed
