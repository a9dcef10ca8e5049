"""What the processes of tests/test_dist.py run: `torchrun distributed_worker.py CONFIGS STEPS OUT`.

Trains STEPS steps of each configuration in the JSON file CONFIGS, a list; the first process writes what `curve` found
of each to OUT.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lsep.config import Config, from_dict
from lsep.dist import world
from lsep.parallel import gathered
from lsep.step import open_loader, pick_device, setup, train_step


def curve(config: Config, steps: int) -> dict[str, Tensor]:
    """The averaged statistics of every step; all weights, averages and first moments, of fsdp gathered."""
    with world(config, pick_device(config.train.device)) as here:
        state = setup(config, here)
        loader = open_loader(state, 0, steps)
        found = {
            "curve": torch.stack([here.average(train_step(state, i, batches)) for i, batches in enumerate(loader)])
        }
        for name, module in (("weights", state.objective), ("ema", state.ema), *state.averages.items()):
            found[name] = torch.cat([p.flatten() for p in gathered(p.detach() for p in module.parameters())])
        moments = [t for k, t in sorted(state.optimizer.tensors().items()) if k.startswith("exp_avg.")]
        return found | {"moments": torch.cat([t.flatten() for t in gathered(moments)])}


def main(configs: str, steps: str, out: str) -> None:
    dist.init_process_group("gloo")
    found = [curve(from_dict(c, configs), int(steps)) for c in json.loads(Path(configs).read_text())]
    if int(os.environ["RANK"]) == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
