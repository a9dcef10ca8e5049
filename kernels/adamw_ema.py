"""The optimizer step in one operator: gradient clipping, AdamW, averages and weight copies of all tensors.

`AdamwEma` is the public class, `lsep::adamw_ema` the operator under it. csrc/adamw_ema.cu computes it on GPUs in two
launches and csrc/adamw_ema.cpp on CPUs, both by the rule of csrc/adamw_ema.h; `reference.adamw_ema` is the same in
plain PyTorch. `pip install` builds the libraries beside this file where it finds the compilers; LSEP_CUDA_LIBRARY=FILE
in the environment names another build of the CUDA library. Imports torch only.

Bytes moved per parameter, float32 gradients and one average: 4 to read the gradient for its norm, then 36 (read
gradient, master, two moments, average: 20; write all but the gradient: 16); 2 more for a bfloat16 weight copy, 4 for a
float32 one, 8 for a second average, 4 less for bfloat16 gradients.
"""

import ctypes
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

CHUNK = 16384
MAX_TENSORS, MAX_GROUPS, MAX_EMAS = 3072, 16, 2
_TYPES = {torch.float32: 1, torch.bfloat16: 2}

# ---------------------------------------------------------------------------------------------------------------------
# The libraries. These structures and numbers are those of csrc/adamw_ema.h.


class _Settings(ctypes.Structure):
    _fields_ = (
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("max_norm", ctypes.c_double),
        ("ema_decay", ctypes.c_double * MAX_EMAS),
        ("weight_decay", ctypes.c_double * MAX_GROUPS),
    )


_POINTERS = "grads entries chunks lr step skipped norm scratch stream".split()
_NUMBERS = "device tensors chunk_count groups emas grad_type weight_type".split()


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("settings", _Settings),
    )


_ENTRY = 8  # words of a tensor in the table: param, exp_avg, exp_avg_sq, two averages, weight, numel, group
_LAYOUT = (ctypes.sizeof(_Args), 8 * _ENTRY, CHUNK, MAX_TENSORS, MAX_GROUPS)


@cache
def _load(kind: str) -> ctypes.CDLL | str:
    """The library of `kind` (host or cuda), or a sentence saying why there is none."""
    named = os.environ.get("LSEP_CUDA_LIBRARY") if kind == "cuda" else None
    again = "build it again or unset LSEP_CUDA_LIBRARY" if named else "run pip install -e . again"
    # The newest: setuptools and CMake name the host's differently.
    built = sorted(Path(__file__).parent.glob(f"_adamw_ema_{kind}*.so"), key=lambda path: path.stat().st_mtime)
    found = [Path(named)] if named else built
    if not found:
        needs = "nvcc and cmake" if kind == "cuda" else "a C++17 compiler"
        return f"the optimizer's {kind} library is not built: install {needs} and {again}"
    try:
        library = ctypes.CDLL(str(found[-1]))
        layout = (ctypes.c_int64 * len(_LAYOUT))()
        library.lsep_adamw_ema_layout(layout)
    except (OSError, AttributeError) as error:
        return f"{found[-1]} cannot be loaded ({error}): {again}"
    if tuple(layout) != _LAYOUT:
        return f"{found[-1]} was built from other sources: {again}"
    library.lsep_adamw_ema_scratch.argtypes = [ctypes.c_int64]
    library.lsep_adamw_ema_scratch.restype = ctypes.c_int64
    library.lsep_adamw_ema_prepare.argtypes = [ctypes.c_int64]
    library.lsep_adamw_ema_error.argtypes = [ctypes.c_int]
    library.lsep_adamw_ema_error.restype = ctypes.c_char_p
    library.lsep_adamw_ema.argtypes = [ctypes.POINTER(_Args)]
    return library


def host_library() -> ctypes.CDLL | None:
    """The library of csrc/adamw_ema.cpp, or None."""
    found = _load("host")
    return None if isinstance(found, str) else found


def cuda_library() -> ctypes.CDLL | None:
    """The library of csrc/adamw_ema.cu, or None."""
    found = _load("cuda")
    return None if isinstance(found, str) else found


def why_missing(device: str = "cuda") -> str | None:
    """One sentence saying why `device` ("cuda" or "cpu") has no library, or none that runs on its GPU; else None."""
    found = _load("cuda" if device == "cuda" else "host")
    if isinstance(found, str):
        return found
    return _fails_on_gpu() if device == "cuda" and torch.cuda.is_available() else None


@cache
def _fails_on_gpu() -> str | None:
    """A GPU older than the library's machine code, or a driver older than its runtime."""
    library = cuda_library()
    assert library is not None
    with torch.cuda.device(torch.cuda.current_device()):
        code = library.lsep_adamw_ema_prepare(torch.cuda.current_device())
    if not code:
        return None
    return f"the optimizer's cuda library does not run on this GPU ({library.lsep_adamw_ema_error(code).decode()})"


def _library(device: torch.device) -> ctypes.CDLL:
    found = _load("cuda" if device.type == "cuda" else "host")
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` the current one, as the library does, and puts the former back."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _raise_on(code: int, library: ctypes.CDLL) -> None:
    if code:
        raise RuntimeError(f"adamw_ema failed: {library.lsep_adamw_ema_error(code).decode()}")


# ---------------------------------------------------------------------------------------------------------------------
# Tables


class _Table:
    """Pointers and chunks of one set of tensors, uploaded once, and the scratch memory of its steps."""

    def __init__(self, columns: list[list[Tensor]], emas: int, group: Sequence[int]) -> None:
        params = columns[0]
        self.device = params[0].device
        self.library = _library(self.device)
        with _current(self.device):
            _raise_on(self.library.lsep_adamw_ema_prepare(self.device.index or 0), self.library)
        pointers = [[t.data_ptr() for t in column] for column in columns]
        absent = [0] * len(params)
        weights = pointers.pop() if len(columns) > 3 + emas else absent
        pointers += [absent] * (MAX_EMAS - emas) + [weights, [p.numel() for p in params], list(group)]
        # An empty tensor gets a chunk as well: a launch without blocks is an error.
        chunks = [(i, start) for i, p in enumerate(params) for start in range(0, max(1, p.numel()), CHUNK)]
        self.entries = torch.tensor(pointers).T.contiguous().to(self.device)
        self.chunks = torch.tensor(chunks).to(self.device)
        size = self.library.lsep_adamw_ema_scratch(len(chunks))
        self.scratch = torch.zeros(size, dtype=torch.uint8, device=self.device)


# An AdamwEma holds its own table, so that it outlives the CUDA graphs captured from its steps. The operator finds it by
# the tensors' addresses: when a compiler hands it copies of them, they get a table of their own.
_tables: WeakValueDictionary[tuple[object, ...], _Table] = WeakValueDictionary()


def _table(
    params: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    emas: list[Tensor],
    weights: list[Tensor],
    group: Sequence[int],
) -> _Table:
    """The table of these tensors; checks them when it is new."""
    n = max(1, len(params))
    averages = [emas[k : k + n] for k in range(0, len(emas), n)]
    columns = [params, exp_avg, exp_avg_sq, *averages, *([weights] if weights else [])]
    key = (
        tuple([t.data_ptr() for column in columns for t in column]),
        tuple([p.shape for p in params]),
        tuple(group),
        len(averages),
        len(weights),
        params[0].device if params else None,
    )
    found = _tables.get(key)
    if found is None:
        _check_tensors(columns, len(averages), group)
        found = _tables[key] = _Table(columns, len(averages), group)
    return found


def _check_tensors(columns: list[list[Tensor]], emas: int, group: Sequence[int]) -> None:
    params = columns[0]
    names = ["params", "exp_avg", "exp_avg_sq", *[f"emas[{k}]" for k in range(emas)], "weights"]
    if not 1 <= len(params) <= MAX_TENSORS:
        raise ValueError(f"params has {len(params)} tensors, expected 1 to {MAX_TENSORS}")
    if params[0].device.type not in ("cpu", "cuda"):
        raise ValueError(f"params is on {params[0].device}, expected cpu or cuda")
    if len(group) != len(params):
        raise ValueError(f"group has {len(group)} entries, expected one for each of {len(params)} params")
    for name, column in zip(names, columns, strict=False):
        types = (torch.float32, torch.bfloat16) if name == "weights" else (torch.float32,)
        if len(column) != len(params):
            raise ValueError(f"{name} has {len(column)} tensors, expected {len(params)} as params")
        for i, (t, p) in enumerate(zip(column, params, strict=True)):
            if t.shape != p.shape:
                raise ValueError(f"{name}[{i}] has shape {tuple(t.shape)}, expected {tuple(p.shape)} as params[{i}]")
            if t.dtype not in types or t.dtype != column[0].dtype:
                wanted = "float32 or bfloat16, one of them for all" if len(types) > 1 else "float32"
                raise ValueError(f"{name}[{i}] is {t.dtype}, expected {wanted}")
            if t.device != params[0].device:
                raise ValueError(f"{name}[{i}] is on {t.device}, expected {params[0].device} as params[0]")
            if not t.is_contiguous():
                raise ValueError(f"{name}[{i}] is not contiguous")


def _check_settings(
    group: Sequence[int], weight_decay: Sequence[float], emas: int, ema_decays: Sequence[float]
) -> None:
    if not 1 <= len(weight_decay) <= MAX_GROUPS:
        raise ValueError(f"weight_decay has {len(weight_decay)} groups, expected 1 to {MAX_GROUPS}")
    if not all(0 <= g < len(weight_decay) for g in group):
        raise ValueError(f"group has entries from {min(group)} to {max(group)}, expected 0 to {len(weight_decay) - 1}")
    if emas > MAX_EMAS or emas != len(ema_decays):
        raise ValueError(
            f"emas has {emas} lists and ema_decays {len(ema_decays)} numbers, expected as many, at most {MAX_EMAS}"
        )


def _check_scalars(rate: Tensor, step_count: Tensor, skipped: Tensor, groups: int, device: torch.device) -> None:
    for name, t, shape, dtype in (
        ("lr", rate, (groups,), torch.float32),
        ("step_count", step_count, (), torch.int64),
        ("skipped", skipped, (), torch.int64),
    ):
        if t.shape != shape or t.dtype != dtype or t.device != device or not t.is_contiguous():
            raise ValueError(
                f"{name} is {t.dtype} of shape {tuple(t.shape)} on {t.device}, "
                f"expected a contiguous {dtype} of shape {shape} on {device}"
            )


def _checked_grads(grads: Sequence[Tensor | None], params: list[Tensor]) -> tuple[list[Tensor | None], torch.dtype]:
    """The gradients, contiguous, and their type."""
    if len(grads) != len(params):
        raise ValueError(f"grads has {len(grads)} entries, expected {len(params)} as params")
    dtype = next((g.dtype for g in grads if g is not None), torch.float32)
    for i, (g, p) in enumerate(zip(grads, params, strict=True)):
        if g is None:
            continue
        if g.shape != p.shape or g.device != p.device:
            raise ValueError(
                f"grads[{i}] has shape {tuple(g.shape)} on {g.device}, expected {tuple(p.shape)} on {p.device}"
            )
        if g.dtype != dtype or dtype not in _TYPES:
            raise ValueError(f"grads[{i}] is {g.dtype}, expected float32 or bfloat16, one of them for all")
    return [None if g is None else g.contiguous() for g in grads], dtype


# ---------------------------------------------------------------------------------------------------------------------
# The operator


@torch.library.custom_op(
    "lsep::adamw_ema",
    mutates_args=("params", "exp_avg", "exp_avg_sq", "emas", "weights", "step_count", "skipped"),
    device_types=("cpu", "cuda"),
)
def adamw_ema(
    params: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    emas: list[Tensor],
    weights: list[Tensor],
    grads: list[Tensor | None],
    lr: Tensor,
    step_count: Tensor,
    skipped: Tensor,
    group: list[int],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: list[float],
    max_norm: float,
    ema_decays: list[float],
) -> Tensor:
    """One step in place; the norm of all gradients before clipping, a float32 scalar.

    n tensors each in params, exp_avg, exp_avg_sq (float32), grads (float32 or bfloat16; None leaves its tensor as it
    is), weights (float32 or bfloat16; may be empty); `len(ema_decays) * n` in emas, one average after the other. lr
    `(groups,)` float32, step_count and skipped int64 scalars, all on one device; group gives each tensor's entry of lr
    and weight_decay. Where the square of the norm is not finite in float32, `skipped` grows by one and nothing else
    changes.
    """
    _check_settings(group, weight_decay, len(emas) // max(1, len(params)), ema_decays)
    table = _table(params, exp_avg, exp_avg_sq, emas, weights, group)
    _check_scalars(lr, step_count, skipped, len(weight_decay), table.device)
    grads, grad_type = _checked_grads(grads, params)
    norm = torch.empty((), dtype=torch.float32, device=table.device)
    on_gpu = table.device.type == "cuda"
    pointers = (ctypes.c_void_p * len(params))(*[None if g is None else g.data_ptr() for g in grads])
    args = _Args(
        grads=ctypes.addressof(pointers),
        entries=table.entries.data_ptr(),
        chunks=table.chunks.data_ptr(),
        lr=lr.data_ptr(),
        step=step_count.data_ptr(),
        skipped=skipped.data_ptr(),
        norm=norm.data_ptr(),
        scratch=table.scratch.data_ptr(),
        stream=torch.cuda.current_stream(table.device).cuda_stream if on_gpu else None,
        device=table.device.index or 0,
        tensors=len(params),
        chunk_count=len(table.chunks),
        groups=len(weight_decay),
        emas=len(ema_decays),
        grad_type=_TYPES[grad_type],
        weight_type=_TYPES[weights[0].dtype] if weights else 0,
        settings=_Settings(beta1, beta2, eps, max_norm, tuple(ema_decays), tuple(weight_decay)),
    )
    with _current(table.device):
        _raise_on(table.library.lsep_adamw_ema(args), table.library)
    return norm


@adamw_ema.register_fake
def _(params, *args):  # type: ignore[no-untyped-def]
    return params[0].new_empty((), dtype=torch.float32)


class AdamwEma:
    """AdamW with clipping, up to two averages and a copy of the weights, for fixed lists of n tensors.

    params, exp_avg, exp_avg_sq: float32 tensors, contiguous, on one device. emas: none, one or two lists like params,
    each with its number in `ema_decays`. weights: tensors of the same shapes that receive the new params, all float32
    or all bfloat16, or None. group: for each tensor its index into `lr` and `weight_decay`. max_norm may be infinite.

    All tensors are changed in place. They may not move (`p.data = ...`) while a CUDA graph of `step` is replayed, nor
    may the gradients and `lr` it was captured with. Outside of graphs the step follows tensors that moved, at the price
    of a new table every time: better make a new object. Steps of one object belong on one stream. Raises ValueError for
    tensors or numbers that do not fit, RuntimeError (`why_missing`) where the device has no library.
    """

    step_count: Tensor
    """Updates made, an int64 scalar on the device; to resume, `fill_` it."""
    skipped: Tensor
    """Updates left out because a gradient was not finite, an int64 scalar on the device."""

    def __init__(
        self,
        params: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        emas: Sequence[Sequence[Tensor]],
        weights: Sequence[Tensor] | None,
        group: Sequence[int],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: Sequence[float],
        max_norm: float,
        ema_decays: Sequence[float],
    ) -> None:
        numbers = {"beta1": betas[0], "beta2": betas[1], **{f"ema_decays[{k}]": d for k, d in enumerate(ema_decays)}}
        for name, value in numbers.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected at least 0 and below 1")
        if not (eps >= 0 and max_norm > 0):
            raise ValueError(f"eps is {eps} and max_norm {max_norm}, expected at least 0 and above 0")
        _check_settings(group, weight_decay, len(emas), ema_decays)
        if weights is not None and len(weights) != len(params):
            raise ValueError(f"weights has {len(weights)} tensors, expected {len(params)} as params")
        for k, average in enumerate(emas):
            if len(average) != len(params):
                raise ValueError(f"emas[{k}] has {len(average)} tensors, expected {len(params)} as params")
        self._lists = (
            list(params),
            list(exp_avg),
            list(exp_avg_sq),
            [e for average in emas for e in average],
            list(weights or ()),
        )
        self._group = list(group)
        self._numbers = (*betas, eps, list(weight_decay), max_norm, list(ema_decays))
        self._held = _table(*self._lists, self._group)
        self.step_count = torch.zeros((), dtype=torch.int64, device=self._held.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self._held.device)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor | None], lr: Tensor) -> Tensor:
        """One update; the norm of all gradients before clipping, a float32 scalar on the device.

        grads: one for each of params, all float32 or all bfloat16; a None leaves its tensor and moments alone, while
        average and copy follow the tensor all the same. lr `(groups,)` float32 on the device. The bias correction
        counts the updates made, the same for all tensors. Nothing is read back to the host.
        """
        return adamw_ema(*self._lists, list(grads), lr, self.step_count, self.skipped, self._group, *self._numbers)
