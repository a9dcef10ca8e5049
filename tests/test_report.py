"""The report is one file that needs nothing else."""

import re
from pathlib import Path

from conftest import tiny

from lsep import report
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


def test_report_of_a_run_without_metrics_or_probe(store: Path, tmp_path: Path) -> None:
    run = train(tiny(data__path=str(store), train__steps=2, probe__enabled=False), tmp_path / "run")
    assert "off (plain SiT)" in run.report_file.read_text()
    run.metrics_file.unlink()
    assert "step 0 of 2" in report.render(Run(run.path)).read_text()
