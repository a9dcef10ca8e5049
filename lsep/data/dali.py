"""The ring of `reader` behind NVIDIA DALI 2: prefetch, pinned staging and the copy to the GPU are DALI's.

DALI brings no reading speed here and does no arithmetic. Its own checkpoints are exact only at the same number of
ranks, so the order stays ours and DALI is fed batch by batch. Without a GPU the pipeline runs on the CPU.
"""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsep.data.images import center_crop, open_image
from lsep.data.manifest import Flips
from lsep.data.reader import HostBatch, Sequence, ring
from lsep.errors import UserError

_QUEUE = 2  # batches DALI holds itself


def batches(
    sequence: Sequence, threads: int, depth: int, device: torch.device
) -> Iterator[tuple[list[Tensor], HostBatch]]:
    """Micro-batches as rows `(rows, *row_shape)` of each set on the device, with their labels and ids still on the
    host."""
    from nvidia.dali import Pipeline, fn

    on_gpu, sets = device.type == "cuda", 1 if sequence.features is None else 2
    feed = ring(sequence, threads, depth, lambda: sequence.buffer(np.empty))
    arrived: deque[HostBatch] = deque()
    failed: list[BaseException] = []

    def collect() -> list[np.ndarray]:
        try:
            _, host, refill = next(feed)  # usually read already; DALI copies it before it asks again
        except StopIteration:
            raise
        except BaseException as error:  # DALI would wrap it, and ours is the sentence a user should see
            failed.append(error)
            raise StopIteration from None
        arrived.append(host)
        refill()
        return [part for part in host.rows if part is not None]

    pipe = Pipeline(
        batch_size=sequence.rows,
        num_threads=1,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=_QUEUE,
    )
    with pipe:
        rows = fn.external_source(source=collect, batch=True, num_outputs=sets)
        pipe.set_outputs(*(r.gpu() if on_gpu else r for r in rows))
    pipe.build()
    for _ in range(len(sequence)):
        try:
            out = pipe.run(torch.cuda.current_stream(device)) if on_gpu else pipe.run()
        except StopIteration:
            if failed:
                raise failed[0] from None
            return
        tensors = [torch.from_dlpack(part.as_tensor()) for part in out]
        # DALI takes its buffers back at the next run; a step of several micro-batches needs all of them.
        yield [t.clone() for t in tensors] if sequence.accumulate > 1 else tensors, arrived.popleft()


class Undecodable(Exception):
    """A file that neither DALI nor Pillow can read; `place` is its own in the batch."""

    def __init__(self, place: int, sentence: str) -> None:
        super().__init__(sentence)
        self.place = place


class Decoder:
    """Files of images to squares on the device: on a GPU JPEG is decoded there, elsewhere by DALI's threads.

    What DALI does not read is left to Pillow, as when the latents were encoded.
    """

    def __init__(self, count: int, size: int, threads: int, device: torch.device) -> None:
        """Batches of `count` images, resized by their shorter side to `size` pixels and cropped in the middle."""
        self.count, self.size, self.threads, self.device = count, size, threads, device
        self.pipe = self._pipeline(count)

    def _pipeline(self, count: int) -> Any:
        from nvidia.dali import Pipeline, fn, types

        kinds: Any = types
        on_gpu = self.device.type == "cuda"
        pipe = Pipeline(
            batch_size=count,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            # One batch goes in and comes out. The default executor is the one that orders its output on our stream.
            prefetch_queue_depth=1,
        )
        with pipe:
            files = fn.external_source(name="files", dtype=kinds.UINT8, ndim=1)
            # As the latents were encoded (`lsep.data.images`): not turned by EXIF, cut where whole pixels begin.
            images: Any = fn.decoders.image(
                files, device="mixed" if on_gpu else "cpu", output_type=kinds.RGB, adjust_orientation=False
            )
            images = fn.resize(images, resize_shorter=self.size, interp_type=kinds.INTERP_CUBIC, antialias=True)
            images = fn.crop(images, crop=(self.size, self.size), rounding="truncate")
            pipe.set_outputs(fn.transpose(images, perm=[2, 0, 1]))
        pipe.build()
        return pipe

    def __call__(self, files: list[bytes], flips: Flips | None, path: Callable[[int], Path]) -> Tensor:
        """Images `(B, 3, size, size)` uint8, mirrored where `flips` says so; valid until the next call.

        Raises Undecodable for the first file that is no image, naming it by its `path(place)`.
        """
        try:
            images = self._run(self.pipe, files)
        except RuntimeError:  # which says of no file that it was that one
            self.pipe = self._pipeline(self.count)
            images = self._one_by_one(files, path)
        if flips is None or not flips.any():
            return images
        own = torch.from_numpy(flips)
        if self.device.type == "cuda":  # from other memory the host would wait for the step before
            own = own.pin_memory()
        mirrored = own.to(self.device, non_blocking=True)[:, None, None, None]
        return torch.where(mirrored, images.flip(-1), images)

    def _run(self, pipe: Any, files: list[bytes]) -> Tensor:
        pipe.feed_input("files", [np.frombuffer(file, np.uint8) for file in files])
        (out,) = pipe.run(torch.cuda.current_stream(self.device)) if self.device.type == "cuda" else pipe.run()
        return torch.from_dlpack(out.as_tensor())

    def _one_by_one(self, files: list[bytes], path: Callable[[int], Path]) -> Tensor:
        """As a batch, but for what DALI does not read: a file's pixels do not depend on those beside it."""
        pipe, found = self._pipeline(1), []
        for place, file in enumerate(files):
            try:
                found.append(self._run(pipe, [file]).clone())
            except RuntimeError:
                pipe = self._pipeline(1)
                try:
                    square = center_crop(open_image(path(place), file), self.size)
                except UserError as error:
                    raise Undecodable(place, str(error)) from None
                found.append(torch.from_numpy(square)[None].to(self.device))
        return torch.cat(found)
