"""What could not fit in memory is refused by its size, before anything of it is allocated."""

import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MANIFEST, tiny

from lsep import cli, sizes
from lsep.checks import check, resolve
from lsep.config import Config, flat, override
from lsep.errors import UserError
from lsep.objective import Objective
from lsep.presets import PRESETS
from lsep.run import Run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__qk_norm": True, "model__mlp_ratio": 2.7},
        {"probe__enabled": False, "model__patch_size": 4},
        {"align__encoder": "x", "align__width": 24, "align__projector_dim": 40, "align__depth": 2},
        {"model__depth": 1, "probe__depth": 1, "model__hidden_size": 64, "model__num_heads": 4},
    ],
)
def test_the_count_of_a_sit_is_that_of_its_weights(changes: dict[str, object]) -> None:
    config = resolve(tiny(**changes), MANIFEST)
    built = Objective(config, MANIFEST)
    assert sizes.parameters(config, MANIFEST.probe_classes) == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_count_of_a_unet_is_a_lower_bound(depth: int) -> None:
    """And not a loose one: at least a third of what there is."""
    config = resolve(
        tiny(model__backbone="unet", model__depth=depth, model__hidden_size=64, model__patch_size=1, probe__depth=1,
             probe__window_min=1),
        MANIFEST,
    )  # fmt: skip
    whole = sum(p.numel() for p in Objective(config, MANIFEST).parameters())
    assert whole / 3 < sizes.parameters(config, MANIFEST.probe_classes) <= whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.hidden_size": 200_000},
            r"hidden-size 200000 with --model.depth 3 makes a model of 2,\d+,\d+,\d+,\d+ par",
        ),
        ({"model.hidden_size": 10**7}, "--model.hidden-size is 10000000, expected at most 1,048,576"),
        ({"model.depth": 10**8}, "--model.depth is 100000000, expected at most 4,096"),
        ({"model.mlp_ratio": 1e12}, "--model.mlp-ratio is 1000000000000.0, expected at most 65,536"),
        (
            {"model.mlp_ratio": 6e4, "model.hidden_size": 2**16},
            "makes a model of .* parameters, whose .* takes? at least",
        ),
        ({"sample.num": 10**13}, "--sample.num is 10000000000000, expected at most 100,000,000"),
        ({"sample.steps": 10**12}, "--sample.steps is 1000000000000, expected at most"),
        ({"sample.batch_size": 10**12}, "--sample.batch-size is 1000000000000, expected at most"),
        ({"evaluate.num": 10**13}, "--evaluate.num is 10000000000000, expected at most"),
        ({"probe.weight_bins": 10**13}, "--probe.weight-bins is 10000000000000, expected at most"),
        ({"data.prefetch": 10**13}, "--data.prefetch is 10000000000000, expected at most"),
        ({"data.threads": 10**9}, "--data.threads is 1000000000, expected at most"),
        ({"align.projector_dim": 10**12}, "--align.projector-dim is 1000000000000, expected at most"),
        ({"model.num_classes": 10**13}, "--model.num-classes is 10000000000000, expected at most"),
    ],
)
def test_absurd_sizes_are_a_sentence_within_a_second(changes: dict[str, int], message: str) -> None:
    """In the memory there is: this process may take only little more."""
    limits, used = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
    start = time.process_time()
    try:
        with pytest.raises(UserError, match=message):
            config = resolve(override(tiny(), changes), MANIFEST)
            sizes.require_training(config, MANIFEST, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - start < 1


def test_a_grid_and_batches_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(tiny(sample__num=1000, data__prefetch=100), MANIFEST)
    monkeypatch.setattr(sizes, "host_memory", lambda: 1 << 40)
    sizes.require_training(config, MANIFEST, CPU)
    needed = 1000 * 3 * 8 * 8 * 8
    monkeypatch.setattr(sizes, "host_memory", lambda: needed)
    monkeypatch.setattr(sizes, "parameters", lambda *given: 0)
    sizes.require_training(config, MANIFEST, CPU)
    monkeypatch.setattr(sizes, "host_memory", lambda: needed - 1)
    with pytest.raises(UserError, match="--sample.num is 1000, whose grid would take 0.0 GiB, but this machine has"):
        sizes.require_training(config, MANIFEST, CPU)
    with pytest.raises(UserError, match="--data.prefetch is 100000, micro-batches, which would take"):
        sizes.require_training(replace(config, data=replace(config.data, prefetch=100_000),
                                       sample=replace(config.sample, num=1)), MANIFEST, CPU)  # fmt: skip


def test_shards_of_a_training_are_counted_by_their_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, EMA, moments and half a gradient of each: 18 bytes, and 4 more for each further average."""
    config = resolve(tiny(), MANIFEST)
    count = sizes.parameters(config, MANIFEST.probe_classes)
    monkeypatch.setattr(sizes, "host_memory", lambda: 18 * count)
    sizes.require_training(config, MANIFEST, CPU)
    with pytest.raises(UserError, match="whose training takes at least"):
        sizes.require_training(config, MANIFEST, CPU, averages=1)
    sizes.require_training(config, MANIFEST, CPU, processes=2, averages=4)


def test_every_preset_fits_a_machine_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """XL with all its state has 13 GiB: nothing that people train is refused on a GPU of 16 GiB."""
    monkeypatch.setattr(sizes, "host_memory", lambda: 16 << 30)
    for preset in PRESETS.values():
        check(preset)
        side = preset.model.input_size or 8
        config = replace(preset, model=replace(preset.model, input_size=side, in_channels=4, num_classes=1000))
        sizes.require_training(config, replace(MANIFEST, shape=(4, side, side), probe_classes=1000), CPU)


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 200_000), ("depth", 10**8), ("depth", 5000)])
def test_a_run_of_absurd_size_is_not_loaded(tmp_path: Path, field: str, value: int) -> None:
    """A stranger's configuration is not checked by any training: whoever builds the model does it."""
    config = resolve(tiny(), MANIFEST)
    run = Run(tmp_path)
    run.open(replace(config, model=replace(config.model, **{field: value})), MANIFEST, "x")
    with pytest.raises(UserError, match=f"--model.{field.replace('_', '-')}"):
        Objective(run.config(), run.manifest())


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text
    for text, wanted in (("12345\n", 12345), ("max\n", None)):
        monkeypatch.setattr(
            Path, "read_text", lambda path, text=text, **k: text if "cgroup" in str(path) else real(path, **k)
        )
        assert (sizes.host_memory() == 12345) is (wanted is not None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.mlp-ratio", "1e-9"], "--model.mlp-ratio is 1e-09, which leaves the MLP no hidden width"),
        (["--dist.replicate", "0"], "--dist.replicate is 0, expected None or at least 1"),
        (["--run-dir", ""], "--run-dir is empty, expected a value"),
        (["--run-dir="], "--run-dir is empty, expected a value"),
        (["--align.encoder", "x"], "--align.depth is 8, which is its default, expected at most the model's 4 blocks"),
    ],
)
def test_nonsense_is_refused(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "quickstart", *flags]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_largest_of_every_number_is_a_sentence_or_fits() -> None:
    """No number that a parser takes fails anywhere but in `check`: each field at 10^30, and 10^400 as an integer."""
    for name, value in flat(tiny()).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            for huge in (10**30, 10**300) if isinstance(value, int) else (1e30,):
                changed = override(Config(), {name: huge})
                flag = re.escape("--" + name.replace("_", "-"))
                with pytest.raises(UserError, match=f"{flag} is "):
                    check(changed)


def test_the_command_takes_no_memory_for_it(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from lsep import cli; code = cli.main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    flags = ["train", "quickstart", "--model.hidden-size", "200000", "--run-dir", str(tmp_path / "r")]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert int(done.stdout) < 3 << 20  # KiB: torch itself
    assert not (tmp_path / "r").exists()
