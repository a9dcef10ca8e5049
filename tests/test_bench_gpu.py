"""bench/gpu.py at tiny sizes on a CPU: it runs to its end, and what is wrong with a kernel reaches the exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
SECTIONS = ["machine", "compiled", "correctness", "determinism", "kernels", "csrc", "training", "candidates"]
LONG = ["step", "variants", "pretraining"]
ALL = [
    "machine", "step", "compiled", "correctness", "determinism", "kernels", "csrc", "training", "candidates",
    "variants", "pretraining",
]  # fmt: skip
"""In the order of their worth."""
BROKEN = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
from lsep_kernels import adaln, gelu_pool, velocity_loss
def off(f):
    return lambda *a: f(*a) * 1.01
adaln.norm_modulate = off(adaln.norm_modulate)
def unwritten(x, weights, pool=gelu_pool.pool):
    out = pool(x, weights)
    return out + x.new_empty(out.shape) * 0
gelu_pool.pool = unwritten
def raises(*args):
    raise RuntimeError("no such loss")
velocity_loss.velocity_loss = raises
from bench.gpu import main
sys.exit(main(sys.argv[1:]))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python with `command`, without a GPU and without the interpreter this process may have asked for."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def test_every_section_runs_and_is_reported(tmp_path: Path) -> None:
    files = tmp_path / "out" / "gpu.json", tmp_path / "out" / "gpu.md"
    command = ["-m", "bench.gpu", "--smoke", "--seed", "7", "--json", str(files[0]), "--markdown", str(files[1])]
    done = run(*command, "--only", *SECTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(files[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [s["name"] for s in found["sections"]] == SECTIONS
    assert not found["failed"]
    text = files[1].read_text()
    assert [line.split()[1].rstrip(":") for line in text.splitlines() if line.startswith("## ")] == SECTIONS
    for wanted in (
        "| commit |", "| command | python -m bench.gpu --smoke", "| torch |", "| seed | 7 |",
        "| auto, kernels | reference |", "| auto, optimizer | torch |", "| auto, graphs | no |",
    ):  # fmt: skip
        assert wanted in text
    assert found["finished"] == SECTIONS and "plan (no limit on the whole" in done.stderr
    sections = {s["name"]: s for s in found["sections"]}
    assert "memcheck needs a GPU" in sections["csrc"]["skipped"][0]
    for name in ("correctness", "determinism"):
        checked = {row["operator"].split()[0].rstrip(",") for row in sections[name]["rows"] if row["ok"] == "yes"}
        assert checked >= {
            "norm_modulate", "gate_residual_norm_modulate", "attention", "mlp", "gelu_pool", "pool", "probe_head",
            "interpolate", "velocity_loss",
        }  # fmt: skip
    assert sections["kernels"]["rows"][0]["us"] > 0 and sections["kernels"]["rows"][0]["compiled us"] > 0
    assert [row["run"] for row in sections["training"]["rows"]][2:] == ["kernels", "kernels, optimizer"]
    assert all(row["tried"] >= 1 for row in sections["candidates"]["rows"])


def test_the_long_sections_run(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = run("-m", "bench.gpu", "--smoke", "--seed", "7", "--only", *LONG, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    _, step, variants, pretraining = json.loads(file.read_text())["sections"]
    assert [row["variant"] for row in step["rows"]] == ["plain", "shared-0.8"]
    assert [text.partition(":")[0] for text in step["skipped"]] == [
        "shared-0.8+backend.attention=cudnn", "shared-0.8+backend.mlp=cublaslt",
    ]  # fmt: skip
    assert step["begun"][:2] == ["plain", "shared-0.8"]
    assert [row["variant"] for row in variants["rows"]][:2] == ["authors", "paper"]
    assert "fp8" in variants["skipped"][0]
    rows = {row["variant"]: row for row in step["rows"] + variants["rows"]}
    ms = {name: row["ms"] for name, row in rows.items()}
    # Measured in two sections, and one round each: ratios of the medians.
    assert rows["paper"]["time / plain"] == pytest.approx(ms["paper"] / ms["plain"])
    assert rows["paper"]["time / authors"] == pytest.approx(ms["paper"] / ms["authors"])
    beside = next(text for text in variants["notes"] if text.startswith("shared-0.8: time / authors"))
    assert float(beside.split()[4].rstrip(",")) == pytest.approx(ms["shared-0.8"] / ms["authors"], rel=5e-3)
    for row in rows.values():
        assert (row["kernels"], row["optimizer"], row["compile"], row["micro-batches"]) == (
            "reference",
            "torch",
            "off",
            1,
        )
    checked = {row["figure"]: row for row in pretraining["rows"]}
    assert checked["skipped steps"]["found"] == 0 and checked["images/s"]["found"] > 0


def test_all_sections_run_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench import gpu, schedule, worker

    seen = []
    monkeypatch.setattr(gpu, "supervise", lambda names, *_: seen.append(names) or [])
    assert gpu.main(["--smoke"]) == 0
    assert seen == [ALL] and list(schedule.SCHEDULE) == ALL == list(worker.sections())


def test_a_wrong_kernel_fails(tmp_path: Path) -> None:
    """Values that are 1 % off, memory nobody wrote, and an error: all three are named, and the others pass."""
    file = tmp_path / "gpu.json"
    done = run("-c", BROKEN, "--smoke", "--seed", "7", "--only", "correctness", "--json", str(file))
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["failed"] and [s["name"] for s in found["sections"]] == ["machine", "correctness"]
    rows = found["sections"][1]["rows"]
    wrong = {row["operator"].split()[0] for row in rows if row["ok"] != "yes"}
    assert wrong == {"norm_modulate", "pool", "velocity_loss"}
    assert any("no such loss" in text for text in found["sections"][1]["failures"])


def test_without_a_gpu_it_says_so() -> None:
    done = run("-m", "bench.gpu")
    assert done.returncode == 2
    assert done.stderr == "bench.gpu needs a CUDA GPU and finds none (--smoke runs tiny sizes on a CPU)\n"


def test_unknown_sections_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu import main

    assert main(["--smoke", "--only", "nothing"]) == 2
    assert capsys.readouterr().err == f"--only nothing is unknown, expected some of {', '.join(ALL)}\n"
    assert main(["--smoke", "--minutes", "0"]) == 2
    assert capsys.readouterr().err == "--minutes is 0, expected more than 0\n"
