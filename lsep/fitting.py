"""`train.memory auto`: how a step is made to fit into the GPU's memory, settled once, before the run is built.

The peak of a step is computed (`lsep.cost.memory`) and held against what is free. Where it does not fit, the batch is
cut into micro-batches first, which changes no loss and computes nothing twice; recomputation comes second
(`lsep.cost.fit`). The choice is stored in the run's configuration, and a run goes on with its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from lsep.config import Config, override
from lsep.cost.fit import Setting, fit, free_of, setting_of
from lsep.cost.memory import unmodelled
from lsep.dist import World
from lsep.errors import UserError, out_of_memory


class Fitted(NamedTuple):
    """A configuration whose `train.memory` is no longer auto, and what a user should know of it: a line, or none."""

    config: Config
    notes: list[str]
    needed: int = 0
    """Bytes that must be free for a step, where they are modelled."""


def fit_memory(config: Config, world: World, probe_classes: int) -> Fitted:
    """Settle `train.memory` auto for this GPU, on all processes alike; `config` must be resolved.

    Raises UserError where no setting fits. Where the memory of a configuration is not modelled (a CPU, a U-Net, fsdp),
    auto is `keep`.
    """
    auto = config.train.memory == "auto"
    kept = override(config, {"train.memory": "keep"}) if auto else config
    if unmodelled(kept, world.device, world.size) is not None:
        return Fitted(kept, [])
    now = setting_of(kept, world.device, probe_classes, world.size)
    if not auto:
        return Fitted(config, [], now.needed)
    free = world.least(free_bytes(world.device))
    found = fit(kept, world.device, probe_classes, free, world.size)
    if found.chosen is None:
        raise UserError(
            f"--train.memory auto: a step needs {_gb(now.needed)} (computed), and {world.device} has {_gb(free)} free; "
            f"the least, {found.least.flags}, needs {_gb(found.least.needed)}: use a GPU with more memory, more "
            "processes, or a smaller --train.batch-size"
        )
    chosen = found.chosen.applied(kept)
    if chosen == kept:
        return Fitted(kept, [], now.needed)
    return Fitted(chosen, [
        f"train.memory auto: a step needs {_gb(now.needed)} (computed), {_gb(free)} are free: it runs as "
        f"{found.chosen.flags}, which needs {_gb(found.chosen.needed)}"
    ], found.chosen.needed)  # fmt: skip


def free_bytes(device: torch.device) -> int:
    """What this process may still allocate on a GPU: what nobody has, and what torch's allocator holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@contextmanager
def memory_runs_out(config: Config, world: World, probe_classes: int) -> Iterator[None]:
    """Around a training: where the GPU's memory runs out all the same, a sentence with settings that would fit."""
    try:
        yield
    except RuntimeError as error:
        clause = out_of_memory(error)
        if clause is None:
            raise
        raise UserError(f"{clause}; {_advice(config, world, probe_classes)}") from error


def _advice(config: Config, world: World, probe_classes: int) -> str:
    """The three best settings that need less than the one that did not fit, or what else there is to do."""
    if unmodelled(config, world.device, world.size) is not None:
        return "try a larger --optim.accumulate, or a smaller --train.batch-size"
    free = free_of(torch.cuda.get_device_properties(world.device).total_memory)
    now = setting_of(config, world.device, probe_classes, world.size)
    found = fit(override(config, {"optim.accumulate": 1}), world.device, probe_classes, free, world.size)
    # One for each policy, then the next best.
    smaller = [s for s in dict.fromkeys([*found.different, *found.fitting]) if s.needed < now.needed][:3]
    if not smaller:
        return f"{now.flags} needs {_gb(now.needed)} (computed), the least there is: use a smaller --train.batch-size"
    return f"{now.flags} needs {_gb(now.needed)} (computed), these would fit: {'; '.join(map(_shown, smaller))}"


def _shown(setting: Setting) -> str:
    return f"{setting.flags} ({_gb(setting.needed)})"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
