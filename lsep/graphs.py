"""A training step, forward to optimizer, as one CUDA graph: one launch instead of some thousands.

At 32 images a GPU the host cannot queue a step's kernels as fast as the device runs them; a graph takes it out of the
step. The first steps run as they are, on the stream of the capture: they compile, build tables and allocate. Then the
step is captured, and from there on each step copies its batch into the graph's own and replays it.

A graph keeps the memory of a whole step. The step with the probe and the step without it never run at once: both graphs
share one pool, and where one of them has to warm up, outside that pool, the other is dropped and captured again at its
next use. So no more memory is needed than for the larger of the two steps.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    """Steps that have run outside the capture."""
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
        self.pool: Any = None
        """Handle of the memory that the graphs share, while there is one."""

    def __call__(self, probe: bool, batches: list[Batch]) -> Tensor:
        graph, other = self.graphs[probe], self.graphs[not probe]
        if graph.steps < WARM_UP:
            if other.replay is not None:
                self.drop(other)
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

    def drop(self, graph: _Graph) -> None:
        """Give the only captured step up, and its memory back."""
        if self.stream is not None:
            torch.cuda.synchronize(self.device)  # its replay may still be running
        graph.batches = graph.replay = None
        self.pool = None  # one that no graph uses any more takes no other
        if self.stream is not None:
            gc.collect()  # nothing may hold on to results in that pool
            torch.cuda.empty_cache()

    def capture(self, call: Replay) -> Replay:
        """Record `call` without running it; a function that runs what was recorded, and its result."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the loader's threads copy and allocate meanwhile, which a global capture forbids.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                out = call()
        except torch.OutOfMemoryError:
            raise  # the step itself is too large, captured or not
        except RuntimeError as error:
            raise UserError(
                f"--train.graphs: this step cannot be captured as a CUDA graph ({' '.join(str(error).split())[:300]}); "
                "--train.graphs off runs it without"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
