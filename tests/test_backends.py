"""The one place where implementations are chosen, and the trainer over the Triton kernels."""

import os
import re
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, MANIFEST, lively, random_batch, relative_error, tiny

from lsep import backends
from lsep.checks import resolve
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.plan import branch_plan
from lsep.step import open_loader, setup, train_step
from lsep.train import train
from lsep_kernels import ops
from lsep_kernels.limits import Card

CPU = torch.device("cpu")


def test_auto_on_a_cpu() -> None:
    chosen = backends.choose(resolve(tiny(), MANIFEST), CPU)
    assert (chosen.ops.kernels, chosen.ops.attention_by, chosen.optimizer) == ("reference", "sdpa", "torch")
    assert chosen.ops.mlp_by == "torch"


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("kernels", "triton", "--backend.kernels is 'triton', but Triton needs a GPU, and the device is cpu"),
        ("attention", "cudnn", "--backend.attention is 'cudnn', but cuDNN needs a GPU"),
        ("mlp", "triton", "--backend.mlp is 'triton', but Triton needs a GPU, and the device is cpu"),
        ("mlp", "cublaslt", "--backend.mlp is 'cublaslt', but cuBLASLt needs a GPU, and the device is cpu"),
        ("optimizer", "apex", "--backend.optimizer is 'apex', but apex needs a GPU"),
    ],
)
def test_missing_backends_end_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, flag: str, value: str, message: str
) -> None:
    monkeypatch.delitem(os.environ, "TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=message):
        backends.choose(resolve(tiny(**{f"backend__{flag}": value}), MANIFEST), CPU)


def test_what_is_missing_on_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part whose absence changes the program that trains: what runs instead, why, and what would bring it."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(backends.adamw_ema, "why_missing", lambda device: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert backends.substitutes(tiny(), gpu) == []
    monkeypatch.setattr(backends.adamw_ema, "why_missing", lambda device: f"the {device} library is not built")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kernels, compiler, optimizer = backends.substitutes(tiny(), gpu)
    assert "Triton kernels are replaced by plain PyTorch" in kernels and "pip install triton" in kernels
    assert "nothing is compiled" in compiler and "pip install triton" in compiler
    assert "bf16 weights, the joint modulation and CUDA graphs" in optimizer
    assert "the cuda library is not built" in optimizer and "LSEP_BUILD_CUDA=1 pip install -e ." in optimizer
    asked = tiny(backend__kernels="reference", backend__optimizer="torch", train__compile="off")
    assert backends.substitutes(asked, gpu) == []  # what was asked for is no substitute
    assert backends.substitutes(tiny(), CPU) == []


def test_a_training_says_what_replaces_missing_parts(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "substitutes", lambda config, device: ["the kernels are missing"])
    run = train(tiny(data__path=str(store), train__steps=2), tmp_path / "run")
    assert "lsep: warning: the kernels are missing" in capsys.readouterr().out
    program = run.results()["program"]
    assert program["optimizer"] == "torch" and program["kernels"] == "reference" and program["graphs"] is False


@pytest.mark.parametrize(("capability", "attention"), [((9, 0), "triton"), ((10, 0), "triton"), ((8, 0), "sdpa")])
def test_a_card_that_is_not_here(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], attention: str) -> None:
    """Its implementations are known by name, whatever this machine has: Triton, csrc and cuDNN are taken as given."""

    def asked(*args: object) -> None:
        raise AssertionError("asked this machine")

    monkeypatch.setattr(torch.cuda, "get_device_capability", asked)
    monkeypatch.setattr(backends.adamw_ema, "why_missing", asked)
    monkeypatch.setattr("importlib.util.find_spec", asked)
    base = resolve(tiny(train__precision="bf16", model__hidden_size=128), MANIFEST)
    found = backends.decide(base, Card(capability))
    assert found == backends.Choice("triton", attention, "triton", "csrc", True, True, "block", True)
    assert not backends.decide(base, Card(capability), processes=2).graphs
    two = replace(base, optim=replace(base.optim, accumulate=2))
    assert not backends.decide(two, Card(capability)).bf16_weights
    with pytest.raises(UserError, match=r"compute capability 7\.5, expected 8\.0"):
        backends.decide(replace(base, backend=replace(base.backend, kernels="triton")), Card((7, 5)))


FP8 = {"train__fp8": True, "train__precision": "bf16", "backend__kernels": "triton"}


@pytest.mark.parametrize(
    ("changes", "capability", "message"),
    [
        ({"train__precision": "fp32"}, (9, 0), "--train.precision is 'fp32', expected 'bf16'"),
        ({"backend__kernels": "reference"}, (9, 0), "kernels is 'reference', expected 'triton', which writes the"),
        ({"model__hidden_size": 24}, (9, 0), "model.hidden_size is 24, expected a multiple of 16"),
        ({"model__mlp_ratio": 2.25}, (9, 0), "the MLP's hidden width is 72, expected a multiple of 16"),
        ({}, (8, 0), "compute capability 8.0, expected 8.9, 9.x or 10.x"),
        ({}, (12, 0), "compute capability 12.0, expected 8.9, 9.x or 10.x"),
    ],
)
def test_fp8_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, changes: dict, capability: tuple[int, int], message: str
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    config = resolve(tiny(**FP8 | {"backend__attention": "sdpa", "backend__optimizer": "torch"} | changes), MANIFEST)
    with pytest.raises(UserError, match=re.escape(f"--train.fp8 is True, but {message}")):
        backends.choose(config, torch.device("cuda"))


def test_fp8_replaces_the_products_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from lsep_kernels import fp8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    common = FP8 | {"backend__attention": "sdpa", "backend__optimizer": "torch"}
    chosen = backends.choose(resolve(tiny(**common), MANIFEST), torch.device("cuda")).ops
    assert (chosen.linear, chosen.mlp) == (fp8.linear, fp8.mlp)
    plain = backends.choose(resolve(tiny(**common | {"train__fp8": False}), MANIFEST), torch.device("cuda")).ops
    changed = {f.name for f in fields(ops.Ops) if getattr(chosen, f.name) != getattr(plain, f.name)}
    assert changed == {"norm_modulate", "gate_residual_norm_modulate", "linear", "mlp", "mlp_by"}


APEX = """
import torch
class FusedAdam(torch.optim.AdamW):  # NVIDIA's signatures
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        assert adam_w_mode
    def zero_grad(self):
        raise AssertionError("without set_to_none")
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None and "step" not in self.state[p]:
                    moments = {k: v for k, v in self.state[p].items()} or {
                        k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.tensor(group["step"] - 1.0), **moments}
        super().step()
        for state in self.state.values():
            del state["step"]
"""


def test_apex_of_the_package_index_is_not_nvidias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    (tmp_path / "apex.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    problem = str(backends.missing_optimizer("apex", gpu))
    assert "apex.optimizers is" in problem and "git clone https://github.com/NVIDIA/apex" in problem
    (tmp_path / "apex.py").write_text("raise RuntimeError('needs python 2')")
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert "cannot be imported (RuntimeError: needs python 2)" in str(backends.missing_optimizer("apex", gpu))


def test_apex_trains_resumes_and_survives_a_bad_step(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a stand-in with the signatures of NVIDIA's FusedAdam, which counts its steps by group."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "apex" / "optimizers.py").write_text(APEX)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(backends, "missing_optimizer", lambda name, device: None)
    curves, states = {}, {}
    for by in ("torch", "apex"):
        state = states[by] = setup(tiny(data__path=str(store), backend__optimizer=by))
        curves[by] = [train_step(state, i, b) for i, b in enumerate(open_loader(state, 0, 4))]
    for a, b in zip(curves["torch"], curves["apex"], strict=True):
        assert relative_error(b, a) < 1e-5
    written = states["apex"].optimizer.tensors()
    assert written.keys() == states["torch"].optimizer.tensors().keys()
    states["torch"].optimizer.load(written)
    states["apex"].optimizer.load(written)
    (batch,) = next(iter(open_loader(states["apex"], 4, 5)))
    bad = batch._replace(x=torch.full_like(batch.x, torch.nan))
    assert train_step(states["apex"], 4, [bad])[-1] == 1
    assert all(p.isfinite().all() for p in states["apex"].objective.parameters())


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows at a time: the interpreter's time goes by operations, not by elements."""
    pytest.importorskip("triton")
    from lsep_kernels import adaln

    if DEVICE.type == "cpu":
        monkeypatch.setitem(adaln.FORWARD, "ROWS", 16)
        monkeypatch.setitem(adaln.BACKWARD, "ROWS", 16)


@pytest.mark.usefixtures("few_programs")
def test_trainer_over_triton_has_the_reference_s_loss_curve(store: Path) -> None:
    """Every statistic of every step, over kernels, attention and the fused optimizer: within 1e-4."""
    common = {"data__path": str(store), "train__device": DEVICE.type, "train__precision": "fp32", "model__depth": 2,
              "probe__depth": 1, "train__steps": 3}  # fmt: skip
    reference = {"backend__kernels": "reference", "backend__attention": "reference", "backend__optimizer": "torch"}
    triton = {"backend__kernels": "triton", "backend__attention": "triton" if DEVICE.type == "cpu" else "sdpa",
              "backend__optimizer": "csrc"}  # fmt: skip
    curves = []
    for backend in (reference, triton):
        state = setup(tiny(**common, **backend))
        lively(state.objective)
        curves.append([train_step(state, i, batches).cpu() for i, batches in enumerate(open_loader(state, 0, 3))])
    for expected, found in zip(*curves, strict=True):
        assert expected[:3].all() and relative_error(found[:3] / expected[:3], torch.ones(3)) < 1e-4
        assert torch.equal(found[3:], expected[3:])  # hits and counts


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("extra_fraction", [None, 0.0])
def test_the_objective_over_triton_is_one_graph(extra_fraction: float | None) -> None:
    config = resolve(tiny(model__depth=2, probe__depth=1, probe__extra_fraction=extra_fraction), MANIFEST)
    chosen = ops.choose("triton", "triton" if DEVICE.type == "cpu" else "sdpa", DEVICE, torch.float32, 16, 16)
    objective = lively(Objective(config, MANIFEST, chosen)).to(DEVICE)
    batch = type(b := random_batch(10))(*(part.to(DEVICE) for part in b.tensors()))
    step, epoch = (torch.tensor(i, device=DEVICE) for i in (3, 0))
    compiled = torch.compile(objective, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    gradients = []
    for forward in (objective, compiled):
        objective.zero_grad()
        losses = forward(batch, branch_plan(config), step, epoch)
        losses.total.backward()
        gradients.append([losses.total, *(p.grad for p in objective.parameters())])
    for expected, found in zip(*gradients, strict=True):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_draws_what_an_eager_one_does(store: Path) -> None:
    """Losses, gradient norm and hits of five steps over two epochs, by the code that torch.compile makes here."""
    curves = []
    for what in ("off", "model"):
        state = setup(
            tiny(data__path=str(store), train__device=DEVICE.type, train__precision="fp32", train__compile=what)
        )
        curves.append(torch.stack([train_step(state, i, b).cpu() for i, b in enumerate(open_loader(state, 0, 5))]))
    expected, found = curves
    assert relative_error(found[:, :3] / expected[:, :3], torch.ones(5, 3)) < 1e-5
    assert torch.equal(found[:, 3:-2], expected[:, 3:-2])  # hits and counts
