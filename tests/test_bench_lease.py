"""What keeps bench/gpu.py going on a GPU that is lent for minutes: limits, files as it goes, a worker that may die."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import compiled, kernel_checks, machine, optimizer, pretraining, programs, schedule, step, variants
from bench.section import Context, Section
from lsep.config import Config
from lsep.errors import UserError

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# Sections that go wrong in every way, under limits of a second: `main` as it is, around them.
FAKES = """
import os, signal, sys, time
from dataclasses import replace
from bench import gpu, schedule, supervisor, worker
from bench.section import GpuLost

def cases(name, **special):
    def run(context, section):
        section.details["pids"] = [*section.details.get("pids", []), os.getpid()]
        def one(case):
            special.get(case, lambda: None)()
            section.rows.append({"case": case})
        context.each(section, [(c, c) for c in "abcd"], one)
    run.__name__ = name
    return run

def lost():
    raise GpuLost("an illegal memory access")
def raises():
    raise ValueError("no such shape")
def killed():
    time.sleep(2)  # for what was told before to be written
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(0.5)  # nobody hears what comes next: this process ends by itself, or the test would wait for it
def outside(context, section):
    section.rows.append({"case": "before"})
    context.tell(section, None, float("inf"))
    time.sleep(60)
def whole(context, section):
    section.rows.append({"seed": context.seed, "earlier": context.details["step"]["pids"]})
found = {
    "machine": lambda context, section: None,
    "step": cases("step", b=lambda: time.sleep(60)),
    "compiled": cases("compiled", a=lambda: os.kill(os.getpid(), signal.SIGSEGV), c=lambda: sys.exit(5)),
    "correctness": cases("correctness", b=lost, c=raises),
    "determinism": cases("determinism", a=lambda: time.sleep(1.5)),
    "kernels": outside,
    "csrc": whole,
    "training": cases("training", c=killed),
}
worker.sections = lambda: found
schedule.GRACE = schedule.PATIENCE = 1.0
supervisor._EVERY = 0.0
for name in schedule.SCHEDULE:
    schedule.SCHEDULE[name] = schedule.Limits(0, 1 if name in ("determinism", "kernels") else 20, 2)
schedule.SCHEDULE["candidates"] = schedule.Limits(1e6, 1e6, 1)
sys.exit(gpu.main(sys.argv[1:]))
"""


def fakes(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FAKES, "--smoke", "--seed", "7", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, **options)


def rows(section: dict[str, Any]) -> list[str]:
    return [row["case"] for row in section["rows"]]


def test_whatever_goes_wrong_the_files_have_what_was_found(tmp_path: Path) -> None:
    files = tmp_path / "out" / "gpu.json", tmp_path / "out" / "gpu.md"
    done = fakes("--json", str(files[0]), "--markdown", str(files[1]))
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    found = json.loads(files[0].read_text())
    by = {s["name"]: s for s in found["sections"]}
    assert list(by) == found["planned"][:8] and found["finished"] == found["planned"][:7]

    assert rows(by["step"]) == ["a", "c", "d"] and len(set(by["step"]["details"]["pids"])) == 2
    assert by["step"]["failures"][0] == "b: not done after 2 s, so its process was ended"
    assert rows(by["compiled"]) == ["b", "d"]
    assert by["compiled"]["failures"] == [
        "a: its process ended with signal SIGSEGV",
        "c: its process ended with exit code 5",
    ]
    assert rows(by["correctness"]) == ["a", "d"]
    assert by["correctness"]["failures"] == [
        "after b the GPU could not be used any more by its process (an illegal memory access)",
        "c: ValueError: no such shape",
    ]  # fmt: skip
    assert "no such shape" in by["correctness"]["details"]["tracebacks"]["c"]
    assert rows(by["determinism"]) == ["a"]
    assert by["determinism"]["skipped"] == ["b, c, d: the section's time is over"]
    assert rows(by["kernels"]) == ["before"] and by["kernels"]["failures"][0].startswith("it: not done after ")
    # A fresh process knows what sections before it found.
    assert by["csrc"]["rows"] == [{"seed": 7, "earlier": by["step"]["details"]["pids"]}]
    # And the end of everything in the middle of a section leaves that as far as it was.
    assert rows(by["training"]) == ["a", "b"] and by["training"]["running"]
    text = files[1].read_text()
    assert text.startswith("# bench.gpu\n\nNot finished, training was running; FAILED: step (1), compiled (2)")
    assert "## training: running" in text
    assert not list(files[0].parent.glob(".*"))


def test_a_stop_ends_the_worker_too(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FAKES, "--smoke", "--only", "step", "--json", str(file)]
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while time.monotonic() < until:  # until it hangs in b
            if file.exists() and "b" in json.loads(file.read_text())["sections"][-1]["begun"]:
                break
            time.sleep(0.02)
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    (pid,) = json.loads(file.read_text())["sections"][-1]["details"]["pids"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_end_of_the_minutes_cuts_off_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    start = time.monotonic()
    text = tmp_path / "gpu.md"
    only = ["--only", "step", "candidates"]
    done = fakes("--minutes", "0.25", *only, "--json", str(file), "--markdown", str(text))
    assert time.monotonic() - start < 30
    assert text.read_text().startswith("# bench.gpu\n\nFAILED: step (1); not run: candidates; ")
    assert "plan (" in done.stderr and "candidates: left out, it needs 1000000 s" in done.stderr
    _, step, candidates = json.loads(file.read_text())["sections"]
    assert candidates["skipped"][0].startswith("left out, it needs 1000000 s and ")
    assert step["rows"] and done.returncode == 1  # b hangs, as ever


def test_what_is_planned_for_minutes() -> None:
    names = list(schedule.SCHEDULE)
    assert schedule.planned(names, math.inf) == {name: limits.most for name, limits in schedule.SCHEDULE.items()}
    for minutes in (1, 2, 9, 15, 30):
        plan = schedule.planned(names, 60 * minutes)
        assert sum(plan.values()) <= 60 * minutes
        for name, seconds in plan.items():
            assert schedule.SCHEDULE[name].least <= seconds <= schedule.SCHEDULE[name].most
    # The rows of most worth are in the shortest lease, and in ten minutes the compiled block is too.
    assert list(schedule.planned(names, 120)) == ["machine", "step"]
    assert list(schedule.planned(names, 570))[:3] == ["machine", "step", "compiled"]
    assert "pretraining: left out" in schedule.show_plan(names, 540)
    assert schedule.planned(names, 0) == {}
    now = time.monotonic()
    assert now - 3600 < schedule.process_started() < now - 0.1  # pytest has begun long since


def test_norms_that_are_all_infinite_are_a_failure_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if programs.why_missing("cpu"):
        pytest.skip("the optimizer's library is not built")
    ordinary = optimizer.gradients

    def infinite(variant: optimizer.Variant, like: list[torch.Tensor], at: int, seed: int) -> list[torch.Tensor | None]:
        return [None if g is None else torch.full_like(g, math.inf) for g in ordinary(variant, like, at, seed)]

    monkeypatch.setattr(optimizer, "gradients", infinite)
    section = Section("correctness")
    optimizer.correctness(Context(CPU, smoke=True, seed=7), section)
    assert [row["ok"] for row in section.rows] == ["NO"] * len(optimizer.VARIANTS)
    assert all("updates and skips [[0, 5], [0, 5]]" in text for text in section.failures)


def test_a_truth_of_zeros_compares_nothing() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    worst = kernel_checks.worst_of(["y", "z"], [ones, zeros], [ones, zeros], [ones, zeros], torch.float32, 1e-6)
    assert worst.share == math.inf and worst.what == "z is zero throughout in float64, so nothing is compared"
    assert kernel_checks.worst_of(["y"], [ones], [ones], [ones], torch.float32, 1e-6).share <= 1


def test_a_compiled_block_that_is_off_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(model: compiled.SiT, context: Context) -> None:
        run = model.run
        model.run = lambda *args: tuple(1.001 * y for y in run(*args))

    def of(changes: dict[str, Any]) -> Section:
        section = Section("compiled")
        monkeypatch.setattr(compiled, "CHANGES", changes)
        compiled.compiled(Context(CPU, smoke=True, seed=7), section)
        return section

    good = of({"as auto has it": {}})
    assert not good.failures and [row["checked"] for row in good.rows] == [18, 19]
    monkeypatch.setattr(compiled, "_compile", off)
    assert len(of({"as auto has it": {}}).failures) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Another program, or none


def test_csrc_that_is_not_built_fails_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing else is timed in its place; what asks for torch's optimizer is."""
    monkeypatch.setattr(programs, "why_missing", lambda kind: "the library is not built")
    monkeypatch.setattr(variants, "pick_device", lambda wanted: torch.device("cuda"))
    base = variants.configuration("tiny")
    configs, _ = step.prepared(["shared-0.8", "authors"], base, "auto", CPU, tmp_path)
    found, failed = variants.measure(configs, 1, 1, interleaved=True)
    assert list(found) == ["authors"] and list(failed) == ["shared-0.8"]
    assert "cmake -B build -DLSEP_CUDA=ON && cmake --build build" in failed["shared-0.8"]
    assert "+backend.optimizer=torch" in failed["shared-0.8"]
    section = Section("machine")
    monkeypatch.setattr(machine, "unbuilt", lambda device: programs.unbuilt(torch.device("cuda")))
    machine.machine(Context(CPU, smoke=True, seed=7), section)
    assert len(section.failures) == 1 and "cmake --build build" in section.failures[0]


class Small(variants.Runner):
    """On a GPU that has memory for five images; some out of memory in a capture, which wraps the error."""

    tried: list[int] = []  # noqa: RUF012
    wrapped = False

    def __init__(self, config: Config, two_passes: bool = False) -> None:
        self.tried.append(config.optim.accumulate)
        if two_passes and config.train.batch_size // config.optim.accumulate > 5:
            if not self.wrapped:
                raise torch.OutOfMemoryError("no memory")
            try:
                raise torch.OutOfMemoryError("no memory")
            except RuntimeError as error:
                raise UserError("--train.graphs: this step cannot be captured") from error
        super().__init__(config, two_passes)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_variant_that_does_not_fit_is_cut_into_micro_batches(
    wrapped: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(variants, "Runner", Small)
    monkeypatch.setattr(Small, "tried", [])
    monkeypatch.setattr(Small, "wrapped", wrapped)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    files = tmp_path / "step.json", tmp_path / "step.md"
    command = "--preset tiny --rounds 2 --variants shared-0.8 authors --json".split()
    assert step.main([*command, str(files[0]), "--markdown", str(files[1])]) == 0
    found = json.loads(files[0].read_text())
    rows = {row["variant"]: row for row in found["variants"]}
    assert sorted(Small.tried) == [1, 1, 2, 4]
    assert (rows["shared-0.8"]["micro-batches"], rows["authors"]["micro-batches"]) == (1, 4)
    assert rows["shared-0.8"]["time / authors"] > 0 and found["programs"]["authors"]["micro-batches"] == "4"
    assert found["cut"] == {"authors": "the GPU's memory is too small for 2 micro-batches of 10"}
    text = files[1].read_text()
    assert "authors runs in micro-batches: the GPU's memory is too small" in text and "## programs" in text


def test_one_that_may_not_be_cut_fails_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def runner(config: Config, two_passes: bool = False) -> variants.Runner:
        if config.optim.accumulate == 1:
            raise torch.OutOfMemoryError("no memory")
        raise UserError("--train.weights is 'bf16', but --optim.accumulate is 2")

    monkeypatch.setattr(variants, "Runner", runner)
    configs, _ = step.prepared(["plain"], variants.configuration("tiny"), "auto", CPU, tmp_path)
    _, failed = variants.measure(configs, 1, 1, interleaved=True)
    assert failed["plain"].startswith("RuntimeError: the GPU's memory is too small for 1 micro-batch of 20, and in 2: ")


def test_a_profiler_that_fails_costs_the_budget_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_counters(runner: variants.Runner) -> None:
        raise RuntimeError("no counters")

    monkeypatch.setattr(variants.Runner, "profile", no_counters)
    file = tmp_path / "step.json"
    command = "--preset tiny --rounds 1 --budget --variants plain --json".split()
    assert step.main([*command, str(file)]) == 1
    found = json.loads(file.read_text())
    assert [row["variant"] for row in found["variants"]] == ["plain"] and not found["budgets"]
    assert "no counters" in found["failed"]["plain"]


def test_files_are_written_after_each_variant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where they run one after the other, as SiT-XL/2's do."""
    file = tmp_path / "step.json"
    seen: list[list[str]] = []

    class Runner(variants.Runner):
        def __init__(self, config: Config, two_passes: bool = False) -> None:
            rows = json.loads(file.read_text())["variants"] if file.exists() else []
            seen.append([row["variant"] for row in rows])
            super().__init__(config, two_passes)

    monkeypatch.setattr(variants, "Runner", Runner)
    monkeypatch.setattr(step, "interleaves", lambda configs, device: False)
    command = "--preset tiny --rounds 1 --variants plain shared-0 shared-0.8 --json".split()
    assert step.main([*command, str(file), "--markdown", str(tmp_path / "step.md")]) == 0
    assert seen == [[], ["plain"], ["plain", "shared-0"]]


# ---------------------------------------------------------------------------------------------------------------------
# From a bare tree

ABSENT = "tyro nvidia nvidia.dali diffusers sklearn matplotlib tensorboard torch.utils.tensorboard".split()
BARE = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
from bench.gpu import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_runs_without_what_a_lent_machine_lacks(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    only = ["step", "compiled", "csrc", "training", "pretraining"]
    done = subprocess.run(
        [sys.executable, "-c", BARE, "--smoke", "--seed", "7", "--json", str(file), "--only", *only],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    sections = {s["name"]: s for s in json.loads(file.read_text())["sections"]}
    assert list(sections) == ["machine", *only]
    assert sections["pretraining"]["skipped"] == [
        "lsep train needs tensorboard, matplotlib: pip install tensorboard matplotlib"
    ]


def test_the_lease_script_runs_from_a_bare_tree(tmp_path: Path) -> None:
    out = tmp_path / "out"
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OUT": str(out), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "lease.sh"), "--minutes", "5", "--smoke", "--only", "compiled"]
    for _ in range(2):  # safe to run again
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads((out / "gpu.json").read_text())
        assert found["finished"] == ["machine", "compiled"] and 4 < found["minutes"] <= 5
    log = (out / "lease.log").read_text()
    assert log.count("bench.gpu ended with 0") == 2 and "compiled: ok" in log
    failing = subprocess.run([*command[:2], "--only", "nothing"], env=env, capture_output=True, text=True)
    assert failing.returncode == 2 and "--only nothing is unknown" in failing.stderr


def test_a_training_is_of_whole_log_windows() -> None:
    """The last step writes a line wherever it falls: one in mid-window made the resumed log a line too long."""
    assert pretraining.steps_in(180.0, 75.34, 10) == 13560
    assert pretraining.steps_in(1.0, 0.1, 10) == 2 * pretraining.WINDOWS * 10


def test_limits_of_a_case_are_those_of_its_section() -> None:
    """One that is ended has had the whole of them."""
    seen = []
    context = Context(CPU, smoke=True, seed=0, case_limit=5.0)
    context = replace(context, tell=lambda section, case, until: seen.append((case, until - time.monotonic())))
    section = Section("step")
    context.each(section, [("a", 1), ("b", 2)], lambda case: None)
    assert [case for case, _ in seen] == ["a", "b", None]
    assert all(4.9 < left <= 5.0 for case, left in seen if case)
    context.each(section, [("a", 1), ("b", 2)], lambda case: pytest.fail("begun twice"))
