"""A training step, forward to optimizer, as one CUDA graph: one launch instead of some thousands.

At 32 images a GPU the host cannot queue a step's kernels as fast as the device runs them; a graph takes it out of the
step. The first steps run as they are, on the stream of the capture: they compile, build tables and allocate. Then the
step is captured, and from there on each step copies its batch into the graph's own and replays it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsep.data.loader import Batch
from lsep.errors import UserError

WARM_UP = 3
"""Steps before the capture."""
Replay = Callable[[], Tensor]


@dataclass
class _Graph:
    """The step with the probe, or without it."""

    steps: int = 0
    batches: list[Batch] | None = None
    """The memory the graph reads its batches from."""
    replay: Replay | None = None


class Graphs:
    """`compute(probe, batches)` as CUDA graphs, one with the probe and one without.

    `compute` may read nothing that changes but `batches` and tensors that stay where they are; what it returns is
    copied out. Everything it leaves behind on the host (`p.grad`) must be as it was before.
    """

    def __init__(self, compute: Callable[[bool, list[Batch]], Tensor], device: torch.device) -> None:
        self.compute, self.device = compute, device
        self.graphs = {False: _Graph(), True: _Graph()}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(self, probe: bool, batches: list[Batch]) -> Tensor:
        graph = self.graphs[probe]
        if graph.steps < WARM_UP:
            graph.steps += 1
            return self.warm_up(lambda: self.compute(probe, batches))
        if graph.replay is None:
            graph.batches = own = [batch.clone() for batch in batches]
            graph.replay = self.capture(lambda: self.compute(probe, own))
        assert graph.batches is not None
        for own_batch, batch in zip(graph.batches, batches, strict=True):
            torch._foreach_copy_(own_batch.tensors(), batch.tensors())
        return graph.replay().clone()  # the next replay writes over it

    def warm_up(self, call: Replay) -> Tensor:
        """Run `call` on the stream of the capture: what autograd keeps of a stream is then right for it."""
        assert self.stream is not None
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            out = call()
        before.wait_stream(self.stream)
        return out

    def capture(self, call: Replay) -> Replay:
        """Record `call` without running it; a function that runs what was recorded, and its result."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the loader's threads copy and allocate meanwhile, which a global capture forbids.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                out = call()
        except RuntimeError as error:
            raise UserError(
                f"--train.graphs: this step cannot be captured as a CUDA graph ({' '.join(str(error).split())[:300]}); "
                "--train.graphs off runs it without"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
