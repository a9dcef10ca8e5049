"""What the tests share: a small configuration, small random data, and how errors are measured."""

import json
import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors this small are slower on more, the more so beside other tests

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before the kernels are imported: they run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor

from lsep.cli import main
from lsep.config import Config, ModelConfig, OptimConfig, ProbeConfig, TrainConfig, override
from lsep.data.loader import Batch
from lsep.data.manifest import Manifest
from lsep.data.writer import write_store
from lsep.objective import Objective
from lsep.step import open_loader, setup

TINY = Config(
    model=ModelConfig(depth=3, hidden_size=32, num_heads=2),
    probe=ProbeConfig(depth=2, window_min=2),
    optim=OptimConfig(lr=1e-3, probe_lr=1e-2, ema_decay=0.9),
    train=TrainConfig(
        steps=8, batch_size=10, log_every=2, checkpoint_every=4, sample_every=0, device="cpu", overhead_rounds=0
    ),
)
"""Three blocks of width 32; over `store` it sees 4 x 4 tokens."""


def tiny(**changes: Any) -> Config:
    """TINY with `section__field=value` changes."""
    return override(TINY, {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of 43 moments (2 x 3 channels, 8 x 8) in shards of 16, five classes, and seven of the probe's own."""
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(43, 3, 8, 8)), rng.uniform(0.1, 0.5, size=(43, 3, 8, 8))
    write_store(
        tmp_path / "store",
        kind="moments",
        x=np.concatenate([mean, std], axis=1).astype(np.float32),
        y=rng.integers(5, size=43),
        num_classes=5,
        probe_y=rng.integers(7, size=43),
        probe_classes=7,
        scale=0.5,
        shard_rows=16,
    )
    return tmp_path / "store"


MANIFEST = Manifest("test", "samples", (3, 8, 8), rows=1000, num_classes=5, probe_classes=7)


def lively(objective: Objective, seed: int = 0) -> Objective:
    """Give every weight a value: the zero gates of the initialisation would hide most errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in objective.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.15)
    return objective


def random_batch(size: int, seed: int = 0) -> Batch:
    """Random samples of MANIFEST's shape with labels for both branches."""
    g = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(size, 3, 8, 8, generator=g),
        torch.randint(5, (size,), generator=g),
        torch.randint(7, (size,), generator=g),
        torch.arange(size) + 1000 * seed,
    )


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest deviation as a share of the truth's largest entry."""
    got, truth = got.detach().double(), truth.detach().double()
    return float((got - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def assert_as_accurate(got: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor) -> None:
    """A kernel may be off by twice what plain PyTorch is in the same type, plus 1e-6 of the largest true entry.

    Triton's interpreter cuts bfloat16 off where a GPU rounds, which doubles an error.
    """
    assert got.shape == reference.shape == truth.shape
    assert got.dtype == reference.dtype
    truth = truth.detach().double()
    error, allowed = ((x.detach().double() - truth).abs().max() for x in (got, reference))
    floor = 1e-6 * truth.abs().max()
    factor = 4 if got.dtype == torch.bfloat16 and not got.is_cuda else 2
    assert error <= factor * allowed + floor, f"off by {error:.3g}, PyTorch by {allowed:.3g}, floor {floor:.3g}"


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TYPES = [torch.float32, torch.float16, torch.bfloat16]
DOT_TYPES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float32, torch.float16]
"""Types of matrix products: float32 tiles do not fit a GPU's registers, the interpreter is wrong in bfloat16."""

Operation = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float32 on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(operation: Operation, inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Results of `operation` on copies of `inputs` in `dtype`, and the gradients of all inputs for random ones back."""
    copies = [x.to(DEVICE, dtype, copy=True).requires_grad_() for x in inputs]
    out = operation(*copies)
    results = list(out) if isinstance(out, tuple) else [out]
    grads = [random(*r.shape, seed=99 + i).to(r) for i, r in enumerate(results)]
    torch.autograd.backward(results, grads)
    return [*results, *(c.grad for c in copies if c.grad is not None)]


def assert_kernel_is_as_accurate(
    kernel: Operation, reference: Operation, inputs: Sequence[torch.Tensor], dtype: torch.dtype
) -> None:
    """Results and all gradients against plain PyTorch's in float64, at most twice as far off as in `dtype`."""
    got, same_type = run(kernel, inputs, dtype), run(reference, inputs, dtype)
    truth = run(reference, inputs, torch.float64)
    assert len(got) == len(same_type) == len(truth)
    for ours, theirs, true in zip(got, same_type, truth, strict=True):
        assert_as_accurate(ours, theirs, true)


# ---------------------------------------------------------------------------------------------------------------------
# Alignment with an encoder

WIDTH, ROWS = 24, 30


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DINOv2 of two layers, patches of 14 pixels, and a normalisation of its own."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    small = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**small, hidden_dropout_prob=0.1)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3})
    )
    return folder


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """Smooth random images `(30, 3, 64, 64)` uint8."""
    x = np.random.default_rng(0).normal(size=(ROWS, 3, 8, 8)).repeat(8, 2).repeat(8, 3)
    return np.clip(128 + 60 * x, 0, 255).astype(np.uint8)


LABELS = np.random.default_rng(1).integers(5, size=ROWS)


@pytest.fixture(scope="session")
def images(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as PNG, dealt into folders as REPA's."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(pixels):
        file = folder / f"{i // 10:05d}" / f"img{i:08d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(file)
    return folder


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of latents of these images, with mirror images."""
    x = np.random.default_rng(2).normal(size=(ROWS, 3, 8, 8)).astype(np.float32)
    path = tmp_path_factory.mktemp("latents") / "store"
    write_store(path, kind="samples", x=x, y=LABELS, num_classes=5, flip=np.ascontiguousarray(x[..., ::-1]))
    return path


@pytest.fixture(scope="session")
def features(latents: Path, images: Path, dino: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens of DINOv2 for the latents' images, in float32, written by the command."""
    path = tmp_path_factory.mktemp("features") / "store"
    given = ["--encoder", str(dino), "--images", str(images), "--dtype", "float32", "--device", "cpu"]
    assert main(["data", "features", str(latents), str(path), *given, "--batch-size", "7", "--shard-rows", "13"]) == 0
    return path


def tokens_of(dino: Path, pixels: np.ndarray, size: int = 56) -> Tensor:
    """What the model itself gives for normalised, resized images, without the class token."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(dino).eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), 0.2
    x = (torch.from_numpy(pixels).float() / 255 - mean) / std
    with torch.no_grad():
        return model(torch.nn.functional.interpolate(x, (size, size), mode="bicubic")).last_hidden_state[:, 1:]


def aligned(data: Path, **changes: Any) -> Config:
    return tiny(**{"data__path": str(data), "align__depth": 2, "align__projector_dim": 16, **changes})


def batches(config: Config, steps: int = 5) -> list[Any]:
    return [[b.clone() for b in step] for step in islice(open_loader(setup(config), 0, steps), steps)]
