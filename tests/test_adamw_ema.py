"""The fused optimizer step: against torch and float64, the skip, missing gradients, and what a GPU adds."""

import copy
import functools
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from test_train import NoHostReads, refuse
from torch import Tensor

from lsep_kernels import adamw_ema as fused
from lsep_kernels import reference

CSRC = Path(__file__).parent.parent / "csrc"
SHAPES = [(1,), (3,), (1025,), (17, 33), (128, 130)]  # the last one is larger than a chunk, and not a multiple of one
GROUP = [0, 1, 0, 1, 0]
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": [0.1, 0.0], "max_norm": 1.0}
RATES = (3e-3, 1e-2)

needs_host = pytest.mark.skipif(fused.host_library() is None, reason=str(fused.why_missing("cpu")))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
IMPLEMENTATIONS = [pytest.param("fused", marks=needs_host), "reference"]


def random_like(shapes: list[tuple[int, ...]], seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) * scale for s in shapes]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of a norm near 1.3 in even steps, which is clipped, and 0.4 in odd ones."""
    scale = (1.3 if step % 2 == 0 else 0.4) / math.sqrt(sum(math.prod(s) for s in SHAPES))
    return [g.to(dtype) for g in random_like(SHAPES, 1000 + step, scale)]


class Problem:
    """Tensors of SHAPES with `decays` averages, stepped by the operator or by the reference."""

    def __init__(
        self,
        kind: str = "fused",
        decays: tuple[float, ...] = (0.95,),
        weights: torch.dtype | None = None,
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        self.params = [p.to(device) for p in random_like(SHAPES, 0)]
        self.m, self.v = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.emas = [[p + k for p in self.params] for k in range(len(decays))]
        self.weights = None if weights is None else [torch.zeros_like(p, dtype=weights) for p in self.params]
        self.lr = torch.tensor(RATES, device=device)
        self.kind, self.settings = kind, SETTINGS | settings | {"ema_decays": list(decays)}
        self.step_count, self.skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        if kind == "fused":
            lists = self.params, self.m, self.v, self.emas, self.weights, GROUP
            self.optimizer = fused.AdamwEma(*lists, **self.settings)
            self.step_count, self.skipped = self.optimizer.step_count, self.optimizer.skipped

    def step(self, grads: list[Tensor] | list[Tensor | None]) -> Tensor:
        if self.kind == "fused":
            return self.optimizer.step(grads, self.lr)
        lists = self.params, self.m, self.v, self.emas, self.weights, list(grads)
        counts = self.step_count, self.skipped
        return reference.adamw_ema(*lists, self.lr, *counts, group=GROUP, **self.settings)

    def tensors(self) -> list[Tensor]:
        return [*self.params, *self.m, *self.v, *(e for ema in self.emas for e in ema), *(self.weights or [])]

    def state(self) -> list[Tensor]:
        return [t.detach().clone() for t in (*self.tensors(), self.step_count, self.skipped)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(
        torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def assert_close(a: Problem, b: Problem, tolerance: float = 1e-6) -> None:
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        assert relative_error(x, y) < (tolerance if x.dtype == torch.float32 else 2**-7)
    assert (int(a.step_count), int(a.skipped)) == (int(b.step_count), int(b.skipped))


class Torch:
    """torch.optim.AdamW in its plain loop, clip_grad_norm_ and lerp, in `dtype`."""

    def __init__(self, dtype: torch.dtype, decays: tuple[float, ...] = (0.95,)) -> None:
        self.params = [torch.nn.Parameter(p.to(dtype)) for p in random_like(SHAPES, 0)]
        self.decays, self.emas = decays, [[p.detach() + k for p in self.params] for k in range(len(decays))]
        groups = [
            {"params": [p for p, g in zip(self.params, GROUP, strict=True) if g == k], "lr": lr, "weight_decay": wd}
            for k, (lr, wd) in enumerate(zip(RATES, SETTINGS["weight_decay"], strict=True))
        ]
        betas, eps = SETTINGS["betas"], SETTINGS["eps"]
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, foreach=False, fused=False)

    def step(self, grads: list[Tensor]) -> Tensor:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.to(p.dtype).clone()
        norm = torch.nn.utils.clip_grad_norm_(self.params, SETTINGS["max_norm"])
        self.optimizer.step()
        for ema, decay in zip(self.emas, self.decays, strict=True):
            for e, p in zip(ema, self.params, strict=True):
                e.lerp_(p.detach(), 1 - decay)
        return norm


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype, steps", [(torch.float64, 100), (torch.float32, 30)])
def test_steps_are_torchs(kind: str, dtype: torch.dtype, steps: int) -> None:
    """The rounding of torch's 1 - lr * weight_decay adds up: 100 steps in float32 are 1.6e-6 from those in float64."""
    got, truth, clipped = Problem(kind), Torch(dtype), 0
    for group, rate in zip(truth.optimizer.param_groups, got.lr.tolist(), strict=True):
        group["lr"] = rate  # as float32 has it
    for step in range(steps):
        norm, expected = got.step(gradients(step)), truth.step(gradients(step))
        assert relative_error(norm, expected) < 1e-6
        clipped += int(expected > SETTINGS["max_norm"])
    assert clipped == steps // 2
    state = [truth.optimizer.state[p] for p in truth.params]
    for name, ours, theirs in (
        ("params", got.params, truth.params),
        ("exp_avg", got.m, [s["exp_avg"] for s in state]),
        ("exp_avg_sq", got.v, [s["exp_avg_sq"] for s in state]),
        ("ema", got.emas[0], truth.emas[0]),
    ):
        for x, y in zip(ours, theirs, strict=True):
            assert relative_error(x, y) < 1e-6, name
    assert (int(got.step_count), int(got.skipped)) == (steps, 0)


VARIANTS = [
    ((), None, torch.float32),
    ((0.9,), torch.bfloat16, torch.float32),
    ((0.9, 0.3), torch.float32, torch.float32),
    ((), torch.float32, torch.bfloat16),
    ((0.999,), None, torch.bfloat16),
    ((0.0, 0.9999), torch.bfloat16, torch.bfloat16),
]


@needs_host
@pytest.mark.parametrize("decays, weights, dtype", VARIANTS)
def test_fused_is_the_reference(decays: tuple[float, ...], weights: torch.dtype | None, dtype: torch.dtype) -> None:
    got, truth = (Problem(kind, decays, weights) for kind in ("fused", "reference"))
    for step in range(10):
        grads = gradients(step, dtype)
        assert relative_error(got.step(grads), truth.step(grads)) < 1e-6
    assert_close(got, truth)
    if got.weights is not None:
        assert same(got.weights, [p.to(weights) for p in got.params])  # rounded exactly as torch does
    if decays and decays[0] == 0:
        assert same(got.emas[0], got.params)


@needs_host
def test_every_float32_becomes_torchs_bfloat16() -> None:
    """Halves, largest numbers, infinities and not-a-number, through a step that changes nothing else."""
    bits = torch.cat([torch.arange(1 << 16) << 16 | low for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    p = bits.to(torch.int32).view(torch.float32)
    p, nothing = torch.cat([p, -p]), torch.zeros(len(p) * 2)
    out = torch.zeros(len(p), dtype=torch.bfloat16)
    settings = SETTINGS | {"weight_decay": [0.0]}
    optimizer = fused.AdamwEma([p], [nothing], [nothing], [], [out], [0], ema_decays=[], **settings)
    optimizer.step([None], torch.ones(1))
    finite = ~p.isnan()
    assert same([out[finite]], [p.to(torch.bfloat16)[finite]])
    assert bool(out[~finite].isnan().all())


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e30])
def test_step_that_is_not_finite_changes_nothing(kind: str, bad: float) -> None:
    """The square of 1e30 is infinite in float32, where squares are summed."""
    got, clean = (Problem(kind, (0.9, 0.99), torch.bfloat16) for _ in range(2))
    got.step(gradients(0))
    before = got.state()
    broken = gradients(1)
    broken[3][5, 7] = bad
    assert not math.isfinite(float(got.step(broken)))
    assert same(got.state()[:-1], before[:-1])
    assert (int(got.step_count), int(got.skipped)) == (1, 1)
    got.step(gradients(2))
    clean.step(gradients(0))
    clean.step(gradients(2))
    assert same(got.state()[:-1], clean.state()[:-1])


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_first_step_may_be_left_out(kind: str) -> None:
    got = Problem(kind)
    before = got.state()
    got.step([torch.full_like(g, math.nan) for g in gradients(0)])
    assert same(got.state()[:-1], before[:-1])


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_tensor_without_gradient_stays_and_is_averaged(kind: str) -> None:
    got = Problem(kind, (0.5,), torch.float32)
    grads: list[Tensor | None] = [*gradients(1)]
    present = [g for i, g in enumerate(grads) if g is not None and i not in (1, 4)]
    grads[1] = grads[4] = None
    before = copy.deepcopy(got.tensors())
    norm = got.step(grads)
    assert relative_error(norm, torch.cat([g.flatten() for g in present]).norm()) < 1e-6
    n = len(SHAPES)
    for i in range(n):
        stays = i in (1, 4)
        for k in (0, 1, 2):  # params and moments
            assert torch.equal(got.tensors()[k * n + i], before[k * n + i]) == stays
        assert relative_error(got.emas[0][i], (before[3 * n + i] + got.params[i]) / 2) < 1e-6
        assert got.weights is not None and torch.equal(got.weights[i], got.params[i])
    assert float(got.step([None] * n)) == 0
    assert int(got.step_count) == 2


@needs_host
def test_unaligned_views_and_strided_gradients() -> None:
    """Tensors that start anywhere in a buffer, and gradients of another memory order."""
    plain = Problem("fused", weights=torch.bfloat16)
    views = Problem("fused", weights=torch.bfloat16)

    def shift(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors]

    views.params, views.m, views.v = shift(views.params), shift(views.m), shift(views.v)
    assert views.weights is not None
    views.emas, views.weights = [shift(e) for e in views.emas], shift(views.weights)
    lists = views.params, views.m, views.v, views.emas, views.weights, GROUP
    views.optimizer = fused.AdamwEma(*lists, **views.settings)
    for step in range(3):
        grads = gradients(step)
        plain.step(grads)
        views.step([g.T.contiguous().T if g.ndim > 1 else g for g in grads])
    assert same(plain.tensors(), views.tensors())


@needs_host
def test_runs_repeat_resume_and_follow_moved_tensors() -> None:
    runs = [Problem() for _ in range(3)]
    for step in range(6):
        for run in runs:
            run.step(gradients(step))
        if step == 2:  # a resumed run: the state of the second, in a new object
            resumed = Problem()
            for new, old in zip(resumed.tensors(), runs[1].tensors(), strict=True):
                new.copy_(old)
            resumed.step_count.fill_(int(runs[1].step_count))
            runs[1] = resumed
            for p in runs[2].params:  # storage of its own, as load_state_dict(assign=True) or .to() may give
                p.data = p.data.clone()
    assert same(runs[0].state(), runs[1].state())
    assert same(runs[0].state(), runs[2].state())


def arguments(problem: Problem, grads: list[Tensor]) -> tuple[Any, ...]:
    return (
        problem.params, problem.m, problem.v, problem.emas[0], problem.weights or [], grads, problem.lr,
        problem.step_count, problem.skipped, GROUP, 0.9, 0.99, 1e-8, [0.1, 0.0], 1.0, [0.95],
    )  # fmt: skip


@needs_host
@pytest.mark.parametrize("weights", [None, torch.bfloat16])
def test_opcheck(weights: torch.dtype | None) -> None:
    torch.library.opcheck(fused.adamw_ema, arguments(Problem(weights=weights), gradients(0)))


@needs_host
def test_inside_a_compiled_graph() -> None:
    """Compilers may hand the operator copies of the tensors; the result is that of the originals."""
    eager, compiled = Problem(weights=torch.bfloat16), Problem(weights=torch.bfloat16)
    step = torch.compile(compiled.optimizer.step, backend="aot_eager", fullgraph=True)
    for k in range(3):
        assert torch.equal(eager.step(gradients(k)), step(gradients(k), compiled.lr))
    assert same(eager.state(), compiled.state())


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_step_reads_nothing_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, grads = Problem(kind, (0.9, 0.99), torch.bfloat16), gradients(0)
    for name in ("tolist", "numpy", "cpu", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with NoHostReads():
        problem.step(grads)


def rebuilt(**changes: Any) -> fused.AdamwEma:
    p = Problem("reference", (0.9,), torch.bfloat16)
    lists: dict[str, Any] = {
        "params": p.params, "exp_avg": p.m, "exp_avg_sq": p.v, "emas": p.emas, "weights": p.weights, "group": GROUP,
    }  # fmt: skip
    return fused.AdamwEma(**(lists | p.settings | changes))


BAD = {
    "params has 0 tensors, expected 1 to 3072": {
        "params": [], "exp_avg": [], "exp_avg_sq": [], "emas": [[]], "weights": [], "group": [],
    },
    "params has 3073 tensors": {"params": [torch.zeros(1)] * 3073, "emas": [], "ema_decays": [], "weights": None,
                                "group": [0] * 3073},
    "params is on meta": {"params": [torch.zeros(s, device="meta") for s in SHAPES]},
    "params[0] is torch.float64, expected float32": {"params": [torch.zeros(s, dtype=torch.float64) for s in SHAPES]},
    "exp_avg has 1 tensors, expected 5": {"exp_avg": [torch.zeros(1)]},
    "exp_avg_sq[3] has shape (33, 17), expected (17, 33)": {
        "exp_avg_sq": [torch.zeros(s[::-1]) for s in SHAPES],
    },
    "exp_avg[3] is not contiguous": {"exp_avg": [torch.zeros(s[::-1]).T if len(s) > 1 else torch.zeros(s)
                                                 for s in SHAPES]},
    "emas has 3 lists": {"emas": [random_like(SHAPES, 0) for _ in range(3)], "ema_decays": [0.9, 0.9, 0.9]},
    "emas has 1 lists and ema_decays 2 numbers": {"ema_decays": [0.9, 0.9]},
    "emas[0] has 4 tensors": {"emas": [random_like(SHAPES[:4], 0)]},
    "weights has 0 tensors, expected 5": {"weights": []},
    "weights[0] is torch.float16": {"weights": [torch.zeros(s, dtype=torch.float16) for s in SHAPES]},
    "weights[0] is on meta, expected cpu": {"weights": [torch.zeros(s, device="meta") for s in SHAPES]},
    "group has 1 entries": {"group": [0]},
    "group has entries from 0 to 2, expected 0 to 1": {"group": [0, 1, 2, 0, 0]},
    "weight_decay has 17 groups, expected 1 to 16": {"weight_decay": [0.0] * 17},
    "beta2 is 1.0": {"betas": (0.9, 1.0)},
    "ema_decays[0] is -0.1": {"ema_decays": [-0.1]},
    "eps is nan": {"eps": math.nan},
    "max_norm 0": {"max_norm": 0},
}  # fmt: skip


@needs_host
@pytest.mark.parametrize("message", BAD)
def test_bad_tensors_and_settings(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rebuilt(**BAD[message])


@needs_host
def test_bad_arguments_of_a_step() -> None:
    problem = Problem()
    before = problem.state()
    good = gradients(0)
    for message, grads, lr in (
        ("grads has 4 entries, expected 5", good[:4], problem.lr),
        ("grads[2] has shape (1024,)", [*good[:2], torch.zeros(1024), *good[3:]], problem.lr),
        ("grads[0] is torch.float16", gradients(0, torch.float16), problem.lr),
        ("grads[4] is torch.bfloat16", [*good[:4], good[4].bfloat16()], problem.lr),
        ("lr is torch.float64", good, problem.lr.double()),
        ("lr is torch.float32 of shape (1,)", good, problem.lr[:1]),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            problem.optimizer.step(grads, lr)
    assert same(problem.state(), before)


def test_missing_and_foreign_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a copied-out folder, with a file of other sources, and with one that is no library."""
    monkeypatch.setattr(fused, "__file__", str(tmp_path / "adamw_ema.py"))
    monkeypatch.setattr(fused, "_load", functools.cache(fused._load.__wrapped__))
    assert fused.host_library() is None and fused.cuda_library() is None
    assert "is not built" in str(fused.why_missing("cpu")) and "nvcc" in str(fused.why_missing())
    with pytest.raises(RuntimeError, match="a C\\+\\+17 compiler"):
        Problem()
    fused._load.cache_clear()
    (tmp_path / "_adamw_ema_cuda.so").write_bytes(b"text")
    assert "cannot be loaded" in str(fused.why_missing())
    fused._load.cache_clear()
    monkeypatch.setenv("LSEP_CUDA_LIBRARY", str(tmp_path / "mine.so"))
    assert "mine.so cannot be loaded" in str(fused.why_missing()) and "unset LSEP_CUDA_LIBRARY" in str(
        fused.why_missing()
    )
    if shutil.which("cc"):
        source = tmp_path / "other.c"
        source.write_text("void lsep_adamw_ema_layout(long long *out) { out[0] = 1; }")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "_adamw_ema_host.so", source], check=True)
        assert "was built from other sources" in str(fused.why_missing("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    command = "nvcc -std=c++17 -O3 --fmad=false -gencode arch=compute_90,code=sm_90 -Xptxas -v -cubin".split()
    done = subprocess.run(
        [*command, "-o", tmp_path / "out.cubin", CSRC / "adamw_ema.cu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills == [("0", "0")] * 20  # two norm passes, 18 update passes


@needs_cuda
class TestCuda:
    """These need a GPU and the library: without the library on a machine with a GPU they fail, and rightly."""

    @pytest.mark.parametrize("decays, weights, dtype", VARIANTS)
    def test_values(self, decays: tuple[float, ...], weights: torch.dtype | None, dtype: torch.dtype) -> None:
        got, truth = (Problem(kind, decays, weights, "cuda") for kind in ("fused", "reference"))
        for step in range(20):
            grads: list[Tensor | None] = [g.cuda() for g in gradients(step, dtype)]
            if step % 3 == 1:
                grads[3] = None
            if step == 5:
                grads[2] = torch.full_like(got.params[2], math.nan, dtype=dtype)
            norms = got.step(grads), truth.step(grads)
            assert step == 5 or relative_error(*norms) < 1e-6
        assert_close(got, truth)

    @needs_host
    def test_bits_are_the_cpus(self) -> None:
        """Without clipping the norm's rounding does not enter, and the rule is compiled without contraction."""
        runs = [Problem("fused", (0.9, 0.999), torch.bfloat16, device, max_norm=math.inf) for device in ("cpu", "cuda")]
        for step in range(20):
            for run in runs:
                run.step([g.to(run.lr.device) for g in gradients(step)])
        assert same(runs[0].state(), [t.cpu() for t in runs[1].state()])

    def test_twenty_runs_are_the_same(self) -> None:
        states = []
        for _ in range(20):
            run = Problem("fused", device="cuda")
            for step in range(3):
                run.step([g.cuda() for g in gradients(step)])
            states.append(run.state())
        assert all(same(states[0], s) for s in states)

    def test_many_chunks(self) -> None:
        """More chunks than the last block has threads, and a norm whose partial sums are all needed."""
        p = torch.zeros(300 * fused.CHUNK + 5, device="cuda")
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        optimizer = fused.AdamwEma([p], [m], [v], [], None, [0], ema_decays=[], **SETTINGS | {"weight_decay": [0.0]})
        for _ in range(3):
            grad = torch.randn_like(p)
            norm = optimizer.step([grad], torch.ones(1, device="cuda"))
            assert relative_error(norm, grad.double().norm()) < 1e-6

    def test_graph_replays_are_steps(self) -> None:
        eager, graphed = (Problem("fused", (0.9,), torch.bfloat16, "cuda") for _ in range(2))
        static = [g.cuda() for g in gradients(0)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            norm = graphed.step(static)
        for step in range(6):
            new = [g.cuda() for g in gradients(step)]
            if step == 3:
                new[0].fill_(math.inf)
            rate = torch.tensor(RATES) * (1 + step)
            for run in (eager, graphed):
                run.lr.copy_(rate)
            for s, g in zip(static, new, strict=True):
                s.copy_(g)
            graph.replay()
            assert torch.equal(norm, eager.step(new))
        assert same(eager.state(), graphed.state())
        assert (int(graphed.step_count), int(graphed.skipped)) == (5, 1)
