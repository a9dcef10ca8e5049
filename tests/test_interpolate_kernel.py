"""kernels/interpolate.py: the same numbers as the reference, word for word, and its behaviour as an operator."""

from typing import Any

import pytest
import torch
from conftest import relative_error
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from lsep_kernels import interpolate as kernel
from lsep_kernels import reference as ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63 + 12345, 2**64 - 1]


def inputs(form: str, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    """Arguments for latents of `shape` (B, C, H, W) with large sample ids and a large epoch."""
    g = torch.Generator().manual_seed(0)
    b, c, *size = shape
    if form == "pixels":
        rows = torch.randint(256, shape, generator=g, dtype=torch.uint8)
    else:
        rows = torch.randn(b, 2 * c if form == "moments" else c, *size, generator=g).to(dtype)
    ids = torch.randint(2**48, (b,), generator=g)
    ids[0] = 2**48 - 1
    return {
        "rows": rows.to(DEVICE),
        "ids": ids.to(DEVICE),
        "epoch": torch.tensor(2**33 + 5, device=DEVICE),
        "t": torch.rand(b, generator=g).to(DEVICE),
        "seed": 7,
        "form": form,
        "path": "linear",
        "shift": 0.3,
        "scale": 0.7,
        "streams": (0, 1),
    }


@triton.jit
def _store_words(out_ptr, id_ptr, epoch_ptr, seed, stream, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    words = kernel.random_words(seed, i, tl.load(id_ptr), tl.load(epoch_ptr), stream)
    for k in tl.static_range(4):
        tl.store(out_ptr + 4 * i + k, words[k].to(tl.int64))


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_those_of_the_reference(seed: int) -> None:
    signed = seed - 2**64 if seed >= 2**63 else seed
    for sample, epoch, stream in [(0, 0, 0), (2**48 - 1, 2**32 - 1, 7), (2**31, 2**33 + 5, 1)]:
        ids, epochs = torch.tensor([sample], device=DEVICE), torch.tensor(epoch, device=DEVICE)
        got = torch.empty(16, 4, dtype=torch.int64, device=DEVICE)
        _store_words[(1,)](got, ids, epochs, signed, stream, BLOCK=16)
        counter = ref._counter(ids, epochs, stream, torch.arange(16, device=DEVICE))
        assert torch.equal(got, torch.stack(ref.philox(seed, *counter), dim=-1))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 3, 5, 7), (2, 4, 32, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", kernel.PATHS)
@pytest.mark.parametrize("form", ref.FORMS)
def test_values(form: str, path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    arguments = inputs(form, dtype, shape) | {"path": path}
    for got, expected in zip(kernel.interpolate(**arguments), ref.interpolate(**arguments), strict=True):
        assert got.dtype == torch.float32 and got.shape == shape
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("path", kernel.PATHS)
def test_ends_of_the_path(path: str) -> None:
    arguments = inputs("samples", torch.float32, (2, 4, 4, 4)) | {"path": path}
    arguments["t"] = torch.tensor([0.0, 1.0], device=DEVICE)
    for got, expected in zip(kernel.interpolate(**arguments), ref.interpolate(**arguments), strict=True):
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_all_seeds(seed: int) -> None:
    arguments = inputs("moments", torch.float32, (2, 3, 3, 3)) | {"seed": seed, "streams": (5, 6)}
    for got, expected in zip(kernel.interpolate(**arguments), ref.interpolate(**arguments), strict=True):
        assert relative_error(got, expected) < 1e-6


def test_a_sample_keeps_its_values_anywhere_in_any_batch() -> None:
    arguments = inputs("moments", torch.float32, (5, 3, 5, 7))
    whole = kernel.interpolate(**arguments)
    for chosen in ([3, 0], [4]):
        part = arguments | {key: arguments[key][chosen] for key in ("rows", "ids", "t")}
        assert all(torch.equal(a, b[chosen]) for a, b in zip(kernel.interpolate(**part), whole, strict=True))


def test_compiled_equals_eager() -> None:
    arguments = inputs("moments", torch.float32, (2, 3, 5, 7))

    def step(rows: Tensor, ids: Tensor, epoch: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return kernel.interpolate(rows, ids, epoch, t, 2**64 - 1, "moments", "cosine", 0.3, 0.7, (0, 1))

    tensors = [arguments[key] for key in ("rows", "ids", "epoch", "t")]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(step(*tensors), compiled(*tensors), strict=True))


@pytest.mark.parametrize("form", ref.FORMS)
def test_operator(form: str) -> None:
    a = inputs(form, torch.float32, (2, 3, 3, 3))
    tensors = (a["rows"], a["ids"], a["epoch"], a["t"])
    torch.library.opcheck(kernel._op, (*tensors, -1, form, "linear", 0.3, 0.7, 0, 1))


def test_names_and_shapes_are_checked() -> None:
    arguments = inputs("samples", torch.float32, (2, 3, 3, 3))
    with pytest.raises(ValueError, match="form is 'latents'"):
        kernel.interpolate(**arguments | {"form": "latents"})
    with pytest.raises(ValueError, match="form is 'latents'"):
        ref.interpolate(**arguments | {"form": "latents"})
    with pytest.raises(ValueError, match="path 'vp'"):
        kernel.interpolate(**arguments | {"path": "vp"})
    with pytest.raises(ValueError, match=r"t is \(1,\), expected \(2,\)"):
        kernel.interpolate(**arguments | {"t": arguments["t"][:1]})
