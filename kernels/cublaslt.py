"""cuBLASLt's products that end in what surrounds GELU: bias and GELU forward, GELU's gradient and bias sums backward.

The library torch has loaded is called through ctypes: its C interface is fixed within a major version, while a C++
extension would need CUDA's headers, a compiler and a build for each torch. A `Product` describes a call and can be
looked at anywhere; `_multiply` makes it. Numbers and structures are those of cublasLt.h in cuBLAS 12.8 and 13.10.

cuBLASLt sees matrices column-major. A dense row-major tensor `(R, C)` is the column-major matrix of C rows and R
columns with leading dimension C, the transpose. Y = X W^T of rows is therefore Y^T = W X^T there, of columns: W comes
first, and since what is seen of it is W^T, it is transposed back; what is seen of X is X^T and stays. Bias (one entry a
row of the result) then runs along a token's hidden channels, and AUX lies like the result, with its leading dimension.
"""

import ctypes
import threading
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lsep_kernels.limits import Card, Device

WORKSPACE = 32 * 2**20  # bytes, NVIDIA's advice for Hopper
ALIGNMENT = 16  # bytes of every pointer: what TMA and the widest loads need

_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
_R_32F, _COMPUTE_32F, _OP_N, _OP_T = 0, 68, 0, 1


class Epilogue(IntEnum):
    """What a product ends in (`cublasLtEpilogue_t`), for columns of the result."""

    GELU_AUX_BIAS = 32 | 128 | 4
    """aux = a b + bias, d = GELU_tanh(aux)."""
    DGELU_BGRAD = 64 | 128 | 16
    """d = a b GELU_tanh'(aux), bias = sum of d over its columns."""


class _Attribute(IntEnum):
    """`cublasLtMatmulDescAttributes_t`."""

    TRANSA = 3
    EPILOGUE = 7
    BIAS_POINTER = 8
    AUX_POINTER = 11
    AUX_LD = 12


class _Preference(IntEnum):
    """`cublasLtMatmulPreferenceAttributes_t`."""

    MAX_WORKSPACE_BYTES = 1
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


class _Heuristic(ctypes.Structure):
    """`cublasLtMatmulHeuristicResult_t`."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Describing a call


@dataclass(frozen=True)
class Matrix:
    """Column-major: element (i, j) stands at i + j ld."""

    rows: int
    cols: int
    ld: int


@dataclass(frozen=True)
class Product:
    """d = epilogue(a b), or of a^T b."""

    a: Matrix
    b: Matrix
    d: Matrix
    transpose_a: bool
    epilogue: Epilogue


def _row_major(rows: int, cols: int) -> Matrix:
    return Matrix(cols, rows, cols)


def forward_product(m: int, width: int, hidden: int) -> Product:
    """h, z = GELU(z), x W^T + b: x `(m, width)`, W `(hidden, width)`."""
    return Product(
        _row_major(hidden, width), _row_major(m, width), _row_major(m, hidden), True, Epilogue.GELU_AUX_BIAS
    )  # fmt: skip


def backward_product(m: int, width: int, hidden: int) -> Product:
    """dz = (dy W) GELU'(z) and its sum over rows: dy `(m, width)`, W `(width, hidden)`."""
    return Product(
        _row_major(width, hidden), _row_major(m, width), _row_major(m, hidden), False, Epilogue.DGELU_BGRAD
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Making it


@cache
def library() -> ctypes.CDLL | str:
    """cuBLASLt, or a sentence saying why there is none."""
    majors = [torch.version.cuda.partition(".")[0]] if torch.version.cuda else ["13", "12"]
    for name in (f"libcublasLt.so.{major}" for major in majors):
        try:
            found = ctypes.CDLL(name)  # by its soname the loader finds the one in the process
        except OSError:
            continue
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        found.cublasLtGetStatusString.restype = ctypes.c_char_p
        found.cublasLtMatrixLayoutCreate.argtypes = [
            pointer, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64
        ]  # fmt: skip
        found.cublasLtMatmulAlgoGetHeuristic.argtypes = [*[pointer] * 7, ctypes.c_int, pointer, pointer]
        found.cublasLtMatmul.argtypes = [*[pointer] * 14, size, pointer]
        for kind in ("MatmulDesc", "MatmulPreference"):
            getattr(found, f"cublasLt{kind}SetAttribute").argtypes = [pointer, ctypes.c_int, pointer, size]
        return found
    return f"libcublasLt.so.{' or .'.join(majors)} cannot be loaded: install a CUDA build of torch"


def missing(device: Device, dtype: torch.dtype) -> str | None:
    """Why cuBLASLt cannot compute an MLP of `dtype` on `device`, or None."""
    if device.type != "cuda":
        return f"cuBLASLt needs a GPU, and the device is {device.type}"
    if dtype not in _TYPES:
        return f"the type is {str(dtype).removeprefix('torch.')}, expected float16 or bfloat16"
    found = None if isinstance(device, Card) else library()
    return found if isinstance(found, str) else None


def _call(function: str, *args: Any) -> None:
    found = library()
    if isinstance(found, str):
        raise RuntimeError(found)
    status = getattr(found, f"cublasLt{function}")(*args)
    if status:
        raise RuntimeError(f"cublasLt{function} failed: {found.cublasLtGetStatusString(status).decode()}")


def _create(kind: str, *args: Any) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    _call(f"{kind}Create", ctypes.byref(made), *args)
    return made


def _set(kind: str, on: ctypes.c_void_p, attribute: IntEnum, value: Any) -> None:
    _call(f"{kind}SetAttribute", on, attribute, ctypes.byref(value), ctypes.sizeof(value))


def _description(product: Product) -> ctypes.c_void_p:
    """The descriptor of a product, with stand-ins for its pointers: what is read of them is their alignment."""
    made = _create("MatmulDesc", _COMPUTE_32F, _R_32F)
    values = {
        _Attribute.TRANSA: ctypes.c_int32(_OP_T if product.transpose_a else _OP_N),
        _Attribute.EPILOGUE: ctypes.c_uint32(product.epilogue),
        _Attribute.BIAS_POINTER: ctypes.c_void_p(ALIGNMENT),
        _Attribute.AUX_POINTER: ctypes.c_void_p(ALIGNMENT),
        _Attribute.AUX_LD: ctypes.c_int64(product.d.ld),
    }
    for attribute, value in values.items():
        _set("MatmulDesc", made, attribute, value)
    return made


def _layout(matrix: Matrix, dtype: torch.dtype) -> ctypes.c_void_p:
    return _create("MatrixLayout", _TYPES[dtype], matrix.rows, matrix.cols, matrix.ld)


def _preference() -> ctypes.c_void_p:
    made = _create("MatmulPreference")
    _set("MatmulPreference", made, _Preference.MAX_WORKSPACE_BYTES, ctypes.c_uint64(WORKSPACE))
    for attribute in list(_Preference)[1:]:
        _set("MatmulPreference", made, attribute, ctypes.c_uint32(ALIGNMENT))
    return made


@cache
def _resources(index: int) -> tuple[ctypes.c_void_p, Tensor]:
    """Handle and workspace of a GPU, for as long as the process lives.

    All products share the workspace: they follow each other on one stream, as those of a step do.
    """
    with torch.cuda.device(index):
        return _create(""), torch.empty(WORKSPACE, dtype=torch.uint8, device=torch.device("cuda", index))


def prepare(device: torch.device) -> None:
    """Allocate what stays allocated, so that it does not end up in the memory of a CUDA graph."""
    _resources(torch.cuda.current_device() if device.index is None else device.index)


class _Plan:
    """Descriptors of a product and its algorithm, the first that cuBLASLt's heuristic names: always the same."""

    def __init__(self, product: Product, dtype: torch.dtype, index: int) -> None:
        self.description = _description(product)
        self.layouts = [_layout(m, dtype) for m in (product.a, product.b, product.d)]
        self.heuristic, count, preference = _Heuristic(), ctypes.c_int(), _preference()
        a, b, d = self.layouts
        _call(
            "MatmulAlgoGetHeuristic", _resources(index)[0], self.description, a, b, d, d, preference, 1,
            ctypes.byref(self.heuristic), ctypes.byref(count),
        )  # fmt: skip
        _call("MatmulPreferenceDestroy", preference)
        if not count.value or self.heuristic.state:
            raise RuntimeError(f"cuBLASLt has no algorithm for {product} in {dtype}")


_plan = cache(_Plan)
_lock = threading.Lock()  # a plan's pointers are set for each call, and ctypes lets other threads run
_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)


def _multiply(product: Product, a: Tensor, b: Tensor, d: Tensor, bias: Tensor, aux: Tensor) -> None:
    """Write `product` to d, and to aux or bias what its epilogue says, on the current stream."""
    a, b, bias, aux = (t if t.data_ptr() % ALIGNMENT == 0 else t.clone() for t in (a, b, bias, aux))
    with torch.cuda.device(d.device), _lock:
        plan, (handle, workspace) = _plan(product, d.dtype, d.device.index), _resources(d.device.index)
        _set("MatmulDesc", plan.description, _Attribute.BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        _set("MatmulDesc", plan.description, _Attribute.AUX_POINTER, ctypes.c_void_p(aux.data_ptr()))
        layout_a, layout_b, layout_d = plan.layouts
        _call(
            "Matmul", handle, plan.description, ctypes.byref(_ONE), a.data_ptr(), layout_a, b.data_ptr(),
            layout_b, ctypes.byref(_ZERO), d.data_ptr(), layout_d, d.data_ptr(), layout_d,
            ctypes.byref(plan.heuristic.algo), workspace.data_ptr(), WORKSPACE,
            torch.cuda.current_stream(d.device).cuda_stream,
        )  # fmt: skip


def check_widths(width: int, hidden: int) -> None:
    """Raise ValueError for widths whose rows would not be aligned."""
    if width % 8 or hidden % 8:
        raise ValueError(f"cuBLASLt: width is {width} and hidden width {hidden}, expected multiples of 8")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`h = GELU_tanh(z)` and `z = x W^T + b`: x `(M, D)`, weight `(H, D)`, bias `(H,)`, all dense; `(M, H)` both."""
    (m, width), hidden = x.shape, len(weight)
    check_widths(width, hidden)
    h, z = (x.new_empty(m, hidden) for _ in range(2))
    _multiply(forward_product(m, width, hidden), weight, x, h, bias, z)
    return h, z


def linear_gelu_backward(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """`dz = (dy W) GELU_tanh'(z)` `(M, H)` and its sum over rows `(H,)`: dy `(M, D)`, weight `(D, H)`, z `(M, H)`."""
    (m, width), hidden = dy.shape, z.shape[1]
    check_widths(width, hidden)
    dz, dbias = torch.empty_like(z), z.new_empty(hidden)
    _multiply(backward_product(m, width, hidden), weight, dy, dz, dbias, z)
    return dz, dbias
