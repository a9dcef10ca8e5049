"""A run directory: its configuration, its checkpoints, its metrics, its sample grids.

RUN/config.json  metrics.jsonl  results.json  checkpoints/  samples/  tensorboard/  report.html
RUN/ema/  copies of averages by power functions, where they are asked for (optim.ema_snapshot_every)
RUN/lock  while a training runs: its host, its pid, when that process began, and since when it trains
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lsep import files
from lsep.config import Config, flat, from_dict, override
from lsep.data.manifest import Manifest, parse_described
from lsep.errors import UserError, one_line, shown, told
from lsep.files import write_atomic
from lsep.launch import this_command
from lsep.lock import locked
from lsep.voice import heard

# A run may go on with these changed: they touch neither the numbers drawn nor, but for rounding, the weights.
FREE_ON_RESUME = {
    "data.path", "align.encoder", "align.features", "align.images", "data.loader", "data.threads", "data.prefetch",
    "data.crc", "optim.accumulate", "optim.ema_snapshot_every", "train.log_every", "train.memory", "train.weights",
    "train.fp8", "train.compile", "train.graphs", "train.checkpoint_every", "train.keep_last", "train.keep_every",
    "train.sample_every", "train.eval_every", "train.overhead_rounds", "train.wandb", "train.max_skipped",
    "train.on_spike", "train.init", "train.spike_factor", "train.device",
}  # fmt: skip


def differences(old: Config, new: Config) -> list[str]:
    """`"section.field: old -> new"` for each field that keeps `new` from continuing a run of `old`."""
    # Sections of the same function in another rounding, or of what only looks at it.
    free = FREE_ON_RESUME | {k for k in flat(new) if k.split(".")[0] in ("backend", "dist", "sample", "evaluate")}
    if new.optim.schedule == "constant" or new.train.steps > old.train.steps:
        free = free | {"train.steps"}  # a constant rate does not depend on where the run ends; of a cosine it is said
    before, after = flat(old), flat(new)
    return [f"{k}: {shown(before[k])} -> {shown(after[k])}" for k in before if k not in free and before[k] != after[k]]


class Run:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.results_file = self.path / "results.json"
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / "ema"
        self.samples = self.path / "samples"
        self.report_file = self.path / "report.html"
        self.lock_file = self.path / "lock"
        self.reference_file = self.path / "reference.npz"
        """What `train.eval_every` compares with, see `lsep.evaluate.monitor`."""
        self.wandb_file = self.path / "wandb-id"
        self.projectors_file = self.path / "projectors.safetensors"
        """REPA's, of an import that kept them; `train.init` takes them for a run that aligns."""

    @classmethod
    def existing(cls, path: str | Path) -> "Run":
        """A run that is there; raises UserError otherwise."""
        run = cls(path)
        run.require_plain()
        if not run.config_file.exists():
            raise UserError(f"{run.path}: not a run directory, config.json not found")
        return run

    def require_plain(self) -> None:
        """Raise UserError where the directory, or something of a run in it, is not what its name says.

        The directory itself may be a link; in it links are refused: a stranger's run could have one to anything.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is no directory, expected that of a run")
        for file in (
            self.config_file, self.metrics_file, self.results_file, self.report_file, self.lock_file, self.wandb_file,
            self.projectors_file, self.reference_file,
        ):  # fmt: skip
            files.require(file)
        for folder in (self.checkpoints, self.snapshots, self.samples, *(self.path / name for name in _FOLDERS)):
            files.require(folder, folder=True)

    def grid(self, step: int) -> Path:
        """The picture of samples at `step`."""
        return self.samples / f"step-{step:07d}.png"

    def grids(self) -> list[tuple[int, Path]]:
        """Steps and pictures of the samples drawn in training, in order; other files there are none of the run's."""
        if not self.samples.is_dir():
            return []
        named = ((_GRID.fullmatch(path.name), path) for path in self.samples.iterdir())
        return sorted((int(found[1]), path) for found, path in named if found)

    def check(self, config: Config, manifest: Manifest, teacher: dict[str, str] | None = None) -> None:
        """Raise UserError when the directory is another run's, or not a run's at all; touches nothing.

        teacher: what tokens are aligned with, see `Teacher.identity`.
        """
        self.require_plain()
        if self.config_file.exists():
            changed = differences(self.config(), config)
            said = self._config_json()["manifest"]
            # What an earlier version did not say is no difference: it may be the same data, packed again.
            before = {
                k: v for k, v in asdict(self.manifest()).items() if k in said and not (k == "latents" and v is None)
            }
            after = asdict(manifest)
            # The data may have moved, but it must be the same data.
            changed += [
                f"data's {k}: {shown(before[k])} -> {shown(after[k])}"
                for k in before
                if k != "source" and before[k] != after[k]
            ]
            given = teacher or {}
            known = self._teacher(given)
            changed += [
                f"align.{k}'s sha256: {shown(known.get(k))} -> {shown(given.get(k))}"
                for k in sorted(known.keys() | given.keys())
                if known.get(k) != given.get(k)
            ]
            if changed:
                raise UserError(
                    f"{self.path} holds a run with another configuration ({'; '.join(changed)}): choose another "
                    f"--run-dir, or give the same values to continue it"
                )
        elif self.path.is_dir() and any(p != self.lock_file for p in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run (no config.json): choose another --run-dir")

    def settled(self, config: Config) -> Config:
        """`config` with what its `train.memory` auto meant when this run was begun, so that a run stays as it was.

        Not where `optim.accumulate` is not what auto made of the one given: then the user chose anew.
        """
        if config.train.memory != "auto" or not self.config_file.exists():
            return config
        before = self.config()
        if before.optim.accumulate % config.optim.accumulate or before.train.batch_size != config.train.batch_size:
            return config
        return override(config, {"train.memory": before.train.memory, "optim.accumulate": before.optim.accumulate})

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Around a training: no other one can run in this directory. A lock left behind by a kill is taken over.

        Raises UserError where the directory is in use, may be so on another host, or cannot be written.
        """
        return locked(self.path, self.lock_file)

    def open(self, config: Config, manifest: Manifest, preset: str, teacher: dict[str, str] | None = None) -> None:
        """Write the resolved `config` of a run that starts or goes on here, and what `check` compares."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            entry = {
                "preset": preset, **asdict(config), "manifest": asdict(manifest), "teacher": teacher or {},
                "sessions": [*self.sessions(), _this_session()][-_SESSIONS:],
            }  # fmt: skip
            write_atomic(self.config_file, json.dumps(entry, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None

    def config(self) -> Config:
        """The resolved configuration the run was trained with."""
        values = self._config_json()
        for name in ("preset", "manifest", "teacher", "sessions"):
            values.pop(name, None)
        return from_dict(values, str(self.config_file))

    def manifest(self) -> Manifest:
        """What the data of the run was, so that sampling needs the run alone."""
        values, where = self._config_json().get("manifest"), f"{self.config_file}: manifest"
        if not isinstance(values, dict):
            raise UserError(f"{self.config_file}: no description of the data, manifest is {shown(values)}")
        source = values.get("source")
        if not isinstance(source, str) or not one_line(source):
            raise UserError(f"{where}: source is {shown(source)}, expected a path in one line")
        return parse_described(values, where, source)

    def _teacher(self, given: dict[str, str]) -> dict[str, Any]:
        """What the run is aligned with; of a run from before that was written down, `given`."""
        value = self._config_json().get("teacher", given)
        if not isinstance(value, dict):
            raise UserError(f"{self.config_file}: teacher is {shown(value)}, expected an object")
        return value

    def preset(self) -> str:
        """Name of the preset the run started from."""
        return str(self._config_json().get("preset", "?"))[:80]

    def sessions(self) -> list[dict[str, str]]:
        """When, by which command and with which versions the run was begun and continued; none of earlier versions."""
        found = self._config_json().get("sessions") if self.config_file.exists() else None
        if not isinstance(found, list):
            return []
        return [{k: str(s.get(k, "?"))[:2000] for k in _SESSION} for s in found if isinstance(s, dict)][-_SESSIONS:]

    def _config_json(self) -> dict[str, Any]:
        try:
            values = json.loads(files.read_plain(self.config_file))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{self.config_file}: cannot be read as JSON ({told(error)})") from None
        if not isinstance(values, dict):
            raise UserError(f"{self.config_file}: expected a JSON object")
        return values

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines so far, each with its step; what a kill or damage has left of others is left out.

        Damage is said once per process; half a last line, as a kill leaves it, is not worth a word.
        """
        try:
            texts = files.read_plain(self.metrics_file, _METRICS_LIMIT).split(b"\n")
        except FileNotFoundError:
            return []
        lines = [_parsed(text) for text in texts]
        damaged = [i + 1 for i, line in enumerate(lines[:-1]) if line is None]
        if damaged and heard("warning") and str(self.metrics_file) not in _TOLD:
            _TOLD.add(str(self.metrics_file))
            more = f" and {len(damaged) - 1} others are" if len(damaged) > 1 else " is"
            print(f"lsep: warning: {self.metrics_file}: line {damaged[0]}{more} damaged and left out", file=sys.stderr)
        return [line for line in lines if line is not None]

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps after `step`: they belong to steps that are lost and will be run again."""
        kept = [json.dumps(m) + "\n" for m in self.metrics() if m["step"] <= step]
        write_atomic(self.metrics_file, "".join(kept))

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add a line, or, where the disk does not take it, leave the file as it was and raise OSError.

        Raises UserError where the directory is gone.
        """
        try:
            file = files.open_to_append(self.metrics_file)
        except FileNotFoundError:
            raise UserError(
                f"{self.path}: the run's directory is gone, removed or renamed while it trained: put it back and "
                "start the same command again, which goes on from its newest checkpoint"
            ) from None
        with file:
            size, left = os.fstat(file.fileno()).st_size, memoryview(json.dumps(values).encode() + b"\n")
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):  # half a line would spoil the next
                    os.ftruncate(file.fileno(), size)
                raise

    def results(self) -> dict[str, Any]:
        """Figures of the finished run; none where the file is missing or damaged."""
        try:
            values = json.loads(files.read_plain(self.results_file))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}


_FOLDERS = ("tensorboard", "wandb", "probe")
"""Of a run, that others than this module fill."""
_SESSION = ("date", "command", "versions", "threads")
_SESSIONS = 100
"""Of a run that are kept."""
_GRID = re.compile("step-([0-9]{7,15})[.]png", re.ASCII)
_METRICS_LIMIT = 4 << 30
"""Bytes of metrics.jsonl, at most: a line has less than 1 KiB."""
_NUMBERS = (
    "seconds epoch images gpu_seconds loss denoising lsep align grad_norm skipped_steps lr probe_accuracy "
    "images_per_second peak_memory_bytes skipped_rows frechet_distance"
).split()
_BY_TIME = "probe_accuracy_by_time"
_TOLD: set[str] = set()
"""Files whose damage was said."""


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl: a step, and besides it numbers, nulls and lists of them; None for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int or values["step"] < 0:
        return None
    by_time = values.get(_BY_TIME)
    if not isinstance(by_time, list | None):
        return None
    # An integer of more digits than a float has room for would fail where it is drawn.
    fits = all(
        n is None or isinstance(n, float) or (isinstance(n, int) and abs(n) < 2**62)
        for n in (*(values.get(name) for name in _NUMBERS), *(by_time or ()))
    )
    return values if fits else None


def _this_session() -> dict[str, str]:
    versions = [f"Python {platform.python_version()}"]
    for package in ("lsep", "torch", "numpy", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    date = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    torch = sys.modules.get("torch")  # where that was not imported, it has computed nothing
    threads = str(torch.get_num_threads()) if torch else "?"
    return {"date": date, "command": this_command(), "versions": ", ".join(versions), "threads": threads}
