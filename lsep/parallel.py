"""How the modules of a run are spread over processes: PyTorch's DDP, or FSDP2 over one mesh or (hsdp) several.

`spread` is called once, before the optimizer is built. What it returns wraps the objective and says when gradients are
exchanged: with accumulation only in a step's last micro-batch.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lsep.dist import World
from lsep.model import SiT
from lsep.objective import Losses, Objective


class Parallel(Protocol):
    """The objective as a step calls it."""

    forward: Callable[..., Losses]

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of a micro-batch."""

    def finish(self) -> None:
        """After the last backward, before the optimizer."""


class OneProcess:
    """Nothing to exchange."""

    def __init__(self, forward: Callable[..., Losses]) -> None:
        self.forward = forward

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def finish(self) -> None:
        pass


class Replicas:
    """DDP: every process has all weights; gradients are averaged in buckets while the backward still runs.

    The probe's classifier is left out and averaged at the end: DDP expects a gradient for all it has in every step,
    and the probe may be off in some.
    """

    def __init__(self, module: nn.Module, classifier: nn.Module | None, world: World, reduce: torch.dtype) -> None:
        self.world, self.classifier = world, list(classifier.parameters()) if classifier is not None else []
        apart = [n for n, p in module.named_parameters() if any(p is q for q in self.classifier)]
        apart += [n for n, _ in module.named_buffers()]  # constants
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, apart)
        self.ddp = DistributedDataParallel(module, gradient_as_bucket_view=True, init_sync=False)
        self.forward: Callable[..., Losses] = self.ddp
        if any(p.dtype != reduce for p in module.parameters()):
            self.ddp.register_comm_hook(reduce, _average_as)
        self.reduce = reduce

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.ddp.no_sync()

    def finish(self) -> None:
        grads = [p.grad for p in self.classifier if p.grad is not None]
        if grads:
            flat = self.world.average(torch.cat([g.flatten() for g in grads]).to(self.reduce))
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))


def _average_as(dtype: torch.dtype, bucket: "dist.GradBucket") -> torch.futures.Future[Tensor]:
    """DDP's hook: average a bucket in `dtype`, whatever the gradients are in."""
    own = bucket.buffer()
    sent = own.to(dtype) / dist.get_world_size()
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None

    def back(_: Any) -> Tensor:
        own.copy_(sent)
        return own

    return cast(torch.futures.Future[Tensor], work.get_future().then(back))


class Shards:
    """FSDP2: every process has a part of each weight; a block's are gathered before it runs and dropped after."""

    def __init__(self, objective: Objective, forward: Callable[..., Losses]) -> None:
        self.objective, self.forward = cast(FSDPModule, objective), forward

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        self.objective.set_requires_gradient_sync(last)
        return nullcontext()

    def finish(self) -> None:
        pass


def shard(objective: Objective, world: World, compute: torch.dtype | None, reduce: torch.dtype) -> None:
    """Turn the weights into shards over `world.mesh`, in place.

    compute: the type of the gathered weights, None for their own. Each block is a unit of its own, all modulations are
    one, and so are embeddings and final layer, and the classifier.
    """
    assert world.mesh is not None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
    model = objective.model
    assert isinstance(model, SiT)
    modulations = [cast(nn.Module, block.adaLN_modulation) for block in (*model.blocks, model.final_layer)]
    fully_shard(modulations, mesh=world.mesh, mp_policy=policy)
    for block in model.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
        register_fsdp_forward_method(block, "forward_probed")
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    for method in ("patches", "forward_with_probe", "forward_aligned"):
        register_fsdp_forward_method(model, method)
    fully_shard(objective, mesh=world.mesh, mp_policy=policy)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of `tensor`: all of it, or its shard; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, whole: Tensor) -> Tensor:
    """`part`, held by this process, as the tensor it is a part of, spread as `whole` is."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def gathered(tensors: Iterable[Tensor]) -> list[Tensor]:
    """All of each tensor, on every process."""
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def total_norm(grads: list[Tensor], world: World) -> Tensor:
    """The norm of all gradients of which this process holds its shards `grads`, float32."""
    assert world.mesh is not None
    device = world.device
    norms = torch._foreach_norm(grads, dtype=torch.float32) if grads else [torch.zeros((), device=device)]
    square = torch.stack(list(norms)).square().sum()
    dist.all_reduce(square, group=world.mesh.get_group("shard"))  # replicas hold the same
    return square.sqrt()
