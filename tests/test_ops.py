"""The chooser of `lsep_kernels`, and the package on its own."""

import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

from lsep_kernels import libraries, ops
from lsep_kernels.ops import REFERENCE, Unavailable, choose

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture
def compiled_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(os.environ, "TRITON_INTERPRET", raising=False)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    """A GPU of `capability`."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return torch.device("cuda")


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, **modules: str) -> None:
    """Python modules on the path in front of all others: `{"a__b": source}` is module a.b."""
    for name, source in modules.items():
        path = folder.joinpath(*name.split("__"))
        path.mkdir(parents=True, exist_ok=True)
        for package in (path, *path.parents):
            if package == folder:
                break
            (package / "__init__.py").touch()
        (path / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    for loaded in [m for m in sys.modules if m.startswith("flash_attn")]:  # of an earlier test
        del sys.modules[loaded]


def test_auto_on_a_cpu_is_plain_pytorch(compiled_only: None) -> None:
    chosen = choose("auto", "auto", CPU, torch.float32, 256, 72)
    assert (chosen.kernels, chosen.attention_by) == ("reference", "sdpa")
    assert chosen.norm_modulate is REFERENCE.norm_modulate and chosen.attention is libraries.sdpa


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from lsep_kernels import limits

    monkeypatch.setattr(limits, "INTERPRETED", False)
    hopper = pretend(monkeypatch, (9, 0))
    chosen = choose("auto", "auto", hopper, BF16, 256, 72)
    assert (chosen.kernels, chosen.attention_by) == ("triton", "triton")
    for f in fields(ops.Ops):
        if f.name == "linear":  # PyTorch's on every device
            continue
        assert getattr(chosen, f.name) is not getattr(REFERENCE, f.name), f.name
    assert choose("auto", "auto", hopper, BF16, 256, 72, mlp="torch").mlp is REFERENCE.mlp
    assert choose("reference", "auto", hopper, BF16, 256, 72).mlp_by == "torch"
    assert choose("auto", "auto", hopper, BF16, 1024, 72).attention_by == "cudnn"
    assert choose("reference", "auto", hopper, BF16, 256, 72).attention_by == "cudnn"
    ampere = pretend(monkeypatch, (8, 0))
    chosen = choose("auto", "auto", ampere, BF16, 256, 72)
    assert (chosen.kernels, chosen.attention_by) == ("triton", "sdpa")
    for other in ((8, 0), (12, 0)):  # without room for a head's keys
        assert choose("triton", "auto", pretend(monkeypatch, other), BF16, 256, 72).attention_by in ("sdpa", "cudnn")
        with pytest.raises(Unavailable, match=rf"compute capability {other[0]}\.0, expected 9\.x or 10\.x"):
            choose("auto", "triton", pretend(monkeypatch, other), BF16, 256, 72)
    turing = pretend(monkeypatch, (7, 5))
    chosen = choose("auto", "auto", turing, torch.float16, 256, 72)
    assert (chosen.kernels, chosen.attention_by) == ("reference", "sdpa")
    with pytest.raises(Unavailable, match=r"compute capability 7\.5, expected 8\.0"):
        choose("triton", "auto", turing, torch.float16, 256, 72)


def test_what_was_asked_for_and_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, compiled_only: None) -> None:
    with pytest.raises(Unavailable, match="kernels is 'triton', but Triton needs a GPU"):
        choose("triton", "auto", CPU, torch.float32, 256, 72)
    with pytest.raises(Unavailable, match="attention is 'cudnn', but cuDNN needs a GPU"):
        choose("auto", "cudnn", CPU, torch.float32, 256, 72)
    with pytest.raises(Unavailable, match="flash-attn needs a GPU"):
        choose("auto", "flash", CPU, torch.float32, 256, 72)
    gpu = pretend(monkeypatch, (9, 0))
    with pytest.raises(Unavailable, match="flash-attn is not installed: pip install flash-attn --no-build-isolation"):
        choose("auto", "flash", gpu, BF16, 256, 72)
    with pytest.raises(Unavailable, match="float32, expected float16 or bfloat16"):
        choose("auto", "cudnn", gpu, torch.float32, 256, 72)
    with pytest.raises(Unavailable, match="1024 tokens, expected at most 256"):
        choose("auto", "triton", gpu, BF16, 1024, 72)
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="triton is not installed: pip install triton"):
        choose("triton", "auto", gpu, BF16, 256, 72)


FLASH2, FLASH3, FLASH4 = (
    {"flash_attn": "", "flash_attn_2_cuda": ""},
    {"flash_attn_interface": ""},
    {"flash_attn__cute": ""},
)


@pytest.mark.parametrize(
    ("capability", "head", "installed", "expected"),
    [
        ((9, 0), 72, FLASH2, 2),
        ((9, 0), 72, FLASH2 | FLASH3 | FLASH4, 3),
        ((9, 0), 64, FLASH4, 4),
        ((8, 0), 64, FLASH2 | FLASH3, 2),
        ((9, 0), 72, FLASH4, "flash-attention#2896"),  # a wrong dQ
        ((10, 0), 72, FLASH4, "flash-attention#2896"),
        ((8, 0), 64, FLASH3, "flash-attn 3 runs on sm_90 only, found sm_80"),
        (
            (9, 0), 64, FLASH2 | {"flash_attn_2_cuda": "raise ImportError('undefined symbol')"},
            "flash_attn_2_cuda is installed but cannot be imported (ImportError: undefined symbol)",
        ),
    ],
)  # fmt: skip
def test_flash_attn_generations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], head: int,
    installed: dict[str, str], expected: int | str,
) -> None:  # fmt: skip
    install(monkeypatch, tmp_path, **installed)
    found = libraries.choose_flash(pretend(monkeypatch, capability), head, BF16)
    assert found == expected if isinstance(expected, int) else expected in str(found)


def test_flash_attn_is_called_with_heads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a `flash_attn_func` that is SDPA: generations 3 and 4 return a tuple."""
    program = """
from torch.nn.functional import scaled_dot_product_attention as sdpa
def flash_attn_func(q, k, v):
    out = sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return (out, None) if "interface" in __name__ else out
"""
    install(monkeypatch, tmp_path, flash_attn=program, flash_attn_2_cuda="", flash_attn_interface=program)
    qkv = torch.randn(2, 6, 3 * 32)
    for generation in (2, 3):
        torch.testing.assert_close(libraries.flash(generation)(qkv, 2), REFERENCE.attention(qkv, 2))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="libraries of a GPU")
@pytest.mark.parametrize("name", ["cudnn", "flash", "sdpa"])
@pytest.mark.parametrize("head", [64, 72])
def test_library_attention(name: str, head: int) -> None:
    problem = ops.missing_attention(name, DEVICE, BF16, 256, head)
    if problem:
        pytest.skip(problem)
    attention = choose("auto", name, DEVICE, BF16, 256, head).attention  # type: ignore[arg-type]
    qkv = torch.randn(2, 256, 3 * 4 * head, device=DEVICE, dtype=BF16, requires_grad=True)
    truth = qkv.detach().double().requires_grad_()
    attention(qkv, 4).sum().backward()
    REFERENCE.attention(truth, 4).sum().backward()
    assert qkv.grad is not None and truth.grad is not None
    assert (qkv.grad - truth.grad).abs().max() < 2e-2 * truth.grad.abs().max()


def test_the_folder_works_on_its_own(tmp_path: Path) -> None:
    """`cp -r kernels elsewhere/lsep_kernels`: torch and triton are all it needs."""
    pytest.importorskip("triton")
    source = Path(__file__).parents[1] / "kernels"
    shutil.copytree(source, tmp_path / "lsep_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = """
import sys
sys.modules["lsep"] = None
import torch
from lsep_kernels import adamw_ema, ops
assert ops.__file__.startswith(sys.argv[1])
chosen = ops.choose("triton", "triton", torch.device("cpu"), torch.float32, tokens=8, head_dim=16)
x = torch.randn(1, 8, 48, requires_grad=True)
chosen.attention(x, 1).sum().backward()
assert x.grad.isfinite().all()
assert "is not built" in adamw_ema.why_missing("cpu")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
