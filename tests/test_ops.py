"""The chooser of `lsep_kernels`, and the package on its own."""

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


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *modules: str) -> torch.device:
    """A GPU of `capability` with these modules installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    known = importlib_find_spec
    names = {"flash_attn", "flash_attn_2_cuda", "flash_attn_interface", "flash_attn.cute"}
    monkeypatch.setattr(
        libraries.importlib.util,
        "find_spec",
        lambda name: (object() if name in modules else None) if name in names else known(name),
    )
    return torch.device("cuda")


importlib_find_spec = libraries.importlib.util.find_spec


def test_auto_on_a_cpu_is_plain_pytorch(compiled_only: None) -> None:
    chosen = choose("auto", "auto", CPU, torch.float32, 256, 72)
    assert (chosen.kernels, chosen.attention_by) == ("reference", "sdpa")
    assert chosen.norm_modulate is REFERENCE.norm_modulate and chosen.attention is libraries.sdpa


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    hopper = pretend(monkeypatch, (9, 0))
    chosen = choose("auto", "auto", hopper, BF16, 256, 72)
    assert (chosen.kernels, chosen.attention_by) == ("triton", "triton")
    for f in fields(ops.Ops)[2:]:
        assert getattr(chosen, f.name) is not getattr(REFERENCE, f.name), f.name
    assert choose("auto", "auto", hopper, BF16, 1024, 72).attention_by == "cudnn"
    assert choose("reference", "auto", hopper, BF16, 256, 72).attention_by == "cudnn"
    ampere = pretend(monkeypatch, (8, 0))
    chosen = choose("auto", "auto", ampere, BF16, 256, 72)
    assert (chosen.kernels, chosen.attention_by) == ("triton", "sdpa")
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
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="triton is not installed: pip install triton"):
        choose("triton", "auto", gpu, BF16, 256, 72)


@pytest.mark.parametrize(
    ("capability", "head", "installed", "expected"),
    [
        ((9, 0), 72, ("flash_attn", "flash_attn_2_cuda"), 2),
        ((9, 0), 72, ("flash_attn", "flash_attn_2_cuda", "flash_attn_interface", "flash_attn.cute"), 3),
        ((9, 0), 64, ("flash_attn", "flash_attn.cute"), 4),
        ((8, 0), 64, ("flash_attn", "flash_attn_2_cuda", "flash_attn_interface"), 2),
        ((9, 0), 72, ("flash_attn", "flash_attn.cute"), "flash-attention#2896"),  # a wrong dQ
        ((10, 0), 72, ("flash_attn", "flash_attn.cute"), "flash-attention#2896"),
        ((8, 0), 64, ("flash_attn_interface",), "flash-attn 3 runs on sm_90 only, found sm_80"),
    ],
)
def test_flash_attn_generations(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], head: int, installed: tuple, expected: int | str
) -> None:
    found = libraries.choose_flash(pretend(monkeypatch, capability, *installed), head, BF16)
    assert found == expected if isinstance(expected, int) else expected in str(found)


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
