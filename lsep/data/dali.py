"""The ring of `reader` behind NVIDIA DALI 2: prefetch, pinned staging and the copy to the GPU are DALI's.

DALI brings no reading speed here and does no arithmetic. Its own checkpoints are exact only at the same number of
ranks, so the order stays ours and DALI is fed batch by batch. Without a GPU the pipeline runs on the CPU.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lsep.data.reader import HostBatch, Sequence, ring

_QUEUE = 2  # batches DALI holds itself


def batches(sequence: Sequence, threads: int, depth: int, device: torch.device) -> Iterator[tuple[Tensor, HostBatch]]:
    """Micro-batches as x `(rows, *row_shape)` on the device, with their labels and ids still on the host."""
    from nvidia.dali import Pipeline, fn

    manifest, on_gpu = sequence.source.manifest, device.type == "cuda"
    feed = ring(sequence, threads, depth, lambda: np.empty((sequence.rows, *manifest.row_shape), manifest.dtype))
    arrived: deque[HostBatch] = deque()
    failed: list[BaseException] = []

    def collect() -> np.ndarray:
        try:
            _, host, refill = next(feed)  # usually read already; DALI copies it before it asks again
        except StopIteration:
            raise
        except BaseException as error:  # DALI would wrap it, and ours is the sentence a user should see
            failed.append(error)
            raise StopIteration from None
        arrived.append(host)
        refill()
        return host.x

    pipe = Pipeline(
        batch_size=sequence.rows,
        num_threads=1,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=_QUEUE,
    )
    with pipe:
        x = fn.external_source(source=collect, batch=True)
        pipe.set_outputs(x.gpu() if on_gpu else x)
    pipe.build()
    for _ in range(len(sequence)):
        try:
            (out,) = pipe.run(torch.cuda.current_stream(device)) if on_gpu else pipe.run()
        except StopIteration:
            if failed:
                raise failed[0] from None
            return
        tensor = torch.from_dlpack(out.as_tensor())
        # DALI takes its buffer back at the next run; a step of several micro-batches needs all of them.
        yield tensor.clone() if sequence.accumulate > 1 else tensor, arrived.popleft()
