"""bench/step.py and bench/scaling.py at tiny sizes on a CPU: they run to their end, and what they count is right."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import MANIFEST, lively, random_batch, relative_error, tiny

from bench import scaling, step, variants
from lsep.checks import resolve
from lsep.config import Config
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.plan import branch_plan
from lsep.presets import PRESETS

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python with `command`, without a GPU, on one thread: these sizes are slower on more."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


def read(path: Path) -> dict:  # type: ignore[type-arg]
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_every_variant_is_timed_and_reported(tmp_path: Path) -> None:
    files = tmp_path / "out" / "step.json", tmp_path / "out" / "step.md"
    command = "-m bench.step --preset tiny --rounds 3 --json".split()
    done = run(*command, str(files[0]), "--markdown", str(files[1]))
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(files[0])
    rows = {row["variant"]: row for row in found["variants"]}
    assert list(rows) == list(variants.VARIANTS[:-1])
    assert found["skipped"] == {"fp8": "fp8 needs a GPU, and the device is cpu"}
    assert found["interleaved"] and found["compile"] == "auto" and not found["failed"]
    assert found["batch size"] == 20 and found["rounds"] == 3
    for name, row in rows.items():
        times = found["round ms"][name]
        assert len(times) == 3 and min(times) > 0
        assert row["ms"] == pytest.approx(sorted(times)[1])
        assert row["images/s"] == pytest.approx(20 / row["ms"] * 1e3)
        assert row["quartiles"][0] <= row["ms"] <= row["quartiles"][1]
        training = sum(part["training"] for part in found["parts"][name].values())
        plain = sum(part["training"] for part in found["parts"]["plain"].values())
        assert row["GFLOP/image"] == pytest.approx(training / 20 / 1e9)
        assert row["FLOPs / plain"] == training / plain
        ratios = sorted(a / b for a, b in zip(times, found["round ms"]["plain"], strict=True))
        assert row["time / plain"] == pytest.approx(ratios[1])
        assert row["of matrix rate"] == pytest.approx(training / row["ms"] * 1e3 / found["matrix rate"])
    # 16 tokens, depth 2 of 3: 1 + 2/3 and the one row of fc2, for 16, 4 and 0 of 20 samples.
    last = 2 / 3 + 1 / 3 / 16
    blocks = {"plain": 0, "authors": 2, "paper": 2, "shared-0.8": 0.8 * (1 + last), "shared-0.2": 0.2 * (1 + last)}
    for name, wanted in blocks.items():
        assert rows[name]["blocks"] == pytest.approx(wanted), name
    assert rows["authors"]["GFLOP/image"] == rows["paper"]["GFLOP/image"]
    text = files[1].read_text()
    assert "command: python -m bench.step --preset" in text
    assert "| shared-0.8 |" in text
    assert "Skipped: fp8: fp8 needs a GPU" in text


def test_scaling_fits_every_axis(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    done = run(
        "-m", "bench.scaling", "--preset", "tiny", "--rounds", "1", "--batch-sizes", "10", "20", "--widths", "32", "48",
        "--tokens", "4", "16", "--extra-fractions", "0", "0.8", "--json", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(file)
    assert [p["axis"] for p in found["points"]] == [axis for axis in scaling.AXES for _ in range(2)]
    assert set(found["fits"]) == {*scaling.AXES, "all"}
    by = {(p["axis"], p["value"]): p for p in found["points"]}
    base = by["batch size", 20]
    for point in (("width", 32), ("tokens", 16), ("extra fraction", 0.8)):  # the preset itself, measured once
        assert by[point]["ms"] == base["ms"] and by[point]["TFLOP"] == base["TFLOP"]
    assert by["batch size", 10]["TFLOP"] == base["TFLOP"] / 2
    assert all(p["ms"] > 0 and p["floor ms"] > 0 for p in found["points"])
    assert "| extra fraction |" in done.stdout and "overhead ms" in done.stdout


def test_default_points_fit_their_preset() -> None:
    xl = scaling.defaults(PRESETS["sit-xl-2-256"], True)
    assert xl[:3] == ([32, 64, 128, 256], [576, 1152, 1728], [64, 256, 1024])
    assert xl[3] == pytest.approx([0, 0.2, 0.4, 0.8])
    assert scaling.defaults(variants.configuration("cpu"), False)[:3] == ([16, 32, 64], [64, 192, 256], [16, 64, 144])
    assert scaling.defaults(PRESETS["quickstart"], False)[2] == []


def test_fit_is_least_squares() -> None:
    fit = scaling.fit([1e9, 2e9, 4e9], [0.012, 0.022, 0.042])
    assert fit == pytest.approx({"FLOP/s": 1e11, "overhead ms": 2.0, "R^2": 1.0})
    noisy = scaling.fit([1e9, 2e9, 4e9], [0.012, 0.030, 0.042])
    assert noisy is not None and 0 < noisy["R^2"] < 1
    assert scaling.fit([1e9, 1e9], [0.1, 0.2]) is None
    assert scaling.fit([1e9], [0.1]) is None


@pytest.mark.parametrize(("module", "arguments", "message"), [
    (step, "--variants plain plane",
     "bench.step: variant 'plane' is unknown, expected some of plain, authors, paper, shared-0.8, shared-0.2, "
     "shared-0, fp8 (or another shared-E)"),
    (step, "--variants shared-x", "variant 'shared-x' is unknown"),
    (step, "--variants shared-0.9", "--probe.extra-fraction is 0.9, expected from 0 to rho - p = 0.8"),
    (step, "--preset tin", "bench.step: preset 'tin' is unknown; did you mean 'tiny'"),
    (step, "--rounds 0", "bench.step: --rounds is 0, expected at least 1"),
    (step, "--batch-size 0", "--train.batch-size is 0, expected at least 1"),
    (scaling, "--preset tin", "bench.scaling: preset 'tin' is unknown; did you mean 'tiny'"),
    (scaling, "--widths 24", "bench.scaling: --widths has 24, expected a multiple of the preset's head_dim 16"),
    (scaling, "--tokens 15", "bench.scaling: --tokens has 15, expected a square number"),
    (scaling, "--steps 0", "bench.scaling: --steps is 0, expected at least 1"),
])  # fmt: skip
def test_bad_arguments_end_with_one_sentence(
    module: object, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments.split()
    assert module.main(given if "--preset" in given else ["--preset", "tiny", *given]) == 2  # type: ignore[attr-defined]
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1


def test_authors_way_is_the_same_mathematics() -> None:
    """Two separate passes give the joint pass's losses and gradients."""
    config = resolve(tiny(probe__branch="paper", probe__pool_before_fc2=False), MANIFEST)
    joint, separate = (lively(Objective(config, MANIFEST)) for _ in range(2))
    separate.model.forward_with_probe = partial(variants.separate_passes, separate.model)  # type: ignore[method-assign]
    losses = []
    for objective in (joint, separate):
        losses.append(objective(random_batch(10), branch_plan(config), torch.tensor(3), torch.tensor(0)))
        losses[-1].total.backward()
    assert losses[0].lsep > 0
    assert relative_error(losses[1].total, losses[0].total) < 1e-5
    assert relative_error(losses[1].lsep, losses[0].lsep) < 1e-5
    for (name, p), q in zip(joint.named_parameters(), separate.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert relative_error(q.grad, p.grad) < 1e-5, name


def test_variants_are_what_they_are_called() -> None:
    base = PRESETS["sit-xl-2-256"]
    authors, paper = (variants.variant(name, base, "model") for name in ("authors", "paper"))
    assert (authors.backend.kernels, authors.backend.attention, authors.backend.optimizer) == (
        "reference", "sdpa", "torch",
    )  # fmt: skip
    assert (authors.train.compile, paper.train.compile, paper.backend.kernels) == ("off", "model", "auto")
    assert authors.probe == paper.probe and paper.probe.branch == "paper" and not paper.probe.pool_before_fc2
    assert variants.variant("shared-0.2", base, "auto").probe.extra_fraction == 0.2
    assert not variants.variant("plain", base, "auto").probe.enabled
    changed = variants.variant("plain+train.graphs=off+train.fp32_residual=true", base, "auto").train
    assert changed.graphs == "off" and changed.fp32_residual
    for bad, message in (
        ("plain+graphs", "expected SECTION.FIELD=VALUE"),
        ("plain+train.graphs=no", "expected one of"),
    ):
        with pytest.raises(UserError, match=message):
            variants.variant(bad, base, "auto")


def test_a_failing_variant_is_named_and_the_others_have_a_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Runner(variants.Runner):
        def __init__(self, config: Config, two_passes: bool = False) -> None:
            if two_passes:
                raise torch.OutOfMemoryError("no memory")
            super().__init__(config, two_passes)

    monkeypatch.setattr(variants, "Runner", Runner)
    command = "--preset tiny --rounds 1 --budget --variants authors shared-0.8 --json".split()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert step.main([*command, str(tmp_path / "step.json")]) == 1
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "FAILED: authors: OutOfMemoryError: no memory" in out and "## budget of shared-0.8" in out
    found = read(tmp_path / "step.json")
    assert list(found["failed"]) == ["authors"] and list(found["budgets"]) == ["shared-0.8"]
    budget = {line["room"]: line for line in found["budgets"]["shared-0.8"]}
    assert set(budget) == {*variants.ROOMS, "other"}
    for room in ("matrix products", "attention", "adaLN", "GELU", "optimizer"):
        assert budget[room]["floor ms"] > 0 and budget[room]["measured ms"] > 0, room
    training = sum(part["training"] for part in found["parts"]["shared-0.8"].values())
    assert sum(line["GFLOP"] for line in budget.values()) == pytest.approx(training / 1e9)
    # 20 samples through 3 blocks and 16 through 1 more (in the next GELU is the pooling's), 16 tokens, width 32, 5
    # tensors of float32 hidden in 128.
    assert budget["GELU"]["GB"] == pytest.approx((20 * 3 + 16) * 16 * 128 * 5 * 4 / 1e9)


@pytest.mark.parametrize(("kernel", "room"), [
    ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
    ("aten::addmm", "matrix products"),
    ("aten::convolution_backward", "matrix products"),
    ("_attention_backward_kv_kernel", "attention"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ("void lsep::update_pass<float, 1, float>", "optimizer"),
    ("aten::_fused_adamw_", "optimizer"),
    ("_adaln_backward_kernel", "adaLN"),
    ("aten::native_layer_norm", "adaLN"),
    ("triton_poi_fused__to_copy_addmm_gelu_0", "GELU"),
    ("_mlp_gelu_backward_kernel", "GELU"),
    ("_token_pool_forward_kernel", "probe and loss"),
    ("aten::convert_element_type", "other"),
    ("aten::copy_", "other"),
])  # fmt: skip
def test_rooms_of_kernels(kernel: str, room: str) -> None:
    assert variants.room_of(kernel) == room


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L40S", 362), ("Tesla T4", None),
])  # fmt: skip
def test_peaks(name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert step.peak(torch.device("cuda")) == (None if tflops is None else tflops * 1e12)
    assert step.peak(torch.device("cpu")) is None
