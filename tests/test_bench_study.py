"""bench.study at sizes that tell nothing: rows are kept, not run twice, and end on a page with their commands."""

import json
from pathlib import Path

import pytest

from bench import study, study_row
from bench.study_row import configuration
from bench.study_task import open_task


def test_rows_are_kept_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"--results": tmp_path / "results", "--docs": tmp_path, "--work": tmp_path / "work"}
    flags = ["--trial", *(str(part) for place in places.items() for part in place)]
    assert study.main([*flags, "--only", "plain SiT", "shared, e = 0", "--seeds", "3"]) == 0
    found = json.loads((tmp_path / "results" / "digits-cpu.json").read_text())
    assert list(found["rows"]) == ["plain SiT, seed 3", "shared, e = 0, seed 3"]
    for row in found["rows"].values():
        assert [p["step"] for p in row["points"]] == [2, 4] and len(row["final"]) == study_row.SAMPLING_SEEDS
        assert row["final"][0] > row["floor"] > 0 and row["points"][0]["seconds"] < row["points"][1]["seconds"]
    page = (tmp_path / "study.md").read_text()
    assert (
        "| shared, e = 0 | 1 |" in page and "python -m bench.study --data digits --only 'plain SiT' --seeds 3" in page
    )
    assert len(list(tmp_path.glob("study-digits-*.png"))) == 3
    monkeypatch.setattr(study, "row", lambda *args: pytest.fail("a row was run again"))
    assert study.main([*flags, "--only", "plain SiT", "--seeds", "3"]) == 0
    assert study.main([*flags[1:], "--only", "plain SiT", "--seeds", "3"]) == 2
    assert "holds rows of other sizes" in capsys.readouterr().err


def test_every_variant_is_a_configuration(tmp_path: Path) -> None:
    from lsep.checks import resolve
    from lsep.data.store import Store

    task = open_task("digits", None, tmp_path, 200)
    sizes = study.SIZES["digits", "cpu"]
    plain, *others = (configuration(task, sizes, changes, 0) for changes in study.VARIANTS.values())
    for config in (plain, *others):
        resolve(config, Store(config.data.path or "").manifest)
    assert len({str(config) for config in (plain, *others)}) == len(study.VARIANTS)
    train, noisy = (Store(task.stores[name]).labels for name in ("train", "noisy"))
    assert 0.04 < (train != noisy).mean() < 0.17
    assert [p.key for p in study.plans(None, None)][:4] == [
        *(f"plain SiT, seed {i}" for i in range(3)),
        "paper, seed 0",
    ]


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(["--data", "cifar10"]) == 2
    assert study.main(["--data", "cifar10", "--cifar10", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--cifar10 is missing" in error and "cifar10.py is missing, expected a module" in error
