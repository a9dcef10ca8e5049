"""Training on the stand-in for a GPU: its end fits where its step fits, and a batch that does not fit is cut.

The memory is the allocator's own; values are zeros.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from standin_run import Result, missing, run

from lsep.data.writer import write_store

pytestmark = [pytest.mark.standin, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

TRAINING = """
import gc, sys, torch
from lsep.config import override
from lsep.presets import PRESETS
from lsep.train import train

config = override(PRESETS["sit-b-2-256"], {
    "model.depth": 6, "probe.depth": 3, "train.batch_size": 64, "data.path": sys.argv[1], "data.loader": "torch",
    "train.checkpoint_every": 100, "train.log_every": 4, "train.sample_every": 0, "sample.num": 2, "sample.steps": 1,
    "train.memory": "keep", "train.steps": 5, "train.overhead_rounds": 0, "backend.optimizer": "csrc",
})
train(config, sys.argv[2] + "/plain")
step = torch.cuda.max_memory_reserved()
torch._dynamo.reset()  # what it compiled holds on to weights
gc.collect()
torch.cuda.empty_cache()
whole = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(1.1 * step / whole)
ends = override(config, {"train.steps": 16, "probe.end_step": 6, "train.overhead_rounds": 2})
run = train(ends, sys.argv[2] + "/ends")
assert "lsep_overhead" in run.results(), run.results()
print("step", step, "whole run", torch.cuda.max_memory_reserved())
"""
"""A training whose probe ends and whose cost is measured at its end, under a tenth more memory than its step takes."""


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """512 moments of 4 x 32 x 32 and labels of 1,000 classes."""
    path, rng = tmp_path_factory.mktemp("latents") / "store", np.random.default_rng(0)
    x = rng.uniform(0.1, 1, size=(512, 8, 32, 32)).astype(np.float32)
    write_store(path, kind="moments", x=x, y=np.arange(512), num_classes=1000, scale=0.18215)
    return path


def test_where_a_step_fits_the_end_of_the_probe_and_of_the_run_fit(latents: Path, tmp_path: Path) -> None:
    """One graph's pool beside the warm-up of the other step was twice the memory of a step."""
    program = tmp_path / "training.py"
    program.write_text(TRAINING)
    done = run([str(program), str(latents), str(tmp_path)], timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.log.violations
    assert "whole run" in done.stdout


def train(latents: Path, out: Path, *flags: str, preset: str = "sit-b-2-256", **settings: object) -> Result:
    # DALI brings a CUDA runtime of its own, which the stand-in cannot go before.
    few = "--data.loader torch --train.steps 5 --train.sample-every 0 --train.log-every 2".split()
    few += "--sample.num 2 --sample.steps 1".split()
    command = ["-m", "lsep", "train", preset, "--data.path", str(latents), "--run-dir", str(out), *few, *flags]
    return run(command, timeout=400, **settings)


def test_the_main_command_runs_on_a_card_of_80_gib(latents: Path, tmp_path: Path) -> None:
    """SiT-XL/2 with the paper's batch and no flag: in two micro-batches, said, stored, and resumed."""
    done = train(latents, tmp_path / "run", preset="sit-xl-2-256", card="h100")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.log.violations
    assert "it runs as --optim.accumulate 2, which needs" in done.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["optim"]["accumulate"], config["train"]["memory"]) == (2, "keep")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 5


def test_what_does_not_fit_says_what_would(latents: Path, tmp_path: Path) -> None:
    small = 9 * 2**30
    done = train(latents, tmp_path / "asked", "--train.memory", "keep", memory=small)
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if "lsep: error" in line]
    assert "the GPU ran out of memory" in said and "these would fit: --optim.accumulate" in said
    assert said.count("--optim.accumulate") == 4, said
    done = train(latents, tmp_path / "auto", memory=small)
    assert done.returncode == 0, done.stderr[-2000:]
    done = train(latents, tmp_path / "never", memory=3 * 2**30)
    assert done.returncode == 2
    assert "--train.memory auto: a step needs" in done.stderr and "use a GPU with more memory" in done.stderr
    assert not (tmp_path / "never").exists()
