"""One process of four under torchrun: saves in every way of holding the state, and loads it in every other.

torchrun --nproc-per-node 4 tests/checkpoint_worker.py FOLDER
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lsep.checkpoint import Checkpoints, Progress

MODES = ("ddp", "fsdp", "hsdp")


class World(NamedTuple):
    rank: int = 0
    size: int = 1


class Held:
    """Model, EMA and the optimizer's tensors as one way of training holds them; 7 and 2 rows do not divide by four."""

    def __init__(self, mode: str, seed: int) -> None:
        self.model, self.ema = (self._module(mode, seed + i) for i in range(2))
        self.state: dict[str, Tensor] = {}
        for i, (name, p) in enumerate(self.model.named_parameters()):
            self.state[f"step.{name}"] = torch.tensor(float(seed))
            self.state[f"exp_avg.{name}"] = torch.empty_like(p, requires_grad=False).fill_(seed + i)
            self.state[f"exp_avg_sq.{name}"] = torch.empty_like(p, requires_grad=False).fill_(seed - i)

    @staticmethod
    def _module(mode: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 2), nn.LayerNorm(2))
        if mode in ("fsdp", "hsdp"):
            shape = (4,) if mode == "fsdp" else (2, 2)
            fully_shard(
                module, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
            )
        return module

    def tensors(self) -> dict[str, Tensor]:
        return self.state

    def templates(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in self.state.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.state = tensors

    def whole(self) -> dict[str, Tensor]:
        """Everything, gathered, in one order on all processes."""
        named = {
            f"{k}.{n}": t for k, m in (("model", self.model), ("ema", self.ema)) for n, t in m.state_dict().items()
        }
        named |= self.state
        return {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in sorted(named.items())}


def load_into(held: Held, folder: Path, world: World) -> Progress | None:
    return Checkpoints(folder, world=world).load_newest(held.model, held.ema, held)  # type: ignore[arg-type]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    for mode in MODES:
        checkpoints, held = Checkpoints(folder / mode, world=world), Held(mode, 1)
        for step in (2, 4):
            checkpoints.save(Progress(step, 1.5), held.model, held.ema, held)  # type: ignore[arg-type]
        checkpoints.finish()
        checkpoints.close()
    truth = Held("ddp", 1).whole()
    for saved, loaded in itertools.product(MODES, MODES):
        other = Held(loaded, 5)
        assert load_into(other, folder / saved, world) == Progress(4, 1.5)
        found = other.whole()
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[name], truth[name]) for name in truth), (saved, loaded)
    dist.barrier()
    if world.rank == 0:
        (folder / "ddp" / "0000004" / "manifest.json").unlink()
        (folder / "ddp" / "0000002" / "manifest.json").unlink()
    dist.barrier()
    try:
        load_into(Held("ddp", 1), folder / "ddp", world)
    except Exception as error:  # every process must learn it, none may wait for another
        print(f"rank {world.rank}: {error}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
