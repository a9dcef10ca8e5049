"""What LSEP costs a run: time of its training step over that of the same step without the probe, measured."""

import statistics
import time
from typing import Any

import torch

from lsep.data.loader import Batch
from lsep.graphs import WARM_UP
from lsep.step import State, train_step


def measure(state: State, batches: list[Batch], rounds: int) -> dict[str, Any]:
    """Interleaved steps with and without the probe: the median over `rounds` of their ratio, and its quartiles.

    For the end of a run, once its weights are saved and used: the steps train on.
    """
    config = state.config
    last = config.train.steps - 1

    def seconds(probe: bool) -> float:
        _wait(state.device)
        start = time.perf_counter()
        train_step(state, last, batches, probe)
        _wait(state.device)
        return time.perf_counter() - start

    # Compilers and the capture of graphs. While a step warms up no graph of the other one is kept (`lsep.graphs`): what
    # comes first here may have to be captured again.
    for probe, turns in ((False, WARM_UP + 1), (True, WARM_UP + 1), (False, 1)):
        for _ in range(turns):
            seconds(probe)
    ratios = [seconds(True) / seconds(False) for _ in range(rounds)]
    low, median, high = statistics.quantiles(ratios * (2 if rounds == 1 else 1), n=4, method="inclusive")
    return {"lsep_overhead": median - 1, "lsep_overhead_quartiles": [low - 1, high - 1]}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
