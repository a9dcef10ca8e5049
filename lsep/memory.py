"""What a block keeps for its backward and what it computes again: `train.memory`.

Counted in widths of a token, `keep` holds about 18 activations of a block, `recompute-elementwise` about 12 (results of
matrix products; norms, gates and GELU are computed again) and `recompute-blocks` 2 (stream and input). An MLP by Triton
or cuBLASLt computes GELU again by itself: 14 are about what `keep` holds then. All three give the same numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "mlp", "mlp_cublaslt", "fp8_linear", "fp8_mlp"}


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results of matrix products, of attention and of an MLP in one operator (its result and z)."""
    name = operation.overloadpacket.__name__ if hasattr(operation, "overloadpacket") else str(operation)
    kept = name in _PRODUCTS or "attention" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def runner(policy: str) -> Callable[..., Any]:
    """`run(function, *args)`: calls a part of the model so that its backward keeps what `policy` says."""
    if policy in ("keep", "auto"):
        return _call
    # No random numbers are drawn inside: their state need not be read and put back.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if policy == "recompute-elementwise":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _policy))

    def run(function: Callable[..., Any], *args: Any) -> Any:
        return again(function, *args) if torch.is_grad_enabled() else function(*args)

    return run


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
