"""`train.memory auto`: what is chosen for a GPU's memory, said, stored with the run, and kept by a resume."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MANIFEST, tiny

from lsep import fitting
from lsep.checks import resolve
from lsep.config import Config, override
from lsep.cost.fit import free_of
from lsep.dist import World
from lsep.errors import UserError
from lsep.presets import PRESETS
from lsep.run import Run
from lsep.step import setup
from lsep.train import train

GPU = World(torch.device("cuda", 0))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A card with so many free bytes, and everything installed."""
    memory = {"free": free_of(80 * 2**30)}
    monkeypatch.setattr(fitting, "free_bytes", lambda device: memory["free"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("lsep_kernels.adamw_ema.why_missing", lambda device="cuda": None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: object())
    return memory


def xl(**changes: object) -> Config:
    config = resolve(
        PRESETS["sit-xl-2-256"], replace(MANIFEST, shape=(4, 32, 32), num_classes=1000, probe_classes=1000)
    )
    return override(config, {"train.precision": "bf16", **changes})


def test_a_batch_that_does_not_fit_is_cut_first(card: dict[str, int]) -> None:
    fitted = fitting.fit_memory(xl(), GPU, 1000)
    assert (fitted.config.optim.accumulate, fitted.config.train.memory) == (2, "keep")
    (note,) = fitted.notes
    need, free, gets = map(float, re.findall(r"([\d.]+) GB", note))
    assert gets < free < need and "it runs as --optim.accumulate 2" in note
    assert fitted.needed == pytest.approx(gets * 1e9, abs=1e8)
    card["free"] = free_of(141 * 2**30)
    fitted = fitting.fit_memory(xl(), GPU, 1000)
    assert (fitted.config.optim.accumulate, fitted.config.train.memory, fitted.notes) == (1, "keep", [])


def test_what_was_asked_for_is_left_alone(card: dict[str, int]) -> None:
    asked = xl(**{"train.memory": "recompute-blocks"})
    assert fitting.fit_memory(asked, GPU, 1000).config == asked
    unet = tiny(model__backbone="unet")  # whose memory is not modelled
    assert fitting.fit_memory(unet, GPU, 5).config.train.memory == "keep"
    assert fitting.fit_memory(xl(), World(torch.device("cpu")), 1000) == (xl(**{"train.memory": "keep"}), [], 0)


def test_a_model_that_is_too_large_says_what_it_needs(card: dict[str, int]) -> None:
    card["free"] = 8 * 10**9
    with pytest.raises(
        UserError, match=r"a step needs [\d.]+ GB \(computed\), and cuda:0 has 8.0 GB free; the least, --opt"
    ):
        fitting.fit_memory(xl(), GPU, 1000)


def test_memory_that_runs_out_names_three_settings(card: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    text = "CUDA out of memory. Tried to allocate 2.25 GiB."
    with pytest.raises(UserError) as failed, fitting.memory_runs_out(xl(**{"train.memory": "keep"}), GPU, 1000):
        raise torch.OutOfMemoryError(text)
    said = str(failed.value)
    assert said.startswith("the GPU ran out of memory when asked for 2.25 GiB more; --optim.accumulate 1 needs ")
    assert len(re.findall(r"--optim.accumulate \d", said.partition("these would fit: ")[2])) == 3
    assert "--train.memory recompute-elementwise" in said and "--train.memory recompute-blocks" in said
    with pytest.raises(RuntimeError, match="another fault"), fitting.memory_runs_out(xl(), GPU, 1000):
        raise RuntimeError("another fault")


def test_a_run_goes_on_with_its_own_choice(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """auto of a resume is what it was at the start, on whatever GPU; what is asked for anew is taken."""
    config = tiny(data__path=str(store), train__steps=4, backend__optimizer="reference")
    cut = lambda c, world, classes: fitting.Fitted(  # noqa: E731
        override(c, {"optim.accumulate": 2, "train.memory": "recompute-blocks"}), ["it was cut"]
    )
    monkeypatch.setattr("lsep.step.fit_memory", cut)
    run = train(config, tmp_path / "run")
    assert "lsep: it was cut" in capsys.readouterr().out
    assert (run.config().optim.accumulate, run.config().train.memory) == (2, "recompute-blocks")
    monkeypatch.undo()
    longer = override(config, {"train.steps": 6})
    assert Run(run.path).settled(longer).optim.accumulate == 2
    again = train(longer, tmp_path / "run")
    assert (again.config().optim.accumulate, again.config().train.memory) == (2, "recompute-blocks")
    asked = override(config, {"train.steps": 8, "optim.accumulate": 5, "train.memory": "keep"})
    assert train(asked, tmp_path / "run").config().optim.accumulate == 5


def test_auto_is_settled_before_a_run_is_written(store: Path) -> None:
    assert tiny().train.memory == "auto"
    assert setup(tiny(data__path=str(store))).config.train.memory == "keep"
