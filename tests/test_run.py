"""A run directory keeps what is needed to go on, and survives a kill in the middle of a line."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MANIFEST, TINY, tiny

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
                                               ("[" * 10**5, "cannot be read as JSON .RecursionError"),
                                               ('{"model": {"depth": 1}}', "no description of the data")])  # fmt: skip
def test_foreign_config(tmp_path: Path, text: str, message: str) -> None:
    run = Run(tmp_path)
    run.config_file.write_text(text)
    with pytest.raises(UserError, match=message):
        run.manifest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [3, 8]}, "manifest: shape is [3, 8], expected three counts C, H, W"),
        ({"rows": "many"}, "manifest: rows and flips are 'many' and False, expected a count, and true or false"),
        ({"source": "a\nb"}, r"manifest: source is 'a\nb', expected a path in one line"),
        ({"kind": ["samples"]}, "manifest: kind is ['samples'], expected moments or samples or pixels"),
        ({"scale": float("nan")}, "manifest: scale is nan, expected a finite number"),
        ({"class_names": "abc"}, "manifest: class_names is 'abc', expected a list of names"),
    ],
)
def test_a_wrong_description_of_the_data(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    run = Run(tmp_path)
    run.open(TINY, MANIFEST, "quickstart")
    assert run.manifest() == MANIFEST
    values = json.loads(run.config_file.read_text())
    values["manifest"].update(changes)
    run.config_file.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        run.manifest()
    assert message in str(caught.value)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Run(tmp_path / "file" / "run").open(CONFIG, MANIFEST, "x")


def test_two_trainings_in_one_directory(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.locked():
        holder = json.loads(run.lock_file.read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        message = (
            f"run is in use by process {os.getpid()} on host '{socket.gethostname()}' since {holder['since']}: wait"
        )
        with pytest.raises(UserError, match=re.escape(message)), run.locked():
            pass
        assert run.lock_file.exists()
        run.check(CONFIG, MANIFEST)  # the lock alone does not make it a folder of something else
    assert not run.path.exists()


def test_the_lock_goes_with_every_end(tmp_path: Path) -> None:
    for error in (UserError, KeyboardInterrupt):
        with pytest.raises(error), Run(tmp_path).locked():
            raise error
        assert not list(tmp_path.iterdir())


def test_a_stale_lock_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a killed process, also where its number belongs to another one by now."""
    run = Run(tmp_path)
    code = f"import os\nfrom lsep.run import Run\nwith Run({str(tmp_path)!r}).locked():\n    os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    lock = json.loads(run.lock_file.read_text())
    for pid in (lock["pid"], os.getpid()):
        run.lock_file.write_text(json.dumps({**lock, "pid": pid}))
        with run.locked():
            assert json.loads(run.lock_file.read_text())["pid"] == os.getpid()
        assert f"taking over the lock of process {pid} on host" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"host": "elsewhere", "pid": 7, "start": 9, "since": "noon"}',
         "in use by process 7 on host 'elsewhere' since noon: choose another --run-dir, or remove"),
        ("{", "lock: not a lock of this program; remove it if no training runs in"),
        ('{"pid": 7}', "not a lock of this program"),
    ],
)  # fmt: skip
def test_a_lock_that_may_be_alive_is_left_alone(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "lock").write_text(content)
    with pytest.raises(UserError, match=message), Run(tmp_path).locked():
        pass
    assert (tmp_path / "lock").read_text() == content


def test_a_full_disk_leaves_no_half_line_in_the_metrics(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append_metrics({"step": 2})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            run.append_metrics({"step": 4, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.append_metrics({"step": 6})
    assert [m["step"] for m in run.metrics()] == [2, 6]
