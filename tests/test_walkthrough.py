"""docs/walkthrough.sh, in short: every command of it works on what the one before has written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
SCRIPT = Path(__file__).parent.parent / "docs" / "walkthrough.sh"


def test_every_step(tmp_path: Path) -> None:
    bin_ = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path / "walk", "12", "64"], env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    steps = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert len(steps) == 7 and "diffusers' velocity is ours" in done.stdout
    with np.load(tmp_path / "walk" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (64, 8, 8, 1)
    figures = json.loads((tmp_path / "walk" / "figures.json").read_text())
    assert figures["num_samples"] == 64 and figures["metrics"]["fd"]["value"] > figures["metrics"]["fd"]["floor"]
