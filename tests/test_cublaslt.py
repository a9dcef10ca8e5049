"""cuBLASLt without a GPU: its calls as they are described, on matrices in plain memory, and its descriptors."""

import ctypes

import pytest
import torch
from conftest import DEVICE, assert_kernel_is_as_accurate, random, run
from torch import Tensor

pytest.importorskip("triton")
from lsep_kernels import cublaslt, mlp, ops, reference
from lsep_kernels.cublaslt import Epilogue, Matrix, Product

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHAPES = [(24, 16), (40, 16), (40,), (16, 40), (16,)]
"""Of x, weight1, bias1, weight2 and bias2: no two lengths are the same."""
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy


def columns(tensor: Tensor, matrix: Matrix) -> Tensor:
    """The memory of `tensor` as the column-major `matrix`, which must be all of it."""
    assert tensor.is_contiguous() and tensor.numel() == matrix.ld * matrix.cols and matrix.rows <= matrix.ld
    return tensor.view(-1).as_strided((matrix.rows, matrix.cols), (1, matrix.ld))


def emulate(product: Product, a: Tensor, b: Tensor, d: Tensor, bias: Tensor, aux: Tensor) -> None:
    """What NVIDIA documents of cublasLtMatmul with alpha 1 and beta 0, by plain memory."""
    left = columns(a, product.a)
    result = (left.T if product.transpose_a else left) @ columns(b, product.b)
    out, saved = columns(d, product.d), columns(aux, product.d)  # the leading dimension of aux is that of d
    assert result.shape == out.shape and bias.shape == (product.d.rows,)
    if product.epilogue == Epilogue.GELU_AUX_BIAS:
        saved.copy_(result + bias[:, None])
        out.copy_(reference.gelu(saved))
    else:
        out.copy_(torch.ops.aten.gelu_backward(result, saved, approximate="tanh"))
        bias.copy_(out.sum(1))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "_multiply", emulate)


@pytest.mark.usefixtures("emulated")
def test_values_and_gradients() -> None:
    """The whole operator."""
    tensors = [random(*shape, seed=i) for i, shape in enumerate([(2, 12, 16), *SHAPES[1:]])]
    expected, found = (run(by, tensors, torch.float32) for by in (reference.mlp, mlp.mlp_cublaslt))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("emulated")
def test_operators_and_one_graph() -> None:
    x, w1, b1, w2, b2 = (random(*s).to(DEVICE).requires_grad_() for s in SHAPES)
    torch.library.opcheck(mlp._mlp_cublaslt, (x, w1, b1, w2, b2))
    z = random(24, 40).to(DEVICE)
    torch.library.opcheck(mlp._mlp_cublaslt_backward, (x.detach(), x.detach(), z, w1.detach(), w2.detach()))
    compiled = torch.compile(mlp.mlp_cublaslt, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w1, b1, w2, b2), reference.mlp(x, w1, b1, w2, b2), rtol=1e-5, atol=1e-4)


def test_widths_are_checked() -> None:
    with pytest.raises(ValueError, match="width is 16 and hidden width 20, expected multiples of 8"):
        cublaslt.linear_gelu(random(4, 16), random(20, 16), random(20))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cublaslt.missing(CPU, BF16) == "cuBLASLt needs a GPU, and the device is cpu"
    gpu = torch.device("cuda")
    assert cublaslt.missing(gpu, torch.float32) == "the type is float32, expected float16 or bfloat16"
    monkeypatch.setattr(cublaslt, "library", lambda: "libcublasLt.so.13 cannot be loaded")
    assert cublaslt.missing(gpu, BF16) == "libcublasLt.so.13 cannot be loaded"
    with pytest.raises(RuntimeError, match="libcublasLt.so.13 cannot be loaded"):
        cublaslt._description(cublaslt.forward_product(8, 16, 40))
    with pytest.raises(ops.Unavailable, match="mlp is 'cublaslt', but cuBLASLt needs a GPU"):
        ops.choose("reference", "sdpa", CPU, torch.float32, 256, 72, mlp="cublaslt")


needs_library = pytest.mark.skipif(isinstance(cublaslt.library(), str), reason="without libcublasLt")


@needs_library
@pytest.mark.parametrize("describe", [cublaslt.forward_product, cublaslt.backward_product])
def test_descriptors_hold_what_was_set(describe: object) -> None:
    """The library, which refuses numbers and sizes it does not know, gives every attribute back."""
    product = describe(24, 16, 40)  # type: ignore[operator]
    made = cublaslt._description(product)
    expected = {
        cublaslt._Attribute.TRANSA: ctypes.c_int32(product.transpose_a),
        cublaslt._Attribute.EPILOGUE: ctypes.c_uint32(product.epilogue),
        cublaslt._Attribute.BIAS_POINTER: ctypes.c_uint64(16),
        cublaslt._Attribute.AUX_POINTER: ctypes.c_uint64(16),
        cublaslt._Attribute.AUX_LD: ctypes.c_int64(40),
    }
    for attribute, value in expected.items():
        assert _read("MatmulDesc", made, attribute, type(value)) == value.value, attribute
    layout = cublaslt._layout(product.a, BF16)
    # cublasLtMatrixLayoutAttribute_t: type, order (0: columns), rows, columns, leading dimension
    kinds = [ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64]
    found = [_read("MatrixLayout", layout, i, kind) for i, kind in enumerate(kinds)]
    assert found == [14, 0, product.a.rows, product.a.cols, product.a.ld]
    preference = cublaslt._preference()
    assert _read("MatmulPreference", preference, 1, ctypes.c_uint64) == 32 * 2**20
    assert [_read("MatmulPreference", preference, i, ctypes.c_uint32) for i in range(5, 9)] == [16] * 4


def _read(kind: str, made: ctypes.c_void_p, attribute: int, into: type) -> int:
    value, written = into(), ctypes.c_size_t()
    cublaslt._call(
        f"{kind}GetAttribute", made, attribute, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)),
        ctypes.byref(written),
    )  # fmt: skip
    assert written.value == ctypes.sizeof(value)
    return value.value


@needs_library
def test_errors_of_the_library_are_sentences() -> None:
    made = cublaslt._description(cublaslt.forward_product(8, 16, 40))
    with pytest.raises(RuntimeError, match="cublasLtMatmulDescSetAttribute failed: an unsupported value"):
        cublaslt._set("MatmulDesc", made, cublaslt._Attribute.TRANSA, ctypes.c_int64(1))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="cuBLASLt computes on GPUs only")
def test_on_a_gpu() -> None:
    """Values and gradients in bf16 at the widths of XL; and a graph replays a step with the same bits."""
    shapes = [(2, 256, 1152), (4608, 1152), (4608,), (1152, 4608), (1152,)]
    tensors = [random(*shape, seed=i) / (shape[-1] ** 0.5 if i in (1, 3) else 1) for i, shape in enumerate(shapes)]
    assert_kernel_is_as_accurate(mlp.mlp_cublaslt, reference.mlp, tensors, BF16)
    leaves = [t.to(DEVICE, BF16).requires_grad_() for t in tensors]

    def step() -> list[Tensor]:
        out = mlp.mlp_cublaslt(*leaves)
        return [out, *torch.autograd.grad(out, leaves, leaves[0].detach())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [t.clone() for t in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
