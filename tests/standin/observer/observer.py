"""Says what each launch on the stand-in moves and does: from the tensors of ATen's operators, of Inductor's kernels and
of Triton's.

The bytes are the least a launch must move: each tensor once, those that are read and written twice. Products,
convolutions, attention of cuDNN, copies and collectives are counted by the stand-in itself, from their shapes. Nothing
that runs is changed: compiled code stays compiled, and the launches are the same with the observer and without it.
"""

import ctypes
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

_library = ctypes.CDLL(None)
_present = hasattr(_library, "standin_begin")
if _present:
    _library.standin_begin.argtypes = [ctypes.c_char_p]
    _library.standin_begin.restype = None
    _library.standin_end.argtypes = [ctypes.c_double, ctypes.c_double]
    _library.standin_end.restype = None


def _around(label: str, call: Callable[[], Any], work: Callable[[Any], tuple[float, float]]) -> Any:
    """call(), its launches labelled; `work` gives bytes and operations from its result."""
    _library.standin_begin(label.encode()[:159])
    figures = (0.0, 0.0)
    try:
        result = call()
        figures = work(result)
    finally:
        _library.standin_end(*figures)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def _footprint(t: Any) -> tuple[tuple[Any, ...], int]:
    """What memory a tensor names, and its bytes: dimensions that are expanded count once."""
    t = getattr(t, "_local_tensor", t)  # of a DTensor
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if size == 0:
            return (), 0
        if stride:
            elements *= size
    return (t.data_ptr(), tuple(t.shape), tuple(t.stride())), elements * t.element_size()


def _on_device(values: Iterable[Any]) -> list[Any]:
    """The tensors of a GPU in arguments, those of lists and tuples as well."""
    import torch

    found: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.is_cuda and value.layout == torch.strided:
                found.append(value)
        elif isinstance(value, list | tuple):
            found += _on_device(value)
        elif isinstance(value, Mapping):
            found += _on_device(value.values())
    return found


def _bytes(tensors: Iterable[Any]) -> int:
    """Bytes of all of them, the same memory counted once."""
    return sum(dict(_footprint(t) for t in tensors).values())


# ---------------------------------------------------------------------------------------------------------------------
# Operators that run eagerly, and those that compiled code calls

_COUNTED_BELOW = {
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_scaled_mm", "convolution", "convolution_backward",
    "cudnn_convolution", "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward",
    "_addmm_activation",
}  # fmt: skip
_ONLY_WRITTEN = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "arange"}
_GATHERED = {"embedding", "index", "index_select", "gather"}
_ATTENTION = {
    "_scaled_dot_product_flash_attention": 4,
    "_scaled_dot_product_efficient_attention": 4,
    "_scaled_dot_product_flash_attention_backward": 10,
    "_scaled_dot_product_efficient_attention_backward": 10,
}
"""Operations per query, key and channel."""


def _operator_work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[float, float]:
    name = func._schema.name.partition("::")[2]
    if name in _COUNTED_BELOW:
        return 0.0, 0.0
    given, made = _on_device([args, kwargs]), _on_device([result])
    if name == "adamw_ema":
        return _optimizer_bytes(*args), 0.0
    if name in _GATHERED:  # as much is read as is written
        return 2.0 * _bytes(made) + _bytes(t for t in given if not t.is_floating_point()), 0.0
    moved = _bytes([*given, *made])
    names = [a.name for a in func._schema.arguments]
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    for argument in func._schema.arguments:
        info = argument.alias_info
        if info is not None and info.is_write and not argument.is_out and name not in _ONLY_WRITTEN:
            moved += _bytes(_on_device([values.get(argument.name)]))
    flops = 0.0
    if name in _ATTENTION:
        q, k = values["query"], values["key"]
        flops = float(_ATTENTION[name]) * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
    return float(moved), flops


def _optimizer_bytes(
    params: list[Any],
    exp_avg: list[Any],
    exp_avg_sq: list[Any],
    emas: list[Any],
    weights: list[Any],
    grads: list[Any],
    *_: Any,
) -> float:
    """Gradients twice (for the norm and for the update), weights written, all else read and written."""
    both = [*params, *exp_avg, *exp_avg_sq, *emas]
    return 2.0 * _bytes(_on_device(both)) + _bytes(_on_device(weights)) + 2.0 * _bytes(_on_device(grads))


def watch_torch(torch: ModuleType) -> None:
    """Enter a mode that sees the operators of this thread and of the backward passes that it starts."""
    if not _present:
        return
    from torch.utils._python_dispatch import TorchDispatchMode

    class Observer(TorchDispatchMode):
        supports_higher_order_operators = True

        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if not hasattr(func, "_schema"):  # a higher-order operator: what it calls is seen elsewhere
                return func(*args, **kwargs)
            return _around(
                func._schema.name, lambda: func(*args, **kwargs), lambda out: _operator_work(func, args, kwargs, out)
            )

    Observer().__enter__()  # for as long as the process lives


# ---------------------------------------------------------------------------------------------------------------------
# Triton's kernels, called directly and by Inductor

_SHARE = {
    ("_attention_backward_q_kernel", "dqkv_ptr"): 1 / 3,
    ("_attention_backward_kv_kernel", "dqkv_ptr"): 2 / 3,
}
"""Arguments of which a kernel touches a part."""
_ATTENTION_KERNELS = {
    "_attention_forward_kernel": 4,
    "_attention_backward_q_kernel": 6,
    "_attention_backward_kv_kernel": 8,
}
"""Operations per query, key and channel: two, three and four products."""


def _kernel_work(name: str, values: Mapping[str, Any]) -> tuple[float, float]:
    tensors = {key: value for key, value in values.items() if _on_device([value])}
    moved = float(_bytes(tensors.values()))
    for key, t in tensors.items():
        size = _footprint(t)[1]
        if key.startswith("in_out_ptr"):  # as Inductor calls what it reads and writes
            moved += size
        moved -= size * (1 - _SHARE.get((name, key), 1))
    flops = 0.0
    if name in _ATTENTION_KERNELS:
        qkv = tensors["qkv_ptr"]
        flops = float(_ATTENTION_KERNELS[name]) * qkv.shape[0] * qkv.shape[1] ** 2 * qkv.shape[2] / 3
    return moved, flops


def watch_triton(jit: ModuleType) -> None:
    """Wrap the call of a kernel."""
    if not _present:
        return
    run = jit.JITFunction.run

    def observed(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        def call() -> Any:
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)

        if warmup:
            return call()
        name = getattr(self.fn, "__name__", "kernel")
        return _around(
            name, call, lambda _: _kernel_work(name, {**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        )

    jit.JITFunction.run = observed


def watch_inductor(heuristics: ModuleType) -> None:
    """Wrap the call of a kernel in compiled code."""
    if not _present:
        return
    run = heuristics.CachingAutotuner.run

    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.inductor_meta.get("kernel_name") or self.fn.__name__
        names = list(self.fn.arg_names)
        return _around(
            name,
            lambda: run(self, *args, **kwargs),
            lambda _: _kernel_work(self.fn.__name__, dict(zip(names, args, strict=False))),
        )

    heuristics.CachingAutotuner.run = observed
