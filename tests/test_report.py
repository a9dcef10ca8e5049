"""The report is one file that needs nothing else."""

import json
import re
from pathlib import Path

import torch
from conftest import tiny

from lsep import report
from lsep.checkpoint import read_tensors
from lsep.run import Run
from lsep.train import train


def test_report_holds_everything(tmp_path: Path) -> None:
    config = tiny(data__path="digits", train__steps=6, train__sample_every=2, sample__num=4, sample__steps=2)
    run = train(config, tmp_path / "run")
    page = run.report_file.read_text()
    # Loss and accuracy against steps and seconds, accuracy by time, throughput, gradient norm.
    assert page.count("<svg") == 7 and page.count("training seconds") == 2
    assert page.count("data:image/png;base64,") >= 3  # grids of steps 2, 4, 6
    assert re.search(r"3-NN agreement<td>[\d.]+% of 200 samples", page)
    for text in ("probe.rho<td>0.9", "<th>batch<td>10", "images/s", "step 6 of 6"):
        assert text in page
    outside = [u for u in re.findall(r'(?:src|href)="([^"]+)"', page) if not u.startswith(("data:", "#"))]
    assert not outside


def test_the_overhead_is_measured_and_changes_nothing_saved(store: Path, tmp_path: Path) -> None:
    """A probe with a full second pass through all blocks costs something, and the saved weights know nothing of it."""
    quick = {"train__steps": 2, "sample__num": 2, "sample__steps": 2}
    changes = {"data__path": str(store), "probe__depth": 3, "probe__branch": "paper", **quick}
    run = train(tiny(train__overhead_rounds=9, train__batch_size=40, **changes), tmp_path / "run")
    results = run.results()
    low, high = results["lsep_overhead_quartiles"]
    assert 0 < results["lsep_overhead"] < 10 and low <= results["lsep_overhead"] <= high
    assert "<th>LSEP overhead<td>+" in run.report_file.read_text()
    without = train(tiny(train__batch_size=40, **changes), tmp_path / "without")
    assert "lsep_overhead" not in without.results() and "LSEP overhead" not in without.report_file.read_text()
    states = [read_tensors(r.checkpoints / "0000002", "ema") for r in (run, without)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    plain = train(tiny(train__overhead_rounds=9, probe__enabled=False, **changes), tmp_path / "plain")
    assert "lsep_overhead" not in plain.results()


def test_gpu_seconds_are_an_axis_where_there_are_any(store: Path, tmp_path: Path) -> None:
    run = train(tiny(data__path=str(store), train__steps=4), tmp_path / "run")
    assert [m["gpu_seconds"] for m in run.metrics()] == [
        None,
        None,
    ] and "GPU seconds" not in run.report_file.read_text()
    lines = [m | {"gpu_seconds": 0.5 * m["seconds"]} for m in run.metrics()]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.render(Run(run.path)).read_text().count("GPU seconds") == 2


def test_report_of_a_run_without_metrics_or_probe(store: Path, tmp_path: Path) -> None:
    run = train(tiny(data__path=str(store), train__steps=2, probe__enabled=False), tmp_path / "run")
    assert "off (plain SiT)" in run.report_file.read_text()
    run.metrics_file.unlink()
    assert "step 0 of 2" in report.render(Run(run.path)).read_text()
