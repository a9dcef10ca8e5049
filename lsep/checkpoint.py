"""Checkpoints: weights, EMA and optimizer state, written while training goes on; whole or not there at all.

    RUN/checkpoints/0000200/shard-00000-{model,ema,optimizer}.safetensors, manifest.json
    RUN/ema/0000200/         likewise, with the averages that `lsep ema reconstruct` makes others of

All processes save together, each what it holds, through `torch.distributed.checkpoint`; any number of processes loads
it, whole or in shards. A checkpoint is written under a temporary name, flushed to the disk and renamed, so that a kill
or a full disk leaves the earlier ones as they were, and its files are checked (`lsep.shards`) before they are used.
All randomness is a function of seed and step: the step is the whole random state.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lsep import shards
from lsep.errors import UserError, shown
from lsep.files import discard
from lsep.objective import Objective
from lsep.optim import Optimizer
from lsep.voice import heard

# A single process is the common case here, not a mistake.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
HEADS = ("classifier.", "projectors.")
"""First words of the names of weights that are not the backbone's."""

_TABLES = ("ema.y_embedder.embedding_table.weight", "ema.unet.class_embedding.weight")


@dataclass(frozen=True)
class Progress:
    """How far a run has come; a field with a default may be missing in a checkpoint."""

    step: int
    """Optimizer steps done."""
    seconds: float
    """Time spent in training steps, over all sessions of the run."""
    gpu_seconds: float = 0.0
    """Time that GPUs spent in them, summed over GPUs."""
    data_offset: int = 0
    """Steps whose data was left out after loss spikes."""


class World(Protocol):
    """This process among those that train together."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


class Saved(Protocol):
    """What a save needs of an optimizer, see `lsep.optim.Optimizer`."""

    before_step: Callable[[], object]

    def tensors(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Alone:
    """A world of one process, without a process group."""

    rank: int = 0
    size: int = 1


def weights(objective: nn.Module) -> dict[str, Tensor]:
    """All weights under the published names: the backbone's without prefix, the probe's as `classifier.*`."""
    return {k.removeprefix("model."): v for k, v in objective.state_dict().items()}


class Checkpoints:
    """The checkpoints of a run under training. All processes make one, and call its methods at the same places."""

    def __init__(self, folder: Path, keep_last: int = 0, keep_every: int = 0, world: World | None = None) -> None:
        """keep_last, keep_every: see `prune`. What a kill left behind in `folder` is removed."""
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.world: World = world or Alone()
        # The writing threads talk among themselves, while the training uses the other groups.
        several = self.world.size > 1
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if several else None
        self.cuda = torch.cuda.is_available()
        # What DefaultStager is made of: that one clears itself after each use under torch 2.11. This one's memory is
        # pinned once and used again.
        self.stager = StateDictStager(pin_memory=self.cuda)
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[str | None] | None = None
        self.failure: str | None = None
        """Why the last checkpoint could not be written, if so."""
        if self.world.rank == 0:
            for left in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
                discard(left)

    def save(
        self,
        progress: Progress,
        objective: Objective,
        ema: Objective,
        optimizer: Saved,
        averages: Mapping[str, Objective] = MappingProxyType({}),
    ) -> None:
        """Copy the state to the host's memory and write it from there, while training goes on.

        From a GPU all is copied when this returns; on a CPU, which would stand still for it, before the next update.
        Waits for the save before. A disk that does not take it is a warning at the next call, and `finish`'s error.
        averages: those beside `ema`, by the names of their parts.
        """
        self._save(progress, _state(objective, ema, optimizer.tensors(), averages), optimizer)

    def save_averages(self, progress: Progress, averages: Mapping[str, Objective]) -> None:
        """As `save`, of averages alone; all is copied when this returns, on a CPU too."""
        self._save(progress, _parts(averages), None)

    def _save(self, progress: Progress, whole: dict[str, Tensor], optimizer: Saved | None) -> None:
        self.wait()
        state, copied = self._deal(whole), threading.Event()
        if self.cuda or optimizer is None:
            state = self._copy(state, copied)
        else:
            optimizer.before_step = copied.wait
        self.writing = self.thread.submit(self._write, progress, state, copied)

    def wait(self) -> None:
        """Wait until what was saved is on the disk, or warn that it is not."""
        if self._settle():
            self._warn(f"{self.failure}; training goes on, and the next checkpoint is tried")

    def finish(self) -> None:
        """Wait for the last save of a training; raises UserError when the disk did not take it."""
        self._settle()
        if self.failure:
            raise UserError(self.failure)

    def _settle(self) -> bool:
        """Wait for the write under way; whether there was one, and the disk did not take it."""
        if self.writing is None:
            return False
        writing, self.writing = self.writing, None
        self.failure = writing.result()
        return self.failure is not None

    def close(self) -> None:
        """Wait for what is being written and give the memory back."""
        try:
            if self._settle():
                self._warn(str(self.failure))
        finally:
            self.thread.shutdown()
            self.stager.close()

    def load_newest(
        self,
        objective: Objective,
        ema: Objective,
        optimizer: Optimizer,
        strict: bool = False,
        averages: Mapping[str, Objective] = MappingProxyType({}),
    ) -> Progress | None:
        """Load the newest whole checkpoint, None where there is none at all; a damaged one is named and passed over.

        Raises UserError where all are damaged, and with `strict` where the newest is.
        """
        choice: list[Any] = [None, None]
        if self.world.rank == 0:
            try:
                choice[0] = self._newest_whole(strict)
            except UserError as error:
                choice[1] = str(error)
        if self.group is not None:
            dist.broadcast_object_list(choice, src=0, group=self.group)
        path, damage = choice
        if damage is not None:
            raise UserError(damage)
        return None if path is None else load(path, objective, ema, optimizer, averages)

    def _newest_whole(self, strict: bool) -> Path | None:
        found = steps(self.folder)
        for path in reversed(found):
            damage = shards.problems(path)
            if not damage:
                return path
            if strict:
                raise UserError(f"{damage[0]} (--strict); without it the checkpoint before is used")
            self._warn(f"{damage[0]}; the checkpoint before is used")
        if found:
            raise UserError(f"{self.folder}: all {len(found)} checkpoints are damaged, see lsep checkpoint verify")
        return None

    def _deal(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's share: its part of what is sharded, and some of what all have, by size."""
        held: dict[str, Tensor] = {k: v for k, v in state.items() if isinstance(v, DTensor)}
        loads = [0] * self.world.size
        for name in sorted(state.keys() - held.keys(), key=lambda name: (-state[name].nbytes, name)):
            rank = loads.index(min(loads))
            loads[rank] += state[name].nbytes
            if rank == self.world.rank:
                held[name] = state[name]
        return held

    def _copy(self, state: dict[str, Tensor], copied: threading.Event) -> dict[str, Tensor]:
        try:
            staged = self.stager.stage(state, non_blocking=self.cuda)
            if self.cuda:
                torch.cuda.synchronize()
        finally:
            copied.set()
        assert isinstance(staged, dict)
        return staged

    def _write(self, progress: Progress, state: dict[str, Tensor], copied: threading.Event) -> str | None:
        """In the thread: copy, unless done, write, rename, prune; a sentence where the disk does not take it."""
        staged = state if copied.is_set() else self._copy(state, copied)
        target, main = self.folder / f"{progress.step:07d}", self.world.rank == 0
        values = {**asdict(progress), "torch": torch.__version__, "world": self.world.size}
        writer = shards.Writer(target, self.world.rank, values)
        try:
            dcp.save(staged, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        except CheckpointException as failed:
            if main:
                discard(writer.temporary)
            error = next(iter(failed.failures.values()))[0]
            if not isinstance(error, OSError):
                raise error from None
            kept = latest(self.folder)
            return f"{target}: the checkpoint could not be written ({error.strerror or error}); " + (
                f"the one before, {kept.name}, is intact" if kept else "there is no earlier one"
            )
        if main:
            try:
                prune(self.folder, self.keep_last, self.keep_every, progress.step)
            except OSError as error:
                self._warn(f"{self.folder}: earlier checkpoints could not be removed ({error.strerror or error})")
        return None

    def _warn(self, text: str) -> None:
        if self.world.rank == 0 and heard("warning"):
            tqdm.write(f"lsep: warning: {text}", file=sys.stderr)  # does not tear the progress bar


def _state(
    objective: Objective,
    ema: Objective,
    optimizer: dict[str, Tensor],
    averages: Mapping[str, Objective] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """All tensors of a checkpoint under their names in it."""
    moments = {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}
    return _parts({"model": objective, "ema": ema, **averages}) | moments


def _parts(modules: Mapping[str, Objective]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part, module in modules.items() for name, tensor in weights(module).items()}


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or damaged, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()), key=lambda p: int(p.name))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`, or None."""
    found = steps(folder)
    return found[-1] if found else None


def find(folder: Path, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest; raises UserError where there is none."""
    found = steps(folder)
    for path in reversed(found):
        if step is None or int(path.name) == step:
            return path
    have = ", ".join(str(int(p.name)) for p in found) or "none"
    raise UserError(f"{folder}: no checkpoint{'' if step is None else f' of step {step}'}, found: {have}")


def prune(folder: Path, keep_last: int, keep_every: int, step: int) -> None:
    """Remove checkpoints up to `step` but the `keep_last` newest and the multiples of `keep_every`; 0 newest means all.

    Later ones, passed over as damaged, do not count: they must not crowd out whole ones.
    """
    for path in [p for p in steps(folder) if int(p.name) <= step][:-keep_last] if keep_last else ():
        if not keep_every or int(path.name) % keep_every:
            shards.remove(path)


def progress_of(path: Path) -> Progress:
    """How far the run had come at the checkpoint `path`; raises UserError where its manifest does not say."""
    values = shards.read_manifest(path).values
    known: dict[str, Any] = {}
    for field in fields(Progress):
        value = values.get(field.name, field.default)
        if value is MISSING or isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**62:
            found = "missing" if value is MISSING else shown(value)
            raise UserError(f"{path / shards.MANIFEST}: {field.name} is {found}, expected a number")
        known[field.name] = value
    return Progress(**known)


def load(
    path: Path, objective: Objective, ema: Objective, optimizer: Optimizer,
    averages: Mapping[str, Objective] = MappingProxyType({}),
) -> Progress:  # fmt: skip
    """Put a checkpoint into modules and optimizer of the same configuration; raises UserError when it does not fit.

    Reads from its files what this process holds; their contents must have been checked.
    """
    progress, found = progress_of(path), shards.describe(path, (*shards.PARTS, *averages))
    state = _state(objective, ema, optimizer.templates(), averages)
    for part in ("model", "ema", *averages):
        _require_fit(path, part, found, state)
    states = sorted(name for name in found if name.startswith("optimizer."))
    for name in states:
        own = name.removeprefix("optimizer.")
        if name not in state:
            raise UserError(f"{path}: unknown tensor {shown(own)}")
        if found[name].shape != state[name].shape:
            shape = shown(tuple(found[name].shape))
            raise UserError(f"{path}: {own} is {shape}, expected {tuple(state[name].shape)}")
    wanted = {name: tensor for name, tensor in state.items() if name in found}
    _read(path, wanted)
    try:
        optimizer.load({name.removeprefix("optimizer."): wanted[name] for name in states})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return progress


def load_weights(path: Path, part: str, objective: Objective) -> None:
    """Weights of the checkpoint `path`, `part` "model", "ema" or another average; its files are checked first.

    Raises UserError where one is damaged, and for every missing, unknown or misshapen tensor.
    """
    for problem in shards.problems(path, (part,)):
        raise UserError(problem)
    state = {f"{part}.{name}": tensor for name, tensor in weights(objective).items()}
    _require_fit(path, part, shards.describe(path, (part,)), state)
    _read(path, state)


def start_from(path: Path, objective: Objective) -> list[str]:
    """Fill `objective` with the averaged weights of the checkpoint `path` of another run (`train.init`).

    Positions are the objective's own, whatever its grid; a classifier or projector that does not fit, or is missing,
    stays as initialised, and so do the rows of the classes where there are others, but for that of no label. Returns
    sentences on the latter. Raises UserError where the checkpoint is damaged or the backbones differ.
    """
    for problem in shards.problems(path, ("ema",)):
        raise UserError(problem)
    found, taken = shards.describe(path, ("ema",)), {}
    heads = tuple(f"ema.{head}" for head in HEADS)
    table: Tensor | None = None
    said_of: list[str] = []
    own = {f"ema.{name}": tensor for name, tensor in weights(objective).items() if name != "pos_embed"}
    for name, tensor in own.items():
        there = found.pop(name, None)
        if there is not None and there.shape == tensor.shape:
            taken[name] = tensor
        elif there is not None and name in _TABLES and there.shape[1:] == tensor.shape[1:]:
            taken[name], table = torch.empty(there.shape), tensor
            said = (
                f"the label table is new: {len(there) - 1} classes there, {len(tensor) - 1} here; its row of no label"
            )
            said_of.append(f"{said} is kept ({name[4:]})")
        elif not name.startswith(heads):
            has, here = "none" if there is None else str(tuple(there.shape)), tuple(tensor.shape)
            raise UserError(f"--train.init: {name[4:]} is {has} there and {here} in this configuration ({path})")
    unknown = sorted(found.keys() - {"ema.pos_embed"} - {n for n in found if n.startswith(heads)})
    if unknown:
        raise UserError(f"--train.init: {unknown[0][4:]} is there and not in this configuration's model ({path})")
    _read(path, taken)
    if table is not None:
        with torch.no_grad():  # the last row is that of no label
            table[-1] = next(taken[name] for name in _TABLES if name in taken)[-1]
    return said_of


def read_tensors(path: Path, part: str) -> dict[str, Tensor]:
    """All tensors of a part ("model", "ema", "optimizer", "power_0_05") of the checkpoint `path`, whole, on the CPU."""
    state = {k: torch.empty_like(v, device="cpu") for k, v in shards.describe(path, (part,)).items()}
    _read(path, state)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items()}


def _require_fit(path: Path, part: str, found: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise UserError for a missing, unknown or misshapen tensor of `part`."""
    prefix = f"{part}."
    own, there = ({k.removeprefix(prefix) for k in names if k.startswith(prefix)} for names in (state, found))
    for kind, names in (("missing", own - there), ("unknown", there - own)):
        if names:
            raise UserError(f"{path}: {len(names)} {kind} tensors for this model, the first {shown(min(names))}")
    for name in sorted(own):
        shape, expected = found[prefix + name].shape, state[prefix + name].shape
        if shape != expected:
            raise UserError(f"{path}: {name} is {shown(tuple(shape))}, expected {tuple(expected)}")


def _read(path: Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state`, or this process's shards of them, from the files of a checkpoint."""
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
