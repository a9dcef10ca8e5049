"""bench.study at sizes that tell nothing: rows are kept, not run twice, and end on a page with their commands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from bench import study, study_page, study_row
from bench.study_row import configuration
from bench.study_task import open_task
from lsep.sample import save_grid


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
        assert (
            row["final"][0] > row["floor"] > 0
            and row["flops"] > 0
            and row["points"][0]["seconds"] < row["points"][1]["seconds"]
        )
    page = (tmp_path / "study.md").read_text()
    again = "python -m bench.study --data digits --only 'plain SiT' --seeds 3 --results runs/again --docs runs/again"
    assert "| shared, e = 0 | 1 |" in page and again in page
    assert len(list(tmp_path.glob("study-digits-*.png"))) == 3
    monkeypatch.setattr(study, "row", lambda *args: pytest.fail("a row was run again"))
    assert study.main([*flags, "--only", "plain SiT", "--seeds", "3"]) == 0
    assert study.main([*flags[1:], "--only", "plain SiT", "--seeds", "3"]) == 2
    assert "holds rows of other sizes" in capsys.readouterr().err


def test_what_the_page_says_of_rows(tmp_path: Path) -> None:
    def made(variant: str, seconds: float, distance: float, accuracy: float, strips: bool) -> dict[str, Any]:
        points = [
            {"step": s, "seconds": seconds * s / 2, "distance": distance * 4 / s, "accuracy": accuracy} for s in (1, 2)
        ]
        entry = {
            "variant": variant,
            "seed": 0,
            "points": points,
            "final": [distance, distance * 2],
            "floor": 0.5,
            "flops": seconds,
        }
        entry |= {"final_accuracy": accuracy, "machine": "m", "command": f"python -m bench.study --only {variant!r}"}
        if strips:
            entry["strips"] = f"data/{variant}"
            for point in points:
                save_grid(np.zeros((3, 4, 4, 1), np.uint8), tmp_path / "data" / variant / f"{point['step']}.png")
        return entry

    rows = [made("plain SiT", 10, 4, 0.4, True), made("paper", 16, 2, 0.6, True), made("rho = 0", 12, 3, 0.5, False)]
    found = {
        "task": "digits",
        "note": "Digits",
        "distance": "FD",
        "sizes": {"points": 2},
        "rows": {r["variant"]: r for r in rows},
    }
    (tmp_path / "data.json").write_text(json.dumps(found))
    (tmp_path / "findings.md").write_text("What follows.\n")
    study_page.render(tmp_path, tmp_path)
    page = (tmp_path / "study.md").read_text()
    assert "What follows." in page and "| `points` | 2 |" in page and "| m | 3 |" in page
    assert "| paper | 1 | 3.000 (2.000 to 4.000) | 0.600 | 16 | 1.60 | 1.60 |" in page
    # Only after 10 s has every row a point; paper is there a quarter of the way from 8 s (distance 8) to 16 s (4).
    assert "| FD after | 10 s |" in page
    assert study_page.at(rows[1], 10) == pytest.approx(8 * 0.5**0.25)
    assert f"| paper | {8 * 0.5**0.25:.3f} |" in page
    found["rows"]["paper"]["disturbed"] = True  # type: ignore[index]
    (tmp_path / "data.json").write_text(json.dumps(found))
    study_page.render(tmp_path, tmp_path)
    marked = (tmp_path / "study.md").read_text()
    assert (
        "| paper | 1 | 3.000 (2.000 to 4.000) | 0.600 |  |  | 1.60 |" in marked
        and "FD after | 5 s | 8 s | 10 s |" in marked
    )
    assert "other work: paper." in marked and "other work" not in page
    assert "over the 3 rows: -1.00" in page and study_page.shared_time(rows) == 10
    values = [3.0, 1.0, 3.0, 2.0, 7.0]
    assert list(study_page._ranks(values)) == list(scipy.stats.rankdata(values) - 1)
    assert (tmp_path / "study-digits-samples.png").exists()


def test_the_page_is_that_of_the_rows_kept(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    study_page.render(root / "bench" / "results" / "study", tmp_path)
    assert (tmp_path / "study.md").read_text() == (root / "docs" / "study.md").read_text()
    assert {p.name for p in tmp_path.glob("*.png")} == {p.name for p in (root / "docs").glob("study-*.png")}


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
