"""A run directory keeps what is needed to go on, and survives a kill in the middle of a line."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MANIFEST, tiny

from lsep.checks import resolve
from lsep.errors import UserError
from lsep.run import Run

CONFIG = resolve(tiny(), MANIFEST)


def test_configuration_and_data_come_back(tmp_path: Path) -> None:
    run = Run(tmp_path / "r")
    run.open(CONFIG, MANIFEST, "quickstart")
    again = Run.existing(tmp_path / "r")
    assert (again.config(), again.manifest(), again.preset()) == (CONFIG, MANIFEST, "quickstart")


def test_moved_data_may_go_on_but_other_data_may_not(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open(CONFIG, MANIFEST, "x")
    run.check(CONFIG, replace(MANIFEST, source="elsewhere"))
    with pytest.raises(UserError, match="data's rows: 1000 -> 999"):
        run.check(CONFIG, replace(MANIFEST, rows=999))


def test_metrics_survive_a_torn_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (2, 4, 6):
        run.append_metrics({"step": step})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 8, "lo')
    assert [m["step"] for m in run.metrics()] == [2, 4, 6]
    run.forget_after(4)
    assert run.metrics_file.read_text() == '{"step": 2}\n{"step": 4}\n'


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("[]", "expected a JSON object"),
                                               ('{"model": {"depth": 1}}', "no description of the data")])  # fmt: skip
def test_foreign_config(tmp_path: Path, text: str, message: str) -> None:
    run = Run(tmp_path)
    run.config_file.write_text(text)
    with pytest.raises(UserError, match=message):
        run.manifest()


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Run(tmp_path / "file" / "run").open(CONFIG, MANIFEST, "x")
