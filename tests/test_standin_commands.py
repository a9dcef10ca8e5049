"""Every command that uses a GPU, on the stand-in, to its end, at small sizes: no violation, no wait of the host in
steps that are replayed, no launch outside a capture. What is computed has no meaning here; that it runs has."""

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
"""Heads of 64 over 256 tokens, as the Triton attention wants them; three of the eight steps warm up for the graph."""
UNET = """
--model.hidden-size 64 --model.num-heads 4 --probe.window-min 3 --optim.warmup-steps 0 --train.steps 7
--train.batch-size 20 --train.log-every 1000 --train.checkpoint-every 1000 --train.sample-every 0
--train.overhead-rounds 0 --train.device cuda --sample.num 4 --sample.steps 2 --data.path digits
""".split()
EAGER = ["--train.compile", "off"]


@pytest.fixture(scope="session")
def store32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 moments of 4 x 32 x 32 latents, five classes."""
    path = tmp_path_factory.mktemp("store32") / "store"
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8, 32, 32)).astype(np.float32)
    write_store(path, kind="moments", x=x, y=rng.integers(5, size=64), num_classes=5, scale=0.5)
    return path


def drive(
    cases: Mapping[str, Sequence[str]],
    folder: Path,
    launcher: Sequence[str] = (),
    timeout: float = 500,
    **given: object,
) -> tuple[dict[str, object], Log, str, str]:
    """Exit codes, log, stderr and stdout of commands that run one after the other in one process."""
    (folder / "cases.json").write_text(json.dumps({k: list(map(str, v)) for k, v in cases.items()}))
    files = [str(folder / "cases.json"), str(folder / "codes.json")]
    command = [*launcher, str(standin_run.HERE / "drive.py"), *files]
    done = standin_run.run(command, timeout=timeout, **given)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(Path(files[1]).read_text()), done.log, done.stderr, done.stdout


def train(store: Path, run: Path, *more: str) -> list[str]:
    return ["lsep", "train", "quickstart", *SMALL, "--data.path", str(store), "--run-dir", str(run), *more]


def check(codes: Mapping[str, object], log: Log, err: str) -> None:
    """Every case ended well, and nothing that a GPU would have refused came up."""
    wrong = {name: code for name, code in codes.items() if code != 0}
    assert not wrong, "\n".join(f"{name}: {code}" for name, code in wrong.items()) + err[-3000:]
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
    "fp8": ["--train.fp8"],
    "recompute elementwise": ["--train.memory", "recompute-elementwise"],
    "recompute blocks": ["--train.memory", "recompute-blocks"],
    "paper": ["--probe.branch", "paper"],
    "plain": ["--probe.no-enabled"],
    "accumulate": ["--optim.accumulate", "2"],
    "averages": ["--optim.ema-extra", "0.9", "--optim.ema-profiles", "0.05", "0.1"],
    "fp32 residual": ["--train.fp32-residual"],
    "fp32 weights": ["--train.weights", "fp32"],
    "resident": ["--data.loader", "resident"],
    "torch optimizer": ["--backend.optimizer", "torch", "--train.graphs", "off"],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training(name: str, store32: Path, tmp_path: Path) -> None:
    codes, log, err, _ = drive({name: train(store32, tmp_path / "run", *COMPILED[name])}, tmp_path)
    check(codes, log, err)
    check_steps(log, 5)
    assert any(x.name == "_attention_forward_kernel" for x in log.captured())
    assert any(x.name.startswith("triton_") for x in log.captured())


def test_eager_training(store32: Path, tmp_path: Path) -> None:
    cases = {name: train(store32, tmp_path / name, *EAGER, *more) for name, more in TRAININGS.items()}
    codes, log, err, _ = drive(cases, tmp_path)
    check(codes, log, err)
    for name in set(cases) - {"torch optimizer"}:
        check_steps(log.part(name), None if name == "no graphs" else 5)
    assert {x.name for x in log.part("cudnn").captured() if x.kind == "cudnn"} >= {"attention", "attention_backward"}
    assert any("e4m3" in x.name for x in log.part("fp8").captured() if x.kind == "gemm")
    assert any("epilogue164" in x.name for x in log.part("mlp cublaslt").captured())  # GELU, bias and auxiliary tensor


def test_a_run_with_everything_that_happens_to_runs(store32: Path, tmp_path: Path) -> None:
    """Checkpoints under way, a stop by SIGTERM and the rest of the run, a probe that ends, and LSEP's cost measured."""
    often = ["--train.checkpoint-every", "2", "--train.log-every", "1", *EAGER]
    stopped = train(store32, tmp_path / "stopped", *often, "--train.steps", "40")
    cases = {
        "checkpoints": train(store32, tmp_path / "checkpoints", *often),
        "terminated": ["terminate:3", *stopped[1:]],
        "resumed": [*stopped, "--resume"],
        "rollback": ["spike:3", *train(
            store32, tmp_path / "rollback", *often, "--train.on-spike", "rollback")[1:]],
        "probe ends": train(store32, tmp_path / "ends", *EAGER, "--probe.end-step", "6", "--train.steps", "14"),
        "overhead": train(store32, tmp_path / "overhead", *EAGER, "--train.overhead-rounds", "2"),
        "snapshots": train(
            store32, tmp_path / "snapshots", *EAGER, "--optim.ema-profiles", "0.05", "0.1",
            "--optim.ema-snapshot-every", "3", "--train.sample-every", "4",
        ),
        "reconstruct": ["lsep", "ema", "reconstruct", str(tmp_path / "snapshots"),
                        "--sigma-rel", "0.07", "--out", str(tmp_path / "made")],
        "unet": ["lsep", "train", "quickstart-unet", *UNET, *EAGER, "--run-dir", str(tmp_path / "unet")],
    }  # fmt: skip
    codes, log, err, out = drive(cases, tmp_path)
    check(codes, log, err)
    assert "stopped by SIGTERM after step" in err
    steps = [json.loads(x)["step"] for x in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints" / "checkpoints").iterdir())
    assert kept == [4, 6, 8]
    assert "back at step 2; the data of 1 steps is left out" in out
    assert len(log.part("probe ends").captures()) == 2  # a graph with the probe, another without
    # The first is dropped while the step without the probe warms up, and captured again.
    assert len(log.part("overhead").captures()) == 3
    assert any(x.name == "convolution_backward_filter" for x in log.part("unet").launches)


# ---------------------------------------------------------------------------------------------------------------------
# The other commands

EXTRACTOR = """
from typing import NamedTuple
import torch

class Found(NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor

def extract(images, device):
    x = torch.from_numpy(images).to(device).float().permute(0, 3, 1, 2)
    x = torch.nn.functional.conv2d(x, torch.zeros(8, 3, 3, 3, device=device)).mean((2, 3))
    return Found(x, x)
"""


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random AutoencoderKL that downsamples by 8 to four channels."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {
        f"{way}_block_types": (f"{name}Block2D",) * 4 for way, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), latent_channels=4, norm_num_groups=4, **blocks
    ).save_pretrained(folder)
    return folder


def test_what_is_done_with_a_run(store32: Path, vae: Path, tmp_path: Path) -> None:
    """Sampling by each sampler, evaluation, the probe of separability, the profile and the benchmark of a step."""
    run, images = tmp_path / "run", tmp_path / "images"
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", rng.integers(256, size=(40, 8, 8, 3), dtype=np.uint8))
    (tmp_path / "mine.py").write_text(EXTRACTOR)
    cuda = ["--device", "cuda"]
    features = ["--features", f"{tmp_path / 'mine.py'}:extract", *cuda]
    images.mkdir()
    sample = ["lsep", "sample", str(run), "--num", "4", *cuda]
    small = [x for x in SMALL if not x.startswith("--run-dir")]
    cases = {
        "train": train(store32, run, *EAGER),
        "ode": [*sample, "--sampler", "ode", "--steps", "2", "--cfg", "1.5", "--out", str(tmp_path / "ode")],
        "sde": [*sample, "--sampler", "sde", "--steps", "3", "--out", str(tmp_path / "sde")],
        "heun": [*sample, "--sampler", "heun", "--steps", "2", "--vae", str(vae), "--out", str(tmp_path / "heun.npz")],
        "reference": [
            "lsep", "evaluate", "reference", str(tmp_path / "b.npz"), *features, "--out", str(tmp_path / "r.npz")
        ],
        "evaluate": ["lsep", "evaluate", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "r.npz"), *features],
        "probe": ["lsep", "probe", str(run), "--times", "0.5", "--num", "60", "--seeds", "1", *cuda],
        "profile": [
            "lsep", "profile", "quickstart", *small, *EAGER, "--data.path", str(store32), "--steps", "2",
            "--out", str(tmp_path / "profile"),
        ],
        "bench.step": [
            "bench.step", "--preset", "tiny", "--variants", "plain", "shared-0.8", "--rounds", "1", "--steps", "2",
            "--compile", "off", "--no-budget", "--json", str(tmp_path / "step.json"),
        ],
    }  # fmt: skip
    codes, log, err, _ = drive(cases, tmp_path)
    check(codes, log, err)
    assert all(log.part(name).launches for name in cases)
    assert np.load(tmp_path / "heun.npz")["arr_0"].shape == (4, 256, 256, 3)
    rows = json.loads((tmp_path / "step.json").read_text())["variants"]
    assert [row["variant"] for row in rows] == ["plain", "shared-0.8"]


def test_data_is_encoded_and_a_training_aligned(
    latents: Path, images: Path, dino: Path, vae: Path, tmp_path: Path
) -> None:
    """A VAE's moments, an encoder's tokens, and trainings that are drawn to them, of a store and of the encoder."""
    aligned = train(latents, tmp_path / "store", *EAGER, "--align.depth", "1", "--align.projector-dim", "16")
    aligned += ["--probe.window-min", "2", "--train.batch-size", "10"]
    # The encoder itself sees images that train: those behind latents are decoded by DALI, which needs a real GPU.
    online = ["--data.path", "digits", "--align.encoder", str(dino), "--run-dir", str(tmp_path / "online")]
    cases = {
        "encode": [
            "lsep", "data", "encode", str(images), str(tmp_path / "moments"), "--vae", str(vae), "--size", "64",
            "--labels", "none",
        ],
        "features": [
            "lsep", "data", "features", str(latents), str(tmp_path / "tokens"), "--encoder", str(dino),
            "--images", str(images), "--device", "cuda", "--precision", "bf16",
        ],
        "aligned": [*aligned, "--align.features", str(tmp_path / "tokens")],
        "aligned online": [*aligned, *online],
    }  # fmt: skip
    codes, log, err, _ = drive(cases, tmp_path)
    check(codes, log, err)
    assert any(x.name == "convolution" for x in log.part("encode").launches)
    assert any(x.name == "convolution" for x in log.part("features").launches)
    for name in ("aligned", "aligned online"):
        check_steps(log.part(name), 5)


# ---------------------------------------------------------------------------------------------------------------------
# Several GPUs


@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices(devices: int, store32: Path, tmp_path: Path) -> None:
    """Each mode; hsdp in replicas of two shards."""
    cases = {
        mode: train(
            store32, tmp_path / mode, *EAGER, "--dist.mode", mode, "--train.graphs", "off",
            *(["--dist.replicate", str(devices // 2)] if mode == "hsdp" else []),
        )
        for mode in ("ddp", "fsdp", "hsdp")
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    codes, log, err, _ = drive(cases, tmp_path, launcher, devices=devices)
    check(codes, log, err)
    assert len(log.pids) == devices
    for pid in log.pids:
        own = [x for x in log.launches if x.pid == pid]
        assert len({x.device for x in own}) == 1
        assert {x.name.split()[0] for x in own if x.kind == "nccl"} >= {"all_reduce", "all_gather"}
    assert len({x.device for x in log.launches}) == devices
