"""How large a configuration is, before any of it is allocated: parameters, bytes of a training, and what there is.

    require_weights(config, probe_classes)          where a model is built
    require_training(config, manifest, device, n)   where one is to be trained

Counts are exact for a SiT and a lower bound for a U-Net: what is refused could not have fitted.
"""

from pathlib import Path

import torch

from lsep.config import Config
from lsep.cost import parameters as cost
from lsep.data.manifest import Manifest
from lsep.errors import UserError

_FLOAT = 4
DEEPEST = 4096
"""Blocks of a SiT, at most: beside its weights each takes the host's memory and time to be built."""


def parameters(config: Config, probe_classes: int) -> int:
    """Trained weights of backbone, classifier and projector of a resolved `config`; of a U-Net at least so many."""
    if config.model.backbone == "sit":
        return cost.parameters(config, probe_classes).total
    align, d = config.align, config.model.hidden_size
    count = _unet(config)
    if config.probe.enabled:
        count += 2 * d + d * probe_classes + probe_classes
    if align.enabled and align.width is not None:
        z = align.projector_dim
        count += d * z + z + z * z + z + z * align.width + align.width
    return count


def _unet(config: Config) -> int:
    """Two convolutions of 3 x 3 in each residual block of the last level and mid-block, one block left out; labels."""
    m, d = config.model, config.model.hidden_size
    assert m.num_classes is not None
    return (2 * m.layers_per_level + 2) * 18 * d * d + (m.num_classes + 1) * d


def host_memory() -> int:
    """Bytes that processes on this machine, or in this container, may have together."""
    import os

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            whole = min(whole, int(Path(file).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return whole


def require_weights(config: Config, probe_classes: int) -> None:
    """Raise UserError where the weights alone of a resolved `config` are more than this machine's memory."""
    m = config.model
    if m.depth > DEEPEST:
        raise UserError(f"--model.depth is {m.depth}, expected at most {DEEPEST}")
    if torch.get_default_device().type == "meta":  # nothing is allocated there
        return
    count = parameters(config, probe_classes)
    _require(config, count, count * _FLOAT, "weights alone take", "this machine", host_memory())


def require_training(
    config: Config, manifest: Manifest, device: torch.device, processes: int = 1, averages: int = 0
) -> None:
    """Raise UserError where a training of a resolved `config` cannot fit: weights, averages, moments, samples, batches.

    processes: those that hold shards of it. averages: those beside the EMA.
    """
    count = parameters(config, manifest.probe_classes)
    # Weights, EMA, two moments, and gradients, which may be in bf16.
    needed = count * (_FLOAT * (4 + averages) + 2) // processes
    cuda = device.type == "cuda"
    there = torch.cuda.get_device_properties(device).total_memory if cuda else host_memory()
    _require(config, count, needed, "training takes", "this GPU" if cuda else "this machine", there)
    c, h, w = manifest.shape
    host = host_memory()
    for flag, rows, each, what in (
        ("--sample.num", config.sample.num, c * h * w * 2 * _FLOAT, "whose grid"),
        (
            "--data.prefetch",
            config.data.prefetch * (config.train.batch_size // config.optim.accumulate),
            manifest.row_bytes,
            "micro-batches, which",
        ),
    ):
        if rows * each > host:
            number = config.sample.num if flag == "--sample.num" else config.data.prefetch
            raise UserError(
                f"{flag} is {number}, {what} would take {_gib(rows * each)}, but this machine has {_gib(host)}: "
                "expected a smaller number"
            )


def _require(config: Config, count: int, needed: int, what: str, where: str, there: int) -> None:
    if needed > there:
        m = config.model
        raise UserError(
            f"--model.hidden-size {m.hidden_size} with --model.depth {m.depth} makes a model of {count:,} parameters, "
            f"whose {what} at least {_gib(needed)}, but {where} has {_gib(there)}: expected a smaller model"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
