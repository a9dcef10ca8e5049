"""Several processes train as one: the same losses and weights, in every mode, whoever computes them."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error, tiny
from distributed_worker import curve

TESTS = Path(__file__).parent
STEPS = 20


def torchrun(
    processes: int, *command: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`command`, a script or `-m module` with its arguments, in that many processes on this machine."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (environment or {})
    return subprocess.run([*launch, *command], capture_output=True, text=True, env=env, cwd=TESTS, timeout=240)


CASES: dict[str, dict[str, Any]] = {
    "shared": {},
    "paper": {"probe__branch": "paper"},
    "accumulate": {
        "optim__accumulate": 2, "probe__end_step": 12, "backend__optimizer": "reference", "optim__ema_extra": (0.8,),
        "optim__ema_profiles": (0.1,),
    },
    "unet": {
        "model__backbone": "unet", "model__depth": 2, "model__layers_per_level": 1, "model__patch_size": 1,
        "probe__depth": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_have_the_losses_of_one(store: Path, tmp_path: Path, processes: int) -> None:
    """20 steps, float32: losses, gradient norms, hits of the probe, then weights, averages and moments."""
    common = {"data__path": str(store), "train__batch_size": 16, "train__steps": STEPS, "optim__clip": 0.5}
    # All of two processes; of four, which take twice as long to start, some.
    pairs = [(mode, case) for mode in ("ddp", "fsdp") for case in CASES if case != "unet"]
    if importlib.util.find_spec("diffusers"):
        pairs.append(("ddp", "unet"))
    if processes == 4:
        pairs = [("ddp", "paper"), ("fsdp", "accumulate"), ("hsdp", "shared")]
    configs = {(mode, case): tiny(dist__mode=mode, **common, **CASES[case]) for mode, case in pairs}
    file, out = tmp_path / "configs.json", tmp_path / "found.pt"
    file.write_text(json.dumps([asdict(c) for c in configs.values()]))
    done = torchrun(processes, str(TESTS / "distributed_worker.py"), str(file), str(STEPS), str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    ones = {case: curve(tiny(**common, **CASES[case]), STEPS) for case in {case for _, case in pairs}}
    for ((mode, case), _), many in zip(configs.items(), torch.load(out, weights_only=True), strict=True):
        one, name = ones[case], f"{mode} {case}"
        assert relative_error(many["curve"][:, :2], one["curve"][:, :2]) < 1e-5, name
        assert relative_error(many["curve"][:, 2], one["curve"][:, 2]) < 1e-4, name
        hits = many["curve"][:, 3:] * processes  # sums of a process's samples, averaged
        assert torch.equal(hits, one["curve"][:, 3:]), name
        for kind in one.keys() - {"curve"}:
            assert relative_error(many[kind], one[kind]) < 1e-3, (name, kind)
    assert {"ema_0_8", "power_0_1"} < ones["accumulate"].keys()
