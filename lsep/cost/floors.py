"""The floor of each room of a step, and the rates of the device at hand that it is taken at."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lsep.config import Config
from lsep.cost.operations import Operation, Rates, step_operations
from lsep.data.manifest import Manifest


@dataclass(frozen=True)
class Work:
    """What a step must do in a room."""

    operations: tuple[Operation, ...]

    @property
    def flops(self) -> float:
        return sum(o.flops for o in self.operations)

    @property
    def bytes(self) -> float:
        """Of its operations beside the matrix products."""
        return sum(o.bytes for o in self.operations if o.shape is None)

    def seconds(self, rates: Rates) -> float:
        """Operation by operation the longer of the two, see `lsep.cost.operations`."""
        return sum(o.floor(rates) for o in self.operations)


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
    """What a whole step must do, by room of `lsep profile`; see `lsep.cost.operations.step_operations`."""
    rooms: dict[str, list[Operation]] = {}
    for operation in step_operations(config, manifest.probe_classes, params, row_bytes, probe):
        rooms.setdefault(operation.room, []).append(operation)
    return {room: Work(tuple(found)) for room, found in rooms.items()}
