"""docs/slurm.sh and the two-node line of docs/long-runs.md, as they stand there: two "nodes" on this machine, gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import tiny

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
STEPS = 3
WORKER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(number, frame):
    (folder / f"stopped-{os.environ['RANK']}-{os.environ['WORLD_SIZE']}").touch()
    sys.exit(0)
signal.signal(signal.SIGUSR1, stop)
(folder / f"ready-{os.environ['RANK']}").touch()
time.sleep(60)
"""
"""What ends like `lsep train` at a SIGUSR1, without its imports."""


def training(line: str, store: Path, folder: Path) -> tuple[str, list[str], Path]:
    """`line` with a tiny training in it, arguments for what the line leaves open, and the file that shows its end.

    SWITCH: `lsep train` runs in one process as yet, so that tests/distributed_worker.py takes its place. Once it runs
    in many, leave `-m lsep train` in `line` and let the arguments be `quickstart --train.steps 3 --run-dir ...`.
    """
    configs, out = folder / "configs.json", folder / "found.pt"
    config = tiny(data__path=str(store), train__batch_size=16, train__steps=STEPS)
    configs.write_text(json.dumps([asdict(config)]))
    assert "-m lsep train" in line
    return (
        line.replace("-m lsep train", str(TESTS / "distributed_worker.py")),
        [str(configs), str(STEPS), str(out)],
        out,
    )


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which `srun` starts its command on two nodes, and `scontrol` says what it was asked."""
    tools = tmp_path / "bin"
    executable(tools / "torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')
    executable(tools / "srun", """
"$@" & one=$!
"$@" & two=$!
trap 'kill -USR1 $one $two' USR1
wait $one; wait $two
while kill -0 $one 2> /dev/null || kill -0 $two 2> /dev/null; do wait; done
wait $one && wait $two""")  # fmt: skip
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
    """One from 20000 to 29999, which no connection of this machine's own takes (they begin at 32768)."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def assert_trained(file: Path) -> None:
    """Three steps, of two processes."""
    curve = torch.load(file, weights_only=True)[0]["curve"]
    assert len(curve) == STEPS and torch.isfinite(curve).all()


def test_two_nodes_by_hand(store: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / "long-runs.md").read_text(), re.S)
    (line,) = [b for b in blocks if "--nnodes 2" in b]
    command, arguments, file = training(line, store, tmp_path)
    command = command[: command.index("sit-xl-2-256")] + " ".join(arguments)
    for old, new in (
        ("--nproc-per-node 8", "--nproc-per-node 1"), ("HOST:29500", f"127.0.0.1:{free_port()}"),
    ):  # fmt: skip
        assert old in command
        command = command.replace(old, new)
    nodes = [subprocess.Popen(["bash", "-c", command], env=cluster, stderr=subprocess.PIPE) for _ in range(2)]
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert node.returncode == 0, errors.decode()[-3000:]
    assert_trained(file)


def test_slurm_script_trains_on_two_nodes(store: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    text, arguments, file = training((DOCS / "slurm.sh").read_text(), store, tmp_path)
    script = tmp_path / "slurm.sh"
    script.write_text(text)
    done = subprocess.run(["bash", str(script), *arguments], env=cluster, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained(file)
    assert (tmp_path / "scontrol.log").read_text() == "show hostnames node[1-2]\n"


def test_signal_reaches_all_workers_and_the_job_is_requeued(tmp_path: Path, cluster: dict[str, str]) -> None:
    script = tmp_path / "slurm.sh"
    (tmp_path / "worker.py").write_text(WORKER)
    script.write_text((DOCS / "slurm.sh").read_text().replace("-m lsep train", str(tmp_path / "worker.py")))
    job = subprocess.Popen(["bash", str(script), str(tmp_path)], env=cluster, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 1, errors.decode()[-3000:]  # of torchrun, after any signal
    assert {p.name for p in tmp_path.glob("stopped-*")} == {"stopped-0-2", "stopped-1-2"}
    assert (tmp_path / "scontrol.log").read_text().splitlines()[-1] == f"requeue {cluster['SLURM_JOB_ID']}"


@pytest.mark.parametrize(("preempted", "requeued"), [("2030-01-01T00:00:00", True), ("None", False)])
def test_failed_job_is_requeued_when_preempted_only(
    tmp_path: Path, cluster: dict[str, str], preempted: str, requeued: bool
) -> None:
    executable(tmp_path / "bin" / "srun", "exit 1")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("PreemptTime=None", f"PreemptTime={preempted}"))
    done = subprocess.run(["bash", str(DOCS / "slurm.sh")], env=cluster, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert ("requeue" in (tmp_path / "scontrol.log").read_text()) == requeued, done.stderr


def test_script_is_bash_and_asks_for_its_signal() -> None:
    subprocess.run(["bash", "-n", str(DOCS / "slurm.sh")], check=True)
    lines = (DOCS / "slurm.sh").read_text().splitlines()
    command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines[:command] if line.startswith("#SBATCH ")]  # SLURM reads none after it
    assert len(options) == sum(line.startswith("#SBATCH") for line in lines)
    assert {"#SBATCH --signal=B:USR1@120", "#SBATCH --requeue"} <= set(options)
