"""Where an implementation can run, by what a device is; and a device that is not here, to choose for.

`choose` and the `missing_...` beside it take a `torch.device` or a `Card`. Of a `Card` they know what its compute
capability allows, and take everything else as given: Triton, the libraries, csrc. Imports torch only.
"""

import os
from dataclasses import dataclass

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter."""
ATTENTION_TOKENS = 256
"""What the attention kernels take: all keys of a head at once."""


@dataclass(frozen=True)
class Card:
    """A GPU by its compute capability, on a machine where all that can be installed is."""

    capability: tuple[int, int]
    type: str = "cuda"
    index: int | None = None


Device = torch.device | Card


def capability(device: Device) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return device.capability if isinstance(device, Card) else torch.cuda.get_device_capability(device)


def missing_attention_kernels(tokens: int, head: int, dtype: torch.dtype, device: Device) -> str | None:
    """Why the Triton kernels of `attention` do not take this shape, type or device, or None."""
    if tokens > ATTENTION_TOKENS:
        return f"{tokens} tokens, expected at most {ATTENTION_TOKENS} (all keys of a head at once)"
    if INTERPRETED and not isinstance(device, Card):
        fits = 16 <= head <= 80 and head % 8 == 0
        return None if fits else f"head_dim {head}, expected a multiple of 8 from 16 to 80"
    if head not in (64, 72):
        return f"head_dim {head}, expected 64 or 72"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}, expected float16 or bfloat16 (the tiles of others would not fit into registers)"
    if device.type == "cuda":
        major, minor = capability(device)
        if major not in (9, 10):
            # Operands then take registers as well: the forward spills 360 to 540 bytes on sm_80, 500 on sm_120.
            return f"compute capability {major}.{minor}, expected 9.x or 10.x, where operands stay in shared memory"
    return None
