"""`lsep plan`: memory, time and price of a run, computed on a machine without a GPU."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lsep.cli import main
from lsep.cost.cards import CARDS

ROOT = Path(__file__).parents[1]


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["plan", *argv]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["plan", *argv]) == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks torch for a GPU fails."""

    def asked(*args: object) -> None:
        raise AssertionError("lsep plan asked for a GPU")

    for name in ("get_device_capability", "get_device_properties", "mem_get_info", "is_available"):
        monkeypatch.setattr(torch.cuda, name, asked)


def section(text: str, title: str) -> dict[str, list[str]]:
    """Lines below the one that begins with `title`, by name, with their numbers."""
    lines = text[text.index(title) :].splitlines()[1:]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[: lines.index("")]]
    return {name: cells for name, *cells in rows}


def test_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "sit-xl-2-256", "--gpu", "h200", "--hours-price", "2")
    memory = section(text, "memory at the peak")
    peak = float(memory["peak of the step"][0])
    parts = [float(c[0]) for n, c in memory.items() if not n.startswith(("peak", "with what", "free on"))]
    assert sum(parts) == pytest.approx(peak, abs=0.1) and peak == pytest.approx(87.9, rel=0.05)
    assert "it fits, computed" in text
    times = section(text, "milliseconds of a step")
    floor, step = map(float, times["step"])
    named = {n: c for n, c in times.items() if n != "step" and len(c) == 3 and n}
    assert sum(float(c[1]) for n, c in named.items() if n) == pytest.approx(step, abs=0.2)
    assert 0 < floor < step
    rate = float(re.search(r"([\d,]+) images/s", text)[1].replace(",", ""))  # type: ignore[index]
    assert rate == pytest.approx(256 / step * 1e3, rel=1e-2)
    hours = float(re.search(r"([\d,.]+) hours on 1 x", text)[1].replace(",", ""))  # type: ignore[index]
    assert hours == pytest.approx(4_003_200 * step / 3.6e6, rel=1e-2)
    price = float(re.search(r"([\d,]+) at 2 a GPU and hour", text)[1].replace(",", ""))  # type: ignore[index]
    assert price == pytest.approx(2 * hours, abs=1)


def test_every_number_is_said_to_be_computed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each block of numbers says so in its first line."""
    text = planned(capsys, "sit-xl-2-256", "--gpu", "h100", "--hours-price", "3", "--gpus", "8")
    for block in text.strip().split("\n\n"):
        first = block.splitlines()[0]
        assert "computed" in first or first.startswith("8 x H100"), block


def test_what_does_not_fit_comes_with_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "sit-xl-2-256", "--gpu", "h100")
    assert "it does not fit; what does" in text
    offered = section(text, "it does not fit")
    assert next(iter(offered)) == "--optim.accumulate 2" and len(offered) == 3
    assert "2 micro-batches of 128" in text  # the time is that of the first
    assert "it fits, computed" in planned(capsys, "sit-xl-2-256", "--gpu", "h100", "--optim.accumulate", "2")


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "sit-xl-2-512", "--gpu", "a100", "--train.batch-size", "4096", "--train.weights", "bf16")
    assert "nothing fits: --optim.accumulate 1 --train.memory recompute-blocks needs least" in text
    assert "hours" not in text  # of a run that cannot be


@pytest.mark.parametrize("card", CARDS)
def test_every_card(capsys: pytest.CaptureFixture[str], card: str) -> None:
    text = planned(capsys, "sit-b-2-256", "--gpu", card)
    assert CARDS[card].title in text and "attention " + ("sdpa" if card == "a100" else "triton") in text


def test_more_cards_are_faster_and_exchange_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    def hours(*argv: str) -> float:
        text = planned(capsys, "sit-xl-2-256", *argv)
        return float(re.search(r"([\d,.]+) hours", text)[1].replace(",", ""))  # type: ignore[index]

    assert "exchange of gradients" not in planned(capsys, "sit-xl-2-256")
    assert "exchange of gradients" in planned(capsys, "sit-xl-2-256", "--gpus", "8")
    assert hours() / 8 < hours("--gpus", "8") < hours() / 6


def test_a_probe_that_ends(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "sit-xl-2-256", "--probe.end-step", "1000000")
    before = float(section(text, "milliseconds of a step")["step"][1])
    after = float(re.search(r"from there ([\d.]+) ms", text)[1])  # type: ignore[index]
    assert 0.78 < after / before < 0.86  # LSEP costs 22 % of the FLOPs


def test_a_data_set_says_shape_and_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "it fits" in planned(capsys, "quickstart")


def test_a_unet_is_not_modelled(capsys: pytest.CaptureFixture[str]) -> None:
    text = planned(capsys, "quickstart-unet")
    assert text.count("\n") == 1 and "U-Net are not modelled" in text


def test_shards_are_not_modelled(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--dist.mode fsdp" in planned(capsys, "sit-xl-2-256", "--gpus", "8", "--dist.mode", "fsdp")


@pytest.mark.parametrize(("argv", "message"), [
    (("sit-xl",), "preset 'sit-xl' is unknown"),
    (("sit-xl-2-256", "--gpus", "3"), "--gpus is 3, expected a number that divides --train.batch-size 256"),
    (("sit-xl-2-256", "--gpus", "0"), "--gpus is 0"),
    (("sit-xl-2-256", "--gpu", "h101"), "h101"),
    (("sit-xl-2-256", "--hours-price", "-1"), "--hours-price is -1"),
    (("sit-xl-2-256", "--gpu", "a100", "--train.fp8"), "--train.fp8 is True, but compute capability 8.0"),
    (("sit-xl-2-256", "--align.features", "tokens"), "--align.width is None"),
    (("sit-xl-2-256", "--probe.depth", "40"), "--probe.depth is 40"),
])  # fmt: skip
def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str) -> None:
    err = refused(capsys, *argv)
    assert message in err and err.count("\n") == 1


def test_seconds() -> None:
    """The command itself: no weights of 675 million parameters are made."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "lsep", "plan", "sit-xl-2-256"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 60  # 3 alone on a machine; many tests may run beside it
