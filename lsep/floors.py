"""The floor of each room of a step: its matrix products at the device's rate, plus its bytes at the rate of a copy.

The FLOPs are those of `lsep.flops`; the bytes are what the kernels of `lsep_kernels` read and write at least, forward
and backward (docs/kernels.md). Element-wise work that an epilogue could do for nothing (biases, GELU) counts 0, and so
does that of a U-Net, which has no kernels here.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from lsep.config import Config
from lsep.data.manifest import Manifest
from lsep.flops import SECOND, step_parts
from lsep.plan import BranchPlan, branch_plan

_ROOM_OF_PART = {
    "modulation": "adaLN", "qkv": "attention", "attention": "attention", "proj": "attention", "fc1": "MLP",
    "fc2": "MLP", "pooling": "probe", "probe head": "probe", "projector": "align",
    "embedding": "other", "final layer": "other", "U-Net": "other",
}  # fmt: skip


class Rates(NamedTuple):
    """What the device reaches, measured."""

    flops: float
    """FLOP/s of a large matrix product in the training's type."""
    bytes: float
    """Bytes/s of a large copy, read and written."""


class Work(NamedTuple):
    """What a step must do in a room."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        return self.flops / rates.flops + self.bytes / rates.bytes


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of `device`: the best of 5 products of 8192^3 and copies of 1 GiB (1024^3 and 64 MiB on a CPU)."""
    cuda = device.type == "cuda"
    n, size = (8192, 1 << 30) if cuda else (1024, 1 << 26)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(6):  # the first warms up
            if cuda:
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    found = Rates(2 * n**3 / best(lambda: a @ b), 2 * size / best(lambda: target.copy_(source)))
    if cuda:
        del a, b, source, target
        torch.cuda.empty_cache()
    return found


def step_work(config: Config, manifest: Manifest, params: int, row_bytes: int, probe: bool) -> dict[str, Work]:
    """FLOPs and bytes of a whole step by room.

    `config` is resolved, with its precision; `params` counts all parameters, `row_bytes` is a stored row's size.
    """
    flops: dict[str, float] = {}
    for part, found in step_parts(config, manifest.probe_classes, probe).items():
        room = _ROOM_OF_PART[part.removeprefix(SECOND)]
        flops[room] = flops.get(room, 0) + found.training
    sizes: dict[str, float] = {"optimizer": 40 * params}  # 4 for the norm; p, m, v, EMA read and written, the gradient
    shards = config.optim.accumulate
    for shard in range(shards):
        for room, count in _bytes(config, branch_plan(config, shard, shards, probe), row_bytes).items():
            sizes[room] = sizes.get(room, 0) + count
    return {room: Work(flops.get(room, 0), sizes.get(room, 0)) for room in {**flops, **sizes}}


def _bytes(config: Config, plan: BranchPlan, row_bytes: int) -> dict[str, float]:
    """Of one micro-batch: the operations between the matrix products."""
    m, probe, tokens = config.model, config.probe, config.grid**2
    assert m.in_channels is not None and m.input_size is not None
    element = 2 if config.train.precision == "bf16" else 4
    latent = plan.batch * m.in_channels * m.input_size**2
    found: dict[str, float] = {
        "interpolant": plan.batch * row_bytes + 8 * latent,
        "losses": (3 * element + 8) * latent,
    }
    if m.backbone == "sit":
        rows_of = [plan.batch + (plan.extra if plan.probe and i < probe.depth else 0) for i in range(m.depth)]
        # Of the probed block's second half the extra rows need none.
        seams = sum(2 * rows for rows in rows_of) - (plan.extra if plan.probe else 0)
        per_seam = 10 * element  # forward 4 tensors (x, y, x', h), backward 6
        found["adaLN"] = (per_seam * seams + 5 * element * rows_of[0]) * tokens * m.hidden_size
    if plan.probe:
        window = probe.window_min**2  # tokens outside the window are not read, but their gradient is written
        width, hidden = m.hidden_size, int(m.hidden_size * m.mlp_ratio)
        stream = plan.batch * width * element * (window + tokens)
        pooled_gelu = m.backbone == "sit" and probe.pool_before_fc2
        gelu = plan.extra * hidden * element * (2 * window + tokens) if pooled_gelu else 0
        found["probe"] = stream + gelu
    return found
