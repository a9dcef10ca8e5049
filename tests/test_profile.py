"""`lsep profile` from end to end on a CPU, what a GPU's trace becomes, and ranges that change nothing."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MANIFEST, TINY, lively, random_batch, tiny
from torch._dynamo.testing import CompileCounter

from lsep import cli, profile, ranges, trace
from lsep.checks import resolve
from lsep.config import override
from lsep.cost import floors
from lsep.cost.flops import step_parts, total
from lsep.cost.operations import Operation
from lsep.data import loader
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.plan import branch_plan
from lsep.presets import PRESETS
from lsep.step import open_loader, setup, train_step

CPU = torch.device("cpu")
QUICK = ("profile", "quickstart", "--train.batch-size", "16", "--train.device", "cpu", "--steps", "2", "--warmup", "1")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a profile of the quickstart, what it printed beside it."""
    out = tmp_path_factory.mktemp("profile")
    patch = pytest.MonkeyPatch()
    printed: list[str] = []
    patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(" ".join(map(str, args))))
    try:
        assert cli.main([*QUICK, "--out", str(out)]) == 0
    finally:
        patch.undo()
    (out / "printed").write_text("\n".join(printed))
    return out


def test_trace_has_every_range(profiled: Path) -> None:
    events = json.loads((profiled / "trace.json").read_text())["traceEvents"]
    found = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    counts = {name: found.count(name) for name in found}
    steps, blocks = 2, PRESETS["quickstart"].model.depth
    once = {"data", "interpolant", "losses", "forward", "backward", "optimizer", "embedding", "final layer"}
    once |= {f"block {i + 1}" for i in range(blocks)}
    assert {name: counts.get(name) for name in once} == dict.fromkeys(once, steps)
    assert counts["attention"] == steps * blocks
    assert counts["MLP"] == steps * (blocks + 1)  # the probed block has its rows in two parts
    assert {"window", "step 1", "step 2", "adaLN", "probe"} <= counts.keys()
    assert counts["window"] == 1


def test_times_add_up_to_the_window(profiled: Path) -> None:
    found = trace.read(profiled / "trace.json")
    assert sum(item.us for item in found.items) == pytest.approx(found.us, rel=1e-3)
    assert all(item.us >= -0.01 for item in found.items)
    rooms = {item.room for item in found.items}
    assert rooms == set(trace.ROOMS) - {"compiled", "idle", "align"}
    table = (profiled / "profile.md").read_text()
    shares = [float(s) for s in re.findall(r"\| \*\*(?!step)\w+\*\* \| [\d.]+ \| ([\d.]+)% \|", table)]
    assert len(shares) == len(rooms) and sum(shares) == pytest.approx(100, abs=0.5)
    assert table in (profiled / "printed").read_text()


def test_backward_is_in_the_room_of_its_forward(profiled: Path) -> None:
    """Of each block: qkv and proj, fc1 and fc2, each with two products backward."""
    found = trace.read(profiled / "trace.json")
    steps, blocks = 2, PRESETS["quickstart"].model.depth

    def calls(room: str, name: str) -> int:
        return sum(i.calls for i in found.room(room) if i.name == name)

    assert calls("attention", "aten::mm") == steps * blocks * 4
    assert calls("MLP", "aten::mm") == steps * blocks * 4
    assert calls("MLP", "aten::gelu_backward") == steps * blocks
    assert calls("probe", "aten::gelu_backward") == steps
    assert calls("optimizer", "aten::_fused_adamw_") == steps * 2


def test_printed_commands_parse(profiled: Path) -> None:
    lines = (profiled / "printed").read_text().splitlines()
    nsys, ncu = (next(shlex.split(line) for line in lines if line.startswith(f"{tool} ")) for tool in profile.TOOLS)
    assert {"--capture-range=cudaProfilerApi", "--capture-range-end=stop"} <= set(nsys)
    assert ncu[ncu.index("--profile-from-start") + 1] == "off" and "--nvtx" in ncu
    for command in (nsys, ncu):
        start = command.index("profile", 2) - 2
        assert command[start : start + 4] == ["-m", "lsep", "profile", "quickstart"]
        assert command[-1] == "--no-trace" and str(profiled) in command
    assert nsys[nsys.index("--steps") + 1] == "2"
    assert ncu.count("--steps") == 1 and ncu[ncu.index("--steps") + 1] == "1"


def test_command_of_a_run_does_not_run_itself_again() -> None:
    argv = ["quickstart", "--run=nsys", "--steps=4", "--no-trace", "--out", "my runs"]
    command = profile.command_line("nsys", argv, Path("my runs"))
    assert command[command.index("lsep") :] == [
        "lsep", "profile", "quickstart", "--steps=4", "--out", "my runs", "--no-trace",
    ]  # fmt: skip
    assert "--run" not in " ".join(profile.command_line("ncu", ["quickstart", "--run", "ncu"], Path("o")))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--run", "nsys"], "nsys is not on the PATH, it comes with Nsight Systems, https://developer.nvidia.com/"),
        (["--run", "ncu"], "ncu is not on the PATH, it comes with Nsight Compute, https://developer.nvidia.com/"),
        (["--steps", "0"], "--steps is 0, expected at least 1"),
        (["--warmup", "-1"], "--warmup is -1, expected at least 0"),
        (["--train.device", "cpu", "--no-trace"], "--no-trace marks a window for nsys or ncu, which needs a GPU"),
        (["--probe.depth", "9"], "--probe.depth is 9"),
        (["--out", "run"], "--out run is a run directory"),
    ],
)
def test_bad_input_is_one_sentence(
    args: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["profile", "quickstart", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lsep: error: ") and err.count("\n") == 1 and message in err
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["run", "run/config.json"]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An `nsys` that writes its arguments to a file and fails with 3 where that file exists."""
    script = tmp_path / "bin" / "nsys"
    script.parent.mkdir()
    seen = tmp_path / "seen"
    script.write_text(f'#!/bin/sh\n[ -e "{seen}" ] && exit 3\nprintf "%s\\n" "$@" > "{seen}"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    yield seen


def test_run_starts_the_tool(tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv, out = ["quickstart", "--run", "nsys"], tmp_path / "out"
    quickstart = PRESETS["quickstart"]
    with pytest.raises(UserError, match="--run nsys needs a GPU"):
        profile.run_tool("nsys", override(quickstart, {"train.device": "cpu"}), argv, out)
    monkeypatch.setattr(profile, "pick_device", lambda wanted: torch.device("cuda"))
    profile.run_tool("nsys", quickstart, argv, out)
    assert ["nsys", *tool.read_text().splitlines()] == profile.command_line("nsys", argv, out)
    with pytest.raises(UserError, match="--run nsys: it ended with exit code 3"):
        profile.run_tool("nsys", quickstart, argv, out)


def test_window_for_a_tool(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start and stop of the capture lie around the steps after the warm-up, and nothing else."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(profile, "train_step", lambda state, step, batches: calls.append(f"step {step}"))
    state = setup(tiny(data__path=str(store)))
    assert profile._steps(state, 2, 3, profile._cuda_window()) > 0
    assert calls == ["step 0", "step 1", "step 2", "start", "step 3", "step 4", "stop"]


@pytest.mark.parametrize("changes", [{}, {"probe__branch": "paper"}, {"probe__enabled": False}])
def test_ranges_change_no_bit(store: Path, changes: dict[str, Any]) -> None:
    def statistics(recorded: bool) -> list[torch.Tensor]:
        state = setup(tiny(data__path=str(store), **changes))
        steps = enumerate(open_loader(state, 0, 3))
        if not recorded:
            return [train_step(state, i, batches).detach() for i, batches in steps]
        with ranges.recording(CPU), torch.autograd.set_multithreading_enabled(False), torch.profiler.profile():
            return [train_step(state, i, batches).detach() for i, batches in steps]

    plain, recorded = statistics(False), statistics(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_a_graph_neither_has_nor_sees_ranges() -> None:
    config = resolve(override(TINY, {"model.depth": 2}), MANIFEST)
    objective = lively(Objective(config, MANIFEST))
    counter = CompileCounter()
    compiled = torch.compile(objective, fullgraph=True, dynamic=False, backend=counter)
    step = epoch = torch.zeros((), dtype=torch.int64)
    plain = compiled(random_batch(10), branch_plan(config), step, epoch)
    with ranges.recording(CPU):
        recorded = compiled(random_batch(10), branch_plan(config), step, epoch)
    assert counter.frame_count == 1  # not compiled again for the profiler
    assert torch.equal(plain.total, recorded.total)


def test_spans_are_one_object_that_does_nothing() -> None:
    assert ranges.span("block", 3) is ranges.span("attention")
    with ranges.recording(CPU):
        assert ranges.span("block", 3) is not ranges.span("attention")
    assert ranges.span("block", 3) is ranges.span("attention")


def _gpu_trace() -> list[dict[str, Any]]:
    """A step of a GPU by hand, microseconds: kernels run after their launches, two at once from 70 to 80."""
    host = [
        ("user_annotation", "window", 0, 100, {}),
        ("user_annotation", "attention", 1, 9, {}),
        ("cpu_op", "aten::addmm", 2, 7, {"Sequence number": 5}),
        ("cuda_runtime", "cudaLaunchKernel", 3, 1, {"correlation": 1}),
        ("user_annotation", "backward", 20, 20, {}),
        ("cpu_op", "autograd::engine::evaluate_function: AddmmBackward0", 21, 10, {"Sequence number": 5}),
        ("cuda_driver", "cuLaunchKernelEx", 22, 1, {"correlation": 2}),
        ("cuda_runtime", "cudaGraphLaunch", 41, 1, {"correlation": 3}),
        ("cpu_op", "## Call CompiledFxGraph abc ##", 43, 7, {}),
        ("cuda_runtime", "cudaLaunchKernel", 44, 1, {"correlation": 4}),
        ("cuda_runtime", "cudaLaunchKernel", 45, 1, {"correlation": 5}),
    ]
    device = [
        ("kernel", "nvjet_a", 10, 20, {"correlation": 1}),
        ("kernel", "nvjet_b", 30, 10, {"correlation": 2}),
        ("kernel", "_adaln_forward_kernel", 50, 10, {"correlation": 3}),
        ("kernel", "nvjet_c", 60, 20, {"correlation": 3}),
        ("kernel", "some_new_kernel", 80, 5, {"correlation": 4}),
        ("kernel", "_attention_forward_kernel", 85, 5, {"correlation": 5}),
        ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 70, 10, {"correlation": 9}),
        ("gpu_user_annotation", "attention", 10, 20, {}),
    ]
    return [
        {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": pid, "tid": pid, "args": args}
        for pid, events in ((1, host), (0, device))
        for cat, name, ts, dur, args in events
    ]


def test_kernels_of_a_gpu_by_room(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": _gpu_trace()}))
    found = trace.read(tmp_path / "t.json")
    assert found.us == 100
    assert {(i.room, i.name): i.us for i in found.items} == {
        ("attention", "nvjet_a"): 20,
        ("attention", "nvjet_b"): 10,
        ("adaLN", "_adaln_forward_kernel"): 10,
        ("compiled", "nvjet_c"): 15,  # alone from 60 to 70, half of what follows
        ("data", "Memcpy HtoD (Pinned -> Device)"): 5,
        ("compiled", "some_new_kernel"): 5,
        ("attention", "_attention_forward_kernel"): 5,
        ("idle", "(no kernel runs)"): 30,
    }
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": []}))
    with pytest.raises(UserError, match="no range 'window'"):
        trace.read(tmp_path / "t.json")


def done(flops: float, size: float) -> floors.Work:
    return floors.Work((Operation("", "", "", flops, size),))


def test_floors_of_a_graph_stand_together() -> None:
    """A graph's products have no room of their own, so that a floor beside one room's kernels would say nothing."""
    work = {room: done(*sizes) for room, sizes in (("MLP", (2e12, 0)), ("adaLN", (0, 1e9)), ("optimizer", (0, 4e9)))}
    rates = floors.Rates(flops=1e12, bytes=1e9)
    items = [trace.Item(room, "kernel", 2e6, 1) for room in ("adaLN", "optimizer")]
    eager = profile.table(trace.Profile(4e6, items), 1, work, rates)
    assert "| **adaLN** | 2000.000 | 50.0% | 1.0 | 1000.000 |" in eager
    items.append(trace.Item("compiled", "gemm", 4e6, 1))
    compiled = profile.table(trace.Profile(8e6, items), 1, work, rates)
    assert "| **adaLN** | 2000.000 | 25.0% | 1.0 |  |" in compiled
    assert "| **compiled** | 4000.000 | 50.0% | 1.0 | 3000.000 |" in compiled
    assert "| **optimizer** | 2000.000 | 25.0% | 1.0 | 4000.000 |" in compiled
    assert "| **step** | 8000.000 | 100.0% | 3.0 | 7000.000 |" in compiled


def test_every_kernel_name_has_its_room() -> None:
    """The names that `kernels/` and `csrc/` give: graphs and compiled steps are grouped by nothing else."""
    root = Path(loader.__file__).parents[2]
    source = "\n".join(p.read_text() for p in (root / "kernels").glob("*.py"))
    names = set(re.findall(r"def (_\w+_kernel)\(", source)) | {"norm_pass", "update_pass"}
    rooms = {
        "adaln": "adaLN", "attention": "attention", "mlp": "MLP", "probe": "probe", "token": "probe",
        "interpolate": "interpolant", "uniform": "interpolant", "normal": "interpolant", "windows": "probe",
        "row": "adaLN", "velocity": "losses", "norm": "optimizer", "update": "optimizer",
        "gelu": "MLP", "quantize": "compiled",
    }  # fmt: skip
    assert len(names) > 12
    for name in names:
        assert trace._room(None, name) == rooms[name.strip("_").split("_")[0]], name


def test_floors() -> None:
    config = resolve(override(TINY, {"optim.accumulate": 2, "train.precision": "bf16"}), MANIFEST)
    work = floors.step_work(config, MANIFEST, params=1000, row_bytes=768, probe=True)
    assert sum(w.flops for w in work.values()) == total(step_parts(config, MANIFEST.probe_classes)).training
    assert work["optimizer"].bytes == 40_000
    latent = 10 * 3 * 8 * 8
    assert work["interpolant"].bytes == 10 * 768 + 8 * latent
    assert work["losses"].bytes == (6 + 8) * latent  # docs/kernels.md
    # 3 blocks; 8 extra rows go through 2 of them, without the second half of the last.
    assert work["adaLN"].bytes == (20 * (3 * 10 * 2 + 8 * 3) + 10 * 18) * 16 * 32
    plain = floors.step_work(config, MANIFEST, params=1000, row_bytes=768, probe=False)
    assert "probe" not in plain and plain["MLP"].flops < work["MLP"].flops
    rates = floors.Rates(flops=1e12, bytes=1e9)
    # An operation computes while it moves; one follows the other.
    assert done(2e12, 3e9).seconds(rates) == 3 and done(4e12, 3e9).seconds(rates) == 4
    assert floors.Work(done(2e12, 3e9).operations + done(4e12, 3e9).operations).seconds(rates) == 7
    assert min(floors.measure(CPU, torch.float32)) > 0
