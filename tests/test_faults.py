"""What goes wrong in long runs: preemption, dead and hung processes, spikes, and gradients that are not finite."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error, tiny
from test_dist import torchrun
from test_train import command, flags, tensors

from lsep.config import Config
from lsep.data.order import permutation
from lsep.data.writer import write_store
from lsep.errors import UserError
from lsep.run import Run
from lsep.train import train

QUICK = {"train__checkpoint_every": 4, "train__batch_size": 8, "sample__num": 2, "sample__steps": 2}


def launch(run_dir: Path, config: Config, processes: int, *options: str) -> list[str]:
    """The command that trains `config` in several processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*start, *options, "-m", "lsep", "train", "quickstart", *flags(config), "--run-dir", str(run_dir)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def workers(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank of what torchrun has started."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (folder / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError, ValueError):
                continue
            rank = [e[5:] for e in environment if e.startswith(b"RANK=")]
            if parent == process.pid and rank:
                found[int(rank[0])] = int(folder.name)
    return found


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{step:07d}" / "manifest.json"


def test_a_killed_process_leads_to_a_restart_that_goes_on_exactly(store: Path, tmp_path: Path) -> None:
    config = tiny(data__path=str(store), train__steps=40, **QUICK)
    whole = tmp_path / "whole"
    assert subprocess.run(launch(whole, config, 2), env=ENVIRONMENT, capture_output=True).returncode == 0
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        launch(broken, config, 2, "--max-restarts", "2"), env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(checkpoint_of(broken, 8).exists, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert re.search(rf"continuing {broken} at step \d+", output)
    a, b = tensors(whole, 40), tensors(broken, 40)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [m["step"] for m in Run(broken).metrics()] == [*range(2, 41, 2)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    store: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    run = tmp_path / "run"
    config = tiny(data__path=str(store), train__steps=5000, **{**QUICK, "train__checkpoint_every": 5000})
    process = subprocess.Popen(command(run, config), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(Run(run).metrics()) > 2, process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    step = Run(run).metrics()[-1]["step"]
    assert f"stopped by {signum.name} after step {step}; saved in" in errors and "go on with: lsep train" in errors
    assert checkpoint_of(run, step).exists() and not (run / "results.json").exists()


def test_a_signal_to_some_processes_stops_all_at_one_step(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny(data__path=str(store), train__steps=5000, **{**QUICK, "train__checkpoint_every": 5000})
    process = subprocess.Popen(
        launch(run, config, 2), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(Run(run).metrics()) > 2, process)
    os.kill(workers(process)[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    step = Run(run).metrics()[-1]["step"]
    assert output.count(f"stopped by SIGUSR1 after step {step}") == 1 and checkpoint_of(run, step).exists()


def test_a_hung_process_is_named(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny(data__path=str(store), train__steps=5000, dist__timeout=10.0, **QUICK)
    process = subprocess.Popen(
        launch(run, config, 2), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(checkpoint_of(run, 8).exists, process)
    hung = workers(process)[1]
    os.kill(hung, signal.SIGSTOP)
    try:
        wait_for(lambda: 0 not in workers(process), process, 60)
    finally:
        os.kill(hung, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    said = re.search(r"lsep: error: rank 0: waited \d+ s at (.*): rank 1 has not been heard of for \d+ s", output)
    assert said and re.search(r"of step \d+|after step \d+", said[1]), output


def test_a_run_goes_on_with_other_processes(store: Path, tmp_path: Path) -> None:
    """Weights, averages and moments are sharded anew; the losses are those of a run that never changed."""
    first, then = (2, "fsdp"), (3, "ddp")
    common = {"data__path": str(store), **QUICK, "train__batch_size": 12, "train__log_every": 1}
    whole = train(tiny(**common, train__steps=8), tmp_path / "whole").metrics()
    run = tmp_path / "run"
    for (processes, mode), steps in ((first, 4), (then, 8)):
        config = tiny(**common, train__steps=steps, dist__mode=mode)
        done = torchrun(processes, "-m", "lsep", "train", "quickstart", *flags(config), "--run-dir", str(run))
        assert done.returncode == 0, done.stderr[-3000:]
    found = Run(run).metrics()
    assert [m["step"] for m in found] == [*range(1, 9)]
    for key in ("denoising", "lsep"):
        got, wanted = (torch.tensor([m[key] for m in lines]) for lines in (found, whole))
        assert relative_error(got, wanted) < 1e-5


def test_bad_input_is_said_once(store: Path, tmp_path: Path) -> None:
    config = tiny(data__path=str(store), **QUICK, optim__accumulate=8)
    done = torchrun(2, "-m", "lsep", "train", "quickstart", *flags(config), "--run-dir", str(tmp_path / "run"))
    assert done.returncode != 0 and done.stderr.count("lsep: error:") == 1
    assert "--train.batch-size 8 is not divisible by 2 processes times --optim.accumulate 8" in done.stderr
    assert not (tmp_path / "run").exists()


def spiky_store(path: Path, rows: dict[int, float]) -> str:
    """43 latents, of which `rows` are far too large."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(43, 3, 8, 8)).astype(np.float32)
    for row, factor in rows.items():
        x[row] *= factor
    write_store(path, kind="samples", x=x, y=rng.integers(5, size=43), num_classes=5)
    return str(path)


SPIKES = {"train__log_every": 1, "train__checkpoint_every": 3, "train__batch_size": 4, "train__steps": 24}


def test_a_spike_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = spiky_store(tmp_path / "data", {7: 50.0})
    train(tiny(data__path=data, **SPIKES), tmp_path / "run")
    assert re.search(r"step \d+: the loss is [\d.e+]+, [\d.]+ in the windows before", capsys.readouterr().out)
    assert len(Run(tmp_path / "run").metrics()) == 24


def test_a_rollback_leaves_the_data_of_a_spike_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Back to the checkpoint, past the bad sample, to the last step; resuming knows of the data left out."""
    late = int(permutation(43, seed=0, epoch=0)[30])  # in step 8, when there is a history
    data = spiky_store(tmp_path / "data", {late: 50.0})
    config = tiny(data__path=data, train__on_spike="rollback", **SPIKES)
    run = train(config, tmp_path / "run")
    said = re.findall(r"back at step (\d+); the data of (\d+) steps is left out", capsys.readouterr().out)
    assert said
    lines = run.metrics()
    assert [m["step"] for m in lines] == [*range(1, 25)]
    ordinary = sorted(m["loss"] for m in lines)[12]
    assert max(m["loss"] for m in lines) < 3 * ordinary
    state = json.loads(checkpoint_of(run.path, 24).read_text())
    assert state["data_offset"] == sum(int(n) for _, n in said)
    # The same in two sessions: the second one reads on where the first, with its offset, would have.
    parts = tmp_path / "parts"
    train(tiny(**{**SPIKES, "train__steps": 21}, data__path=data, train__on_spike="rollback"), parts)
    train(config, parts)
    a, b = tensors(run.path, 24), tensors(parts, 24)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_steps_without_a_finite_gradient_end_with_a_diagnosis(tmp_path: Path) -> None:
    data = spiky_store(tmp_path / "data", dict.fromkeys(range(43), 1e25))
    with pytest.raises(UserError) as error:
        train(tiny(data__path=data, train__max_skipped=4, **SPIKES), tmp_path / "run")
    text = str(error.value)
    assert text.startswith(
        "4 steps in a row up to step 4 had no finite gradient and were skipped: the denoising loss of"
    )
    assert re.search(r"of sample \d+ at t = 0\.\d+ is (inf|nan)", text) and "there is no checkpoint yet" not in text
    assert "0000003 is intact" in text and (tmp_path / "run" / "checkpoints" / "0000003").exists()
