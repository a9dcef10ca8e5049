"""The update: clipping, AdamW with a group of its own for the probe, learning-rate schedule and EMA.

One interface over four implementations (`lsep.backends` chooses): `csrc` and `reference` do everything in one operation
(`lsep_kernels.adamw_ema`), `torch` and `apex` are library optimizers with clipping before and averaging after them.
A checkpoint holds the same tensors whichever wrote it.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lsep.config import OptimConfig
from lsep.dist import World
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.parallel import like, local, total_norm
from lsep_kernels import reference
from lsep_kernels.adamw_ema import AdamwEma

Named = dict[str, nn.Parameter]


class Optimizer(Protocol):
    """What a training step needs of an optimizer."""

    before_step: Callable[[], object]
    """Called before an update changes anything; where a checkpoint is being copied, it waits for that."""

    def set_rate(self, factor: float) -> None:
        """The rates of the next step, as a multiple of their base."""

    def step(self) -> Tensor:
        """Clip, update all weights, average them, drop the gradients; the gradient norm before clipping, on the device.

        Where the norm is not finite nothing changes (apex has no switch for that: there the gradient counts as zero,
        and the momentum still moves the weights).
        """

    def tensors(self) -> dict[str, Tensor]:
        """The state: `step.NAME`, `exp_avg.NAME` and `exp_avg_sq.NAME` of every parameter that has one."""

    def templates(self) -> dict[str, Tensor]:
        """Empty tensors for `tensors` of every parameter, also where there is no state yet, to be read into."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take a state over that belongs to the weights there are now; raises UserError where it does not fit."""


def build_optimizer(
    objective: Objective, ema: nn.Module, config: OptimConfig, by: str, world: World, copies: Objective | None = None
) -> Optimizer:
    """The implementation `by` over the backbone (group 0) and the probe's classifier (group 1, `probe_lr`).

    copies: a module like `objective` in bf16, which has the gradients and receives the new weights (`csrc` and
    `reference` only); without one `objective` has them.
    """
    if by in ("csrc", "reference"):
        return OneOperation(objective, ema, config, by, world, copies)
    assert copies is None
    return LibraryOptimizer(objective, ema, config, by, world)


def bf16_copies(objective: Objective) -> Objective:
    """The same module with all weights in bf16 and its buffers as they are."""
    copies = copy.deepcopy(objective)
    for p in copies.parameters():
        p.data = p.data.to(torch.bfloat16)
    return copies


def rate_factor(step: int, config: OptimConfig, steps: int) -> float:
    """Learning rate of `step` (from 0) as a multiple of its base: linear warm-up, then constant or cosine to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _at_once() -> None:
    """Nothing to wait for."""


def _named(objective: Objective) -> Named:
    """Parameters under their published names."""
    return {n.removeprefix("model."): p for n, p in objective.named_parameters()}


def _is_probe(name: str) -> bool:
    return name.startswith("classifier.")


def _parts(named: Named) -> Named:
    """The parameters as this process holds them: themselves, or their shards as parameters in the same memory."""
    return {n: nn.Parameter(local(p.detach())) if isinstance(p, DTensor) else p for n, p in named.items()}


def _take_gradients(wholes: Named, parts: Named) -> list[Tensor]:
    """Hand the gradients of `wholes` to the `parts` that this process holds; those there are."""
    for name, part in parts.items():
        whole = wholes[name]
        if part is not whole:
            part.grad = None if whole.grad is None else local(whole.grad)
            whole.grad = None
    return [p.grad for p in parts.values() if p.grad is not None]


def _clip_shards(grads: list[Tensor], limit: float, world: World) -> Tensor:
    """Clip shards of gradients by their norm over all processes, which is returned; where it is not finite, to NaN."""
    norm = total_norm(grads, world)
    factor = torch.where(torch.isfinite(norm), (limit / (norm + 1e-6)).clamp(max=1.0), torch.nan)
    if grads:
        torch._foreach_mul_(grads, factor)
    return norm


class LibraryOptimizer:
    """torch's fused AdamW or apex's FusedAdam, between clipping and the EMA."""

    def __init__(self, objective: Objective, ema: nn.Module, config: OptimConfig, by: str, world: World) -> None:
        self.before_step: Callable[[], object] = _at_once
        self.config, self.by, self.world, self.named = config, by, world, _named(objective)
        self.averages = [local(p.detach()) for p in ema.parameters()]
        self.parts = _parts(self.named)
        self.params: list[Tensor] = list(self.parts.values())
        groups = []
        for probe, rate in ((False, config.lr), (True, config.probe_lr)):
            params = [p for n, p in self.parts.items() if _is_probe(n) == probe]
            if params:
                groups.append({"params": params, "base_lr": rate})
        settings: dict[str, Any] = {
            "lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps,
            "weight_decay": config.weight_decay,
        }  # fmt: skip
        if by == "apex":
            from apex.optimizers import FusedAdam

            self.optimizer = FusedAdam(groups, adam_w_mode=True, **settings)
        else:
            self.optimizer = torch.optim.AdamW(groups, fused=True, **settings)

    def set_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    @torch.no_grad()
    def step(self) -> Tensor:
        self.before_step()
        grads = _take_gradients(self.named, self.parts)
        if self.world.mesh is None:
            norm = nn.utils.clip_grad_norm_(self.params, self.config.clip)
        else:
            norm = _clip_shards(grads, self.config.clip, self.world)
        finite = torch.isfinite(norm)
        if self.by == "torch":  # its kernel leaves weights and state alone where this is 1, without a host sync
            self.optimizer.found_inf = (~finite).to(torch.float32)
        else:
            for p in self.params:
                p.grad = None if p.grad is None else torch.where(finite, p.grad, 0)
        self.optimizer.step()
        for p in self.params:
            p.grad = None
        weight = torch.where(finite, 1 - self.config.ema_decay, 0.0)
        torch._foreach_lerp_(self.averages, self.params, [weight] * len(self.params))
        return norm

    def tensors(self) -> dict[str, Tensor]:
        out = {}
        for name, p in self.parts.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                out[f"{key}.{name}"] = value if key == "step" else like(value, self.named[name])
        if self.by == "apex":  # it counts once a group
            for group in self.optimizer.param_groups:
                for name, p in self.parts.items():
                    if "step" in group and any(p is q for q in group["params"]) and f"exp_avg.{name}" in out:
                        out[f"step.{name}"] = torch.tensor(float(group["step"]))
        return out

    def templates(self) -> dict[str, Tensor]:
        return _templates(self.named)

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, state in _states(self.named, tensors):
            step, p = state.pop("step"), self.parts[name]
            if self.by == "torch":
                self.optimizer.state[p] = {"step": step.to(p.device), **state}
                continue
            self.optimizer.state[p] = state
            self.optimizer.param_groups[-1 if _is_probe(name) else 0]["step"] = int(step)


class OneOperation:
    """Clipping, AdamW and EMA of all tensors together: csrc's two launches, or the same in plain PyTorch."""

    def __init__(
        self,
        objective: Objective,
        ema: nn.Module,
        config: OptimConfig,
        by: str,
        world: World,
        copies: Objective | None,
    ) -> None:
        self.before_step: Callable[[], object] = _at_once
        self.world, self.clip, self.named = world, config.clip, _named(objective)
        self.parts = _parts(self.named)
        params: list[Tensor] = [p.detach() for p in self.parts.values()]
        self.copies: list[Tensor] | None = None if copies is None else list(copies.parameters())
        self.learning = self.parts if copies is None else _named(copies)
        """The parameters that have the gradients."""
        averages = [local(p.detach()) for p in ema.parameters()]
        device = params[0].device
        first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.moments = first, second
        self.updated: set[str] = set()
        """Names of the parameters that have had a gradient."""
        # On the device, so that the replay of a CUDA graph of `step` uses what `set_rate` wrote.
        self.base_lr = torch.tensor([config.lr, config.probe_lr], device=device)
        self.lr = self.base_lr.clone()
        group = [int(_is_probe(name)) for name in self.named]
        settings: dict[str, Any] = {
            "betas": (config.beta1, config.beta2), "eps": config.eps, "weight_decay": [config.weight_decay] * 2,
            # Of shards the norm is known to all processes together only: they are clipped before.
            "max_norm": config.clip if world.mesh is None else math.inf, "ema_decays": [config.ema_decay],
        }  # fmt: skip
        if by == "csrc":
            fused = AdamwEma(params, first, second, [averages], self.copies, group, **settings)
            self.step_count, self.update = fused.step_count, fused.step
            return
        self.step_count, skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

        def update(grads: Sequence[Tensor | None], lr: Tensor) -> Tensor:
            return reference.adamw_ema(
                params, first, second, [averages], self.copies, list(grads), lr, self.step_count, skipped,
                group=group, **settings,
            )  # fmt: skip

        self.update = update

    def set_rate(self, factor: float) -> None:
        torch.mul(self.base_lr, factor, out=self.lr)

    @torch.no_grad()
    def step(self) -> Tensor:
        self.before_step()
        if self.world.mesh is not None:
            clipped = _clip_shards(_take_gradients(self.named, self.parts), self.clip, self.world)
        self.updated |= {name for name, p in self.learning.items() if p.grad is not None}
        norm = self.update([p.grad for p in self.learning.values()], self.lr)
        for p in self.learning.values():
            p.grad = None
        return norm if self.world.mesh is None else clipped

    def tensors(self) -> dict[str, Tensor]:
        steps = self.step_count.to(torch.float32)
        out: dict[str, Tensor] = {}
        for name, first, second in zip(self.named, *self.moments, strict=True):
            if name in self.updated:
                whole = self.named[name]
                out |= {
                    f"step.{name}": steps.clone(),
                    f"exp_avg.{name}": like(first, whole),
                    f"exp_avg_sq.{name}": like(second, whole),
                }
        return out

    def templates(self) -> dict[str, Tensor]:
        return _templates(self.named)

    def load(self, tensors: dict[str, Tensor]) -> None:
        places = {name: i for i, name in enumerate(self.named)}
        steps = 0
        for name, state in _states(self.named, tensors):
            self.updated.add(name)
            steps = max(steps, int(state["step"]))
            for key, moments in zip(("exp_avg", "exp_avg_sq"), self.moments, strict=True):
                moments[places[name]].copy_(state[key])
        self.step_count.fill_(steps)
        if self.copies is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, list(self.named.values()))


def _templates(named: Named) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, p in named.items():
        out |= {f"step.{name}": torch.zeros(())}
        out |= {f"{key}.{name}": torch.empty_like(p, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
    return out


def _states(named: Named, tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and state of every parameter that `tensors` has one for: this process's part of it, on its device."""
    keys = ("step", "exp_avg", "exp_avg_sq")
    unknown = tensors.keys() - {f"{key}.{name}" for key in keys for name in named}
    if unknown:
        raise UserError(f"unknown tensor {min(unknown)!r}")
    for name, p in named.items():
        state = {key: tensors[f"{key}.{name}"] for key in keys if f"{key}.{name}" in tensors}
        if not state and _is_probe(name):  # a probe switched off from the start never had a gradient
            continue
        if state.keys() == {"step"} and not state["step"].any():  # imported weights: no step was taken
            continue
        for key in keys:
            if key not in state:
                raise UserError(f"tensor '{key}.{name}' is missing")
            wanted = () if key == "step" else tuple(p.shape)
            if tuple(state[key].shape) != wanted:
                raise UserError(f"{key}.{name} is {tuple(state[key].shape)}, expected {wanted}")
        yield name, {key: local(value).to(p.device) for key, value in state.items()}
