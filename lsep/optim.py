"""AdamW with a group of its own for the probe, gradient clipping, learning-rate schedule and EMA."""

import math

import torch
from torch import Tensor, nn

from lsep.config import OptimConfig
from lsep.objective import Objective


def build_optimizer(objective: Objective, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the backbone (group 0) and the probe's classifier (group 1, `probe_lr`)."""
    groups = [{"params": list(objective.model.parameters()), "base_lr": config.lr}]
    if objective.classifier is not None:
        groups.append({"params": list(objective.classifier.parameters()), "base_lr": config.probe_lr})
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def rate_factor(step: int, config: OptimConfig, steps: int) -> float:
    """Learning rate of `step` (from 0) as a multiple of its base: linear warm-up, then constant or cosine to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_step(
    optimizer: torch.optim.AdamW, ema: nn.Module, objective: nn.Module, config: OptimConfig, factor: float
) -> Tensor:
    """Clip, update all weights, average them; returns the gradient norm before clipping, on the device."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    norm = nn.utils.clip_grad_norm_(objective.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(objective.parameters()), 1 - config.ema_decay)
    return norm
