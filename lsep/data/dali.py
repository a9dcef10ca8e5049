"""The ring of `reader` behind NVIDIA DALI 2: prefetch, pinned staging and the copy to the GPU are DALI's.

DALI brings no reading speed here and does no arithmetic. Its own checkpoints are exact only at the same number of
ranks, so the order stays ours and DALI is fed batch by batch. Without a GPU the pipeline runs on the CPU.
"""

import io
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsep.data.manifest import Flips
from lsep.data.reader import HostBatch, Sequence, ring
from lsep.errors import UserError, told

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


class Decoder:
    """Files of images to squares on the device: on a GPU JPEG is decoded there, elsewhere by DALI's threads."""

    def __init__(self, count: int, size: int, threads: int, device: torch.device) -> None:
        """Batches of `count` images, resized by their shorter side to `size` pixels and cropped in the middle."""
        from nvidia.dali import Pipeline, fn, types

        kinds: Any = types
        self.device, self.on_gpu = device, device.type == "cuda"
        self.pipe = Pipeline(
            batch_size=count,
            num_threads=threads,
            device_id=(device.index or 0) if self.on_gpu else None,
            # One batch goes in and comes out. The default executor is the one that orders its output on our stream.
            prefetch_queue_depth=1,
        )
        with self.pipe:
            files = fn.external_source(name="files", dtype=kinds.UINT8, ndim=1)
            # As the latents were encoded (`lsep.data.images`): not turned by EXIF, cut where whole pixels begin.
            images: Any = fn.decoders.image(
                files, device="mixed" if self.on_gpu else "cpu", output_type=kinds.RGB, adjust_orientation=False
            )
            images = fn.resize(images, resize_shorter=size, interp_type=kinds.INTERP_CUBIC, antialias=True)
            images = fn.crop(images, crop=(size, size), rounding="truncate")
            self.pipe.set_outputs(fn.transpose(images, perm=[2, 0, 1]))
        self.pipe.build()

    def __call__(self, files: list[bytes], flips: Flips | None, name: Callable[[int], str]) -> Tensor:
        """Images `(B, 3, size, size)` uint8, mirrored where `flips` says so; valid until the next call.

        Raises UserError where a file is no image, with its `name(place)`.
        """
        self.pipe.feed_input("files", [np.frombuffer(file, np.uint8) for file in files])
        try:
            (out,) = self.pipe.run(torch.cuda.current_stream(self.device)) if self.on_gpu else self.pipe.run()
        except RuntimeError as error:
            bad = next((i for i, file in enumerate(files) if not _is_image(file)), None)
            what = "an image" if bad is None else name(bad)
            raise UserError(f"{what}: cannot be decoded, expected an image ({told(error)})") from None
        images = torch.from_dlpack(out.as_tensor())
        if flips is None or not flips.any():
            return images
        own = torch.from_numpy(flips)
        own = own.pin_memory() if self.on_gpu else own  # from other memory the host would wait for the step before
        mirrored = own.to(self.device, non_blocking=True)[:, None, None, None]
        return torch.where(mirrored, images.flip(-1), images)


def _is_image(file: bytes) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file)) as image:
            image.load()
    except Exception:  # decoders meet damage with anything from SyntaxError to DecompressionBombError
        return False
    return True
