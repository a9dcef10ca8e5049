"""Which loss of which sample is not finite: asked once steps have been skipped and before a run ends for it."""

import torch
import torch.distributed as dist
from torch import Tensor

from lsep import interpolant, probe
from lsep.data.loader import Batch
from lsep.step import State

MOST = 5
"""Samples named."""


def not_finite(state: State, step: int, batches: list[Batch]) -> str:
    """One clause on the samples of `step` (from 0) whose losses are not finite at the present weights, over all ranks.

    Skipped steps have left the weights alone, so these are the losses that were skipped. All processes call it.
    """
    own = [text for batch in batches for text in _of_batch(state, step, batch)]
    everyone: list[list[str]] = [own]
    if state.world.size > 1:
        everyone = [[] for _ in range(state.world.size)]
        dist.all_gather_object(everyone, own, group=state.world.host)
    found = [text for texts in everyone for text in texts]
    if not found:
        return "the losses of its samples are finite, so it is their gradient that is not"
    more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
    return "; ".join(found[:MOST]) + more


def _of_batch(state: State, step: int, batch: Batch) -> list[str]:
    t, causes = judged(state, step, batch)
    found, seen = [], torch.zeros_like(batch.id, dtype=torch.bool)
    for cause, values in causes.items():
        bad = ~torch.isfinite(values) & ~seen
        seen |= bad
        for place in bad.nonzero().flatten().tolist():
            sample = int(batch.id[place])
            found.append(f"the {cause} of sample {sample} at t = {float(t[place]):.3f} is {float(values[place])}")
    return found


@torch.no_grad()
def judged(state: State, step: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Times t `(B,)` and what may not be finite, by its name: of each sample, `(B,)`. The denoising loss is that of
    `Objective` with all labels kept.
    """
    config, objective = state.config, state.learning
    epoch = torch.full((), (step + state.offset) // state.steps_per_epoch, dtype=torch.int64, device=state.device)
    at = torch.full((), step, dtype=torch.int64, device=state.device)
    with torch.autocast(state.device.type, torch.bfloat16, enabled=state.bf16):
        noised = interpolant.noise(
            batch.x, state.source.manifest, config.interpolant, config.train.seed, epoch, batch.id,
            objective.ops,
        )  # fmt: skip
        causes: dict[str, Tensor] = {"x_t": noised.x_t.flatten(1).sum(1)}
        if config.probe.enabled:
            window = probe.draw_windows(config.probe, config.grid, config.train.seed, at, epoch, batch.id)
            patches, features = objective.model.forward_with_probe(
                noised.x_t, noised.t, batch.y, batch.y[:0], config.probe.depth, window
            )
        else:
            patches = objective.model.patches(noised.x_t, noised.t, batch.y)
        wanted = interpolant.target(config.interpolant, noised)
        causes["denoising loss"] = objective.ops.velocity_loss(patches, wanted, objective.model.patch_size)
        if config.probe.enabled:
            causes["LSEP loss (its features)"] = features.sum(1)
        if batch.tokens is not None:
            causes["alignment loss (the encoder's tokens)"] = batch.tokens.float().flatten(1).sum(1)
    return noised.t, causes
