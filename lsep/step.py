"""One training step: `setup` builds what it needs, `train_step` runs it.

What differs from step to step is on the device before it begins: the batch, its number, its epoch, its learning rates.
The step itself is a function of tensors alone, without a host sync, and so a CUDA graph can hold all of it
(`lsep.graphs`).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from lsep import backbone, backends, sizes
from lsep.averages import Averages, kept
from lsep.backbone import Backbone
from lsep.backends import Backends
from lsep.checks import check, require_classes, resolve, resolve_align
from lsep.config import Config
from lsep.data import order
from lsep.data.loader import Batch, Loader, open_source
from lsep.data.reader import Sequence
from lsep.data.store import Store
from lsep.dist import World
from lsep.errors import UserError
from lsep.fitting import fit_memory
from lsep.graphs import Graphs
from lsep.inductor import COMPILE
from lsep.metrics import require_wandb
from lsep.model import SiT
from lsep.objective import Losses, Objective
from lsep.optim import Optimizer, bf16_copies, build_optimizer, rate_factor
from lsep.parallel import OneProcess, Parallel, Replicas, Shards, gathered, shard
from lsep.plan import BranchPlan, branch_plan
from lsep.ranges import span
from lsep.run import Run
from lsep.teacher import Teacher, open_teacher
from lsep.weights.starting import start


@dataclass
class State:
    """What a step needs."""

    config: Config
    source: Store
    teacher: Teacher
    world: World
    objective: Objective
    learning: Objective
    """What has the gradients: `objective`, or its copy in bf16."""
    ema: Objective
    averages: dict[str, Objective]
    """Those beside `ema`, by their names in a checkpoint (`lsep.averages`)."""
    optimizer: Optimizer
    bf16: bool
    """Matmuls run in bf16, under autocast."""
    compute: Callable[[bool, list[Batch]], Tensor]
    """The device's part of a step, with or without the probe: `compute_step`, itself or as a CUDA graph."""
    at_step: Tensor
    """The step's number from 0, int64 on the device."""
    at_epoch: Tensor
    """Its epoch, likewise."""
    steps_per_epoch: int
    backends: Backends
    """Which implementations compute the step."""
    notes: list[str]
    """What a user should know of the choices made: a line each."""
    step_bytes: int = 0
    """Memory of the GPU that a step needs, computed; 0 where that is not modelled."""
    offset: int = 0
    """Steps whose data was left out after spikes: step n trains on the batch of step n + offset."""

    @property
    def device(self) -> torch.device:
        return self.world.device


def pick_device(wanted: str) -> torch.device:
    """The device behind `--train.device` or `--device`."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device 'cuda' was asked for, but torch {torch.__version__} finds no GPU here; expected 'cpu' or 'auto'"
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def setup(config: Config, world: World | None = None, begins: bool = True) -> State:
    """Open the data, resolve and check the configuration, build modules and optimizer, spread them over `world`.

    begins: no checkpoint will be loaded, so that `train.init` counts.
    """
    check(config)
    backbone.require(config)
    world = world or World(pick_device(config.train.device))
    device = world.device
    if config.train.batch_size % (config.optim.accumulate * world.size):
        raise UserError(
            f"--train.batch-size {config.train.batch_size} is not divisible by {world.size} processes times "
            f"--optim.accumulate {config.optim.accumulate}"
        )
    if config.train.wandb:
        require_wandb()
    source = open_source(config.data)
    config = resolve(config, source.manifest)
    notes = [source.manifest.unseen() if config.model.conditional else None]
    notes.append(None if source.manifest.labelled else "no labels: the model is unconditional, and the probe is off")
    if begins:
        require_classes(config, source.manifest)
    if config.train.precision == "auto":  # settled here, so that a run cannot change it on another machine
        precision: Literal["fp32", "bf16"] = "bf16" if device.type == "cuda" else "fp32"
        config = replace(config, train=replace(config.train, precision=precision))
    teacher = open_teacher(config, source, device)
    config = resolve_align(config, teacher.shape)
    holders = 1 if world.mesh is None else world.mesh.size(-1)
    sizes.require_training(config, source.manifest, device, holders, len(kept(config.optim)))
    fitted = fit_memory(config, world, source.manifest.probe_classes)
    config = fitted.config
    chosen = backends.choose(config, device, world.size)
    objective = Objective(config, source.manifest, chosen.ops)
    objective.initialize(config.train.seed)
    said: list[str] = []
    if begins and config.train.init is not None:
        said = start(Run.existing(config.train.init), config, source.manifest, objective)
    objective.to(device)
    ema = copy.deepcopy(objective).eval().requires_grad_(False)
    further = {name: copy.deepcopy(ema) for name in kept(config.optim)}
    copies = bf16_copies(objective) if chosen.bf16_weights else None
    learning = copies or objective
    if chosen.joint_modulation:
        assert isinstance(learning.model, SiT)
        learning.model.join_modulations()
    bf16 = config.train.precision == "bf16"
    parallel = _spread(config, world, (learning, ema, *further.values()), _compiled(learning, chosen.compile))
    optimizer = build_optimizer(objective, ema, config.optim, chosen.optimizer, world, copies)
    averages = Averages(objective, further, config.optim)
    at_step, at_epoch = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    micro = config.optim.accumulate
    own = range(world.rank * micro, (world.rank + 1) * micro)
    plans = {probe: [branch_plan(config, i, micro * world.size, probe) for i in own] for probe in (False, True)}
    warnings = [*backends.substitutes(config, device), *said]
    compute = partial(compute_step, parallel, optimizer, averages, plans, at_step, at_epoch, bf16)
    return State(
        config=config,
        source=source,
        teacher=teacher,
        world=world,
        objective=objective,
        learning=learning,
        ema=ema,
        averages=further,
        optimizer=optimizer,
        bf16=bf16,
        compute=Graphs(compute, device) if chosen.graphs else compute,
        at_step=at_step,
        at_epoch=at_epoch,
        steps_per_epoch=order.steps_per_epoch(source.manifest.rows, config.train.batch_size),
        backends=chosen,
        notes=[*(f"warning: {text}" for text in warnings), *fitted.notes, *filter(None, notes)],
        step_bytes=fitted.needed,
    )


def _compiled(objective: Objective, what: str) -> Callable[..., Losses]:
    """`objective`, or that compiled, or with its blocks compiled: one code for all blocks of a shape."""
    if what == "block":
        objective.model.compile_blocks()
    return torch.compile(objective, **COMPILE) if what == "model" else objective


def _spread(config: Config, world: World, modules: tuple[Objective, ...], forward: Callable[..., Losses]) -> Parallel:
    """`forward` over the processes of `world`; for fsdp the weights of all `modules`, of which the first learns,
    become shards.
    """
    learning = modules[0]
    if world.size == 1:
        return OneProcess(forward)
    bf16 = config.train.precision == "bf16"
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if world.mesh is not None:
        compute = torch.bfloat16 if bf16 and config.train.weights != "fp32" else None
        reduce = types.get(config.dist.reduce, compute or torch.float32)
        for module in modules:
            shard(module, world, compute, reduce)
        return Shards(learning, forward)
    reduce = types.get(config.dist.reduce, next(learning.parameters()).dtype)
    whole = forward if isinstance(forward, nn.Module) else learning
    return Replicas(whole, learning.classifier, world, reduce)


def average_model(state: State, everywhere: bool = False) -> Backbone | None:
    """The backbone with the averaged weights, whole, on the first process or on all of them. All call it."""
    wanted = state.world.main or everywhere
    if state.world.mesh is None:
        return state.ema.model if wanted else None
    weights = gathered(p.detach() for p in state.ema.model.parameters())
    if not wanted:
        return None
    model = backbone.build(state.config, state.objective.ops).to(state.device).eval().requires_grad_(False)
    for p, whole in zip(model.parameters(), weights, strict=True):
        p.copy_(whole)
    return model


def open_loader(state: State, first: int, last: int) -> Loader:
    """This process's batches of steps `first` to `last - 1` (counted from 0)."""
    train, data, world = state.config.train, state.config.data, state.world
    sequence = Sequence(
        state.source, train.seed, train.batch_size, state.config.optim.accumulate, first + state.offset,
        last + state.offset, data.on_corrupt == "skip", world.rank, world.size, state.teacher.features,
        state.teacher.images,
    )  # fmt: skip
    assert state.config.model.input_size is not None
    image_size = state.config.align.image_size or 8 * state.config.model.input_size
    return Loader(sequence, data, state.device, state.teacher.encoder, image_size, state.step_bytes)


def train_step(state: State, step: int, batches: list[Batch], probe: bool | None = None) -> Tensor:
    """One optimizer step, without a host sync. `step` counts from 0; `probe` overrules the configuration.

    Returns what `compute_step` does.
    """
    config = state.config
    if probe is None:
        probe = config.probe.enabled and (config.probe.end_step is None or step < config.probe.end_step)
    # Filled on the device: a tensor made from a host value would wait for the copy.
    state.at_step.fill_(step)
    state.at_epoch.fill_((step + state.offset) // state.steps_per_epoch)
    state.optimizer.set_rate(rate_factor(step, config.optim, config.train.steps))
    return state.compute(probe, batches)


def compute_step(
    parallel: Parallel,
    optimizer: Optimizer,
    averages: Averages,
    plans: dict[bool, list[BranchPlan]],
    at_step: Tensor,
    at_epoch: Tensor,
    bf16: bool,
    probe: bool,
    batches: list[Batch],
) -> Tensor:
    """Losses, gradients and update; the host decides nothing in here but by its arguments.

    Returns (denoising, lsep, gradient norm, hits by bin of t, counts by bin of t, align, 0) on the device, see
    `Losses`, of this process's samples, and the norm of all; for a step that was skipped, because its gradient is not
    finite, zeros and a 1.
    """
    statistics = []
    for i, (plan, batch) in enumerate(zip(plans[probe], batches, strict=True), 1):
        with parallel.micro_batch(last=i == len(batches)):
            with span("forward"), torch.autocast(at_step.device.type, torch.bfloat16, enabled=bf16):
                losses = parallel.forward(batch, plan, at_step, at_epoch)
            with span("backward"):
                (losses.total / len(batches)).backward()
        means = torch.stack([losses.denoising, losses.lsep]) / len(batches)
        statistics.append(torch.cat([means, losses.hits.flatten(), losses.align[None] / len(batches)]))
    with span("optimizer"):
        parallel.finish()
        norm = optimizer.step()
        finite = torch.isfinite(norm)
        averages.update(finite, at_step)
    total = torch.stack(statistics).sum(0)
    total = torch.where(finite, torch.cat([total[:2], norm[None], total[2:]]), 0)
    return torch.cat([total, (~finite)[None].to(total.dtype)])
