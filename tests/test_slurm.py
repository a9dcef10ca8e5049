"""docs/slurm.sh and the two-node line of docs/long-runs.md, as they stand there: two "nodes" on this machine, gloo."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny
from test_train import flags

from lsep.run import Run

DOCS = Path(__file__).parent.parent / "docs"


def training(store: Path, run: Path, steps: int) -> list[str]:
    """Arguments of `lsep train` for a tiny training."""
    config = tiny(
        data__path=str(store), train__batch_size=16, train__steps=steps, train__log_every=1,
        train__checkpoint_every=10**6, sample__num=2, sample__steps=2,
    )  # fmt: skip
    return ["quickstart", *flags(config), "--run-dir", str(run)]


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which `srun` starts its command on two nodes, and `scontrol` keeps what it was asked."""
    tools = tmp_path / "bin"
    executable(tools / "torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')
    executable(tools / "srun", """
"$@" & one=$!
"$@" & two=$!
trap 'kill -USR1 $one $two' USR1
for task in $one $two; do
  wait $task; code=$?
  while kill -0 $task 2> /dev/null; do wait $task; code=$?; done
  [ $code = 0 ] || worst=$code
done
exit ${worst:-0}""")  # fmt: skip
    executable(tools / "scontrol", f"""
echo "$*" >> {tmp_path}/scontrol.log
case "$*" in
  "show hostnames node[1-2]") printf '127.0.0.1\\n127.0.0.2\\n' ;;
  "show job "*) echo "   PreemptEligibleTime=2030-01-01T00:00:00 PreemptTime=None" ;;
esac""")  # fmt: skip
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(free_port() - 20000),
    }  # fmt: skip


def free_port() -> int:
    """One from 20000 to 29999, where the script's are."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def test_a_job_is_stopped_and_requeued_and_goes_on_by_hand(
    store: Path, tmp_path: Path, cluster: dict[str, str]
) -> None:
    """A signal to the script reaches the training on both nodes; the line of the documentation ends what it began."""
    run = tmp_path / "run"
    job = subprocess.Popen(
        ["bash", str(DOCS / "slurm.sh"), *training(store, run, 100_000)], env=cluster, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not Run(run).metrics():
        assert job.poll() is None and time.monotonic() < end, job.communicate()
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 1, output  # of torchrun, after any signal
    step = Run(run).metrics()[-1]["step"]
    assert f"stopped by SIGUSR1 after step {step}; saved in" in output
    asked = (tmp_path / "scontrol.log").read_text().splitlines()
    assert asked == ["show hostnames node[1-2]", f"requeue {cluster['SLURM_JOB_ID']}"]

    command = by_hand(training(store, run, step + 2))
    nodes = [subprocess.Popen(["bash", "-c", command], env=cluster, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [node.communicate(timeout=120)[1].decode()[-3000:] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert [m["step"] for m in Run(run).metrics()] == [*range(1, step + 3)]
    assert Run(run).results()["steps"] == step + 2


def by_hand(arguments: list[str]) -> str:
    """The line for two nodes, with this machine's address and a tiny training."""
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / "long-runs.md").read_text(), re.S)
    (command,) = [b for b in blocks if "--nnodes 2" in b]
    for old, new in (
        ("--nproc-per-node 8", "--nproc-per-node 1"), ("HOST:29500", f"127.0.0.1:{free_port()}"),
        ("sit-xl-2-256 --data.path STORE --run-dir RUN", shlex.join(arguments)),
    ):  # fmt: skip
        assert old in command
        command = command.replace(old, new)
    return command


@pytest.mark.parametrize(
    ("code", "preempted", "requeued"), [(1, "2030-01-01T00:00:00", True), (1, "None", False), (0, "2030", False)]
)
def test_a_job_is_requeued_when_preempted_and_not_done(
    tmp_path: Path, cluster: dict[str, str], code: int, preempted: str, requeued: bool
) -> None:
    executable(tmp_path / "bin" / "srun", f"exit {code}")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("PreemptTime=None", f"PreemptTime={preempted}"))
    done = subprocess.run(["bash", str(DOCS / "slurm.sh")], env=cluster, capture_output=True, text=True, timeout=30)
    assert done.returncode == code
    assert ("requeue" in (tmp_path / "scontrol.log").read_text()) == requeued, done.stderr


def test_script_is_bash_and_asks_for_its_signal() -> None:
    subprocess.run(["bash", "-n", str(DOCS / "slurm.sh")], check=True)
    lines = (DOCS / "slurm.sh").read_text().splitlines()
    command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines[:command] if line.startswith("#SBATCH ")]  # SLURM reads none after it
    assert len(options) == sum(line.startswith("#SBATCH") for line in lines)
    assert {"#SBATCH --signal=B:USR1@120", "#SBATCH --requeue"} <= set(options)
