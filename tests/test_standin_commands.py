"""Every command that uses a GPU, on the stand-in, to its end, at small sizes: no violation, no wait of the host in steps
that are replayed, no launch outside a capture. What is computed has no meaning here; that it runs has."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import standin_run
from standin_log import Launch, Log

from lsep.data.writer import write_store

pytestmark = [
    pytest.mark.standin,
    pytest.mark.skipif(standin_run.missing() is not None, reason=str(standin_run.missing())),
]

SMALL = """
--model.hidden-size 128 --model.num-heads 2 --model.depth 2 --probe.depth 1 --probe.window-min 8 --optim.warmup-steps 0
--train.steps 8 --train.batch-size 20 --train.log-every 1000 --train.checkpoint-every 1000 --train.sample-every 0
--train.overhead-rounds 0 --train.device cuda --sample.num 4 --sample.steps 2
""".split()
"""Heads of 64 over 256 tokens, as the Triton attention wants them; eight steps, of which three warm up for the graph."""
UNET = """
--model.hidden-size 64 --model.num-heads 4 --probe.window-min 3 --optim.warmup-steps 0 --train.steps 7
--train.batch-size 20 --train.log-every 1000 --train.checkpoint-every 1000 --train.sample-every 0
--train.overhead-rounds 0 --train.device cuda --sample.num 4 --sample.steps 2 --data.path digits
""".split()
EAGER = ["--train.compile", "off"]


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 moments of 4 x 32 x 32 latents, five classes."""
    path = tmp_path_factory.mktemp("latents") / "store"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8, 32, 32)).astype(np.float32)
    write_store(path, kind="moments", x=x, y=rng.integers(5, size=64), num_classes=5, scale=0.5)
    return path


def drive(
    cases: Mapping[str, Sequence[str]], folder: Path, timeout: float = 500, **given: object
) -> tuple[dict[str, object], Log, str]:
    """Exit codes, log and stderr of commands that run one after the other in one process."""
    (folder / "cases.json").write_text(json.dumps({k: list(map(str, v)) for k, v in cases.items()}))
    files = [str(folder / "cases.json"), str(folder / "codes.json")]
    done = standin_run.run([str(standin_run.HERE / "drive.py"), *files], timeout=timeout, **given)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(Path(files[1]).read_text()), done.log, done.stderr


def train(latents: Path, run: Path, *more: str) -> list[str]:
    return ["lsep", "train", "quickstart", *SMALL, "--data.path", str(latents), "--run-dir", str(run), *more]


def check(codes: Mapping[str, object], log: Log, expected: Mapping[str, int] | None = None) -> None:
    """Every case ended as it should, and nothing that a GPU would have refused came up."""
    wrong = {name: code for name, code in codes.items() if code != (expected or {}).get(name, 0)}
    assert not wrong, "\n".join(f"{name}: {code}" for name, code in wrong.items())
    assert log.violations == []


def updates(log: Log) -> list[Launch]:
    """csrc's updates of the weights that were not replayed: one a step."""
    return [x for x in log.eager() if x.kind == "kernel" and "update_pass" in x.name]


def check_steps(log: Log, replays: int | None) -> None:
    """A graph that is replayed so often, or (None) steps that are launched one by one, and no wait among them."""
    if replays is None:
        assert log.captures() == [] and log.replays() == []
        steps = updates(log)[3:]  # what is first met waits: tables are uploaded, kernels tried
        assert len(steps) >= 3
    else:
        assert len(log.captures()) == 1 and len(log.replays()) == replays
        steps = log.replays()
    assert [e.text for e in log.waits_between(steps)] == []


# ---------------------------------------------------------------------------------------------------------------------
# Training on one GPU

COMPILED = {
    "block": [],
    "model": ["--train.compile", "model"],
}
TRAININGS = {
    "eager": [],
    "no graphs": ["--train.graphs", "off"],
    "cudnn": ["--backend.attention", "cudnn"],
    "sdpa": ["--backend.attention", "sdpa"],
    "mlp torch": ["--backend.mlp", "torch"],
    "mlp cublaslt": ["--backend.mlp", "cublaslt"],
    "reference kernels": ["--backend.kernels", "reference"],
    "fp8": ["--train.fp8", "True"],
    "recompute elementwise": ["--train.memory", "recompute-elementwise"],
    "recompute blocks": ["--train.memory", "recompute-blocks"],
    "paper": ["--probe.branch", "paper"],
    "plain": ["--probe.enabled", "False"],
    "accumulate": ["--optim.accumulate", "2"],
    "averages": ["--optim.ema-extra", "0.9", "--optim.ema-profiles", "0.05", "0.1"],
    "fp32 residual": ["--train.fp32-residual", "True"],
    "fp32 weights": ["--train.weights", "fp32"],
    "resident": ["--data.loader", "resident"],
    "torch optimizer": ["--backend.optimizer", "torch", "--train.graphs", "off"],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training(name: str, latents: Path, tmp_path: Path) -> None:
    codes, log, _ = drive({name: train(latents, tmp_path / "run", *COMPILED[name])}, tmp_path)
    check(codes, log)
    check_steps(log, 5)
    assert any(x.name == "_attention_forward_kernel" for x in log.captured())
    assert any(x.name.startswith("triton_") for x in log.captured())


def test_eager_training(latents: Path, tmp_path: Path) -> None:
    cases = {name: train(latents, tmp_path / name, *EAGER, *more) for name, more in TRAININGS.items()}
    codes, log, _ = drive(cases, tmp_path)
    check(codes, log)
    for name in set(cases) - {"torch optimizer"}:
        check_steps(log.part(name), None if name == "no graphs" else 5)
    assert {x.name for x in log.part("cudnn").captured() if x.kind == "cudnn"} >= {"attention", "attention_backward"}
    assert any("e4m3" in x.name for x in log.part("fp8").captured() if x.kind == "gemm")
    assert any("epilogue164" in x.name for x in log.part("mlp cublaslt").captured())  # GELU, bias and auxiliary tensor


def test_a_run_with_everything_that_happens_to_runs(latents: Path, tmp_path: Path) -> None:
    """Checkpoints under way, a stop by SIGTERM and the rest of the run, a probe that ends, and LSEP's cost measured."""
    often = ["--train.checkpoint-every", "2", "--train.log-every", "1", *EAGER]
    stopped = train(latents, tmp_path / "stopped", *often, "--train.steps", "40")
    cases = {
        "checkpoints": train(latents, tmp_path / "checkpoints", *often),
        "terminated": ["terminate:3", *stopped[1:]],
        "resumed": [*stopped, "--resume"],
        "probe ends": train(latents, tmp_path / "ends", *EAGER, "--probe.end-step", "6", "--train.steps", "14"),
        "overhead": train(latents, tmp_path / "overhead", *EAGER, "--train.overhead-rounds", "2"),
        "snapshots": train(
            latents, tmp_path / "snapshots", *EAGER, "--optim.ema-profiles", "0.05", "0.1",
            "--optim.ema-snapshot-every", "3", "--train.sample-every", "4",
        ),
        "reconstruct": ["lsep", "ema", "reconstruct", str(tmp_path / "snapshots"), "--profile", "0.07"],
        "unet": ["lsep", "train", "quickstart-unet", *UNET, "--run-dir", str(tmp_path / "unet")],
    }  # fmt: skip
    codes, log, err = drive(cases, tmp_path)
    check(codes, log)
    assert "stopped by SIGTERM after step" in err
    steps = [json.loads(x)["step"] for x in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
    kept = sorted(int(p.name.partition("-")[2]) for p in (tmp_path / "checkpoints" / "checkpoints").iterdir())
    assert kept == [4, 6, 8]
    assert len(log.part("probe ends").captures()) == 2  # a graph with the probe, another without
    assert len(log.part("overhead").captures()) == 2
    assert any(x.name == "convolution_backward_filter" for x in log.part("unet").launches)
