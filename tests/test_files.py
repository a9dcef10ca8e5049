"""Files among those of strangers: no link is followed, no name can be foreseen, modes are the umask's."""

import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MANIFEST, tiny
from safetensors.torch import save_file

from lsep import checkpoint, files, pages, report, sample
from lsep.checkpoint_commands import gather
from lsep.checks import resolve
from lsep.errors import UserError
from lsep.evaluate import archives
from lsep.metrics import Logger
from lsep.parts import Parts, assemble
from lsep.run import Run
from lsep.samples import Request, sample_run
from lsep.train import train
from lsep.weights.exporting import export


def grid(path: Path) -> None:
    sample.save_grid(np.zeros((4, 8, 8, 1), np.uint8), path)


def figure(path: Path) -> None:
    from matplotlib.figure import Figure

    pages.save_png(Figure(figsize=(1, 1)), path)


def npz(path: Path) -> None:
    part = path.with_name("part-00000-0.npy")
    np.save(part, np.zeros((2, 4, 4, 1), np.uint8))
    assemble(path, [part], np.arange(2), np.zeros(2, np.int64))


def shard(path: Path) -> None:
    with files.replacing(path) as temporary:
        save_file({"a": torch.zeros(2)}, temporary)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: files.write_atomic(path, "new"),
    "grid": grid,
    "figure": figure,
    "statistics": lambda path: archives.write(path, {"mu": np.zeros(3)}),
    "samples": npz,
    "safetensors": shard,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_no_write_follows_a_link_or_has_a_name_to_foresee(tmp_path: Path, writer: str) -> None:
    """Neither the names that earlier versions wrote under, nor the target itself, lead to another file."""
    victim = tmp_path / "precious"
    victim.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "file.npz"
    for name in ("file.npz", "file.npz.tmp", ".file.npz.tmp", ".file.npz"):
        (folder / name).symlink_to(victim)
    WRITERS[writer](target)
    assert victim.read_text() == "precious"
    assert target.is_file() and not target.is_symlink()
    assert not [p for p in folder.iterdir() if not p.is_symlink() and p != target and not p.name.startswith("part-")]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_decides_over_modes(tmp_path: Path, writer: str, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        WRITERS[writer](tmp_path / "file.npz")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.npz").stat().st_mode) == mode


def test_all_files_of_runs_and_exports_have_the_modes_of_the_umask(store: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run = train(tiny(data__path=str(store), train__steps=4, sample__num=4, sample__steps=2), tmp_path / "run")
        for form in ("safetensors", "sit", "diffusers"):
            export(run, form, tmp_path / form)  # type: ignore[arg-type]
        gather(run.checkpoints / "0000004", tmp_path / "gathered")
        for out in (run.path, *(tmp_path / name for name in ("safetensors", "sit", "diffusers", "gathered"))):
            for path in (out, *out.rglob("*")):
                wanted = 0o750 if path.is_dir() else 0o640
                assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    finally:
        os.umask(before)


def test_an_error_leaves_nothing_behind_and_the_old_file_whole(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "a", "old")
    with pytest.raises(KeyError), files.replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError
    with pytest.raises(KeyError), files.new_folder(tmp_path / "b") as folder:
        (folder / "half").write_text("")
        raise KeyError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_what_kills_have_left_is_swept_by_the_next_write(tmp_path: Path) -> None:
    """Only of the same file, and only what is too old for a write that is under way."""
    names = [files._unforeseen(tmp_path / name).name for name in ("a", "a", "a.b", "b")]
    for name in names:
        (tmp_path / name).write_text("half")
    old = time.time() - 2 * 3600
    for name in (names[0], names[2], names[3]):
        os.utime(tmp_path / name, (old, old))
    files.write_atomic(tmp_path / "a", "")
    assert {p.name for p in tmp_path.iterdir()} == {"a", *names[1:]}


@pytest.fixture
def kinds(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """A path of each kind that is no plain file."""
    folder = tmp_path / "kinds"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    found = {k: folder / k for k in ("link", "dangling", "folder", "pipe", "socket")}
    found["link"].symlink_to(tmp_path / "secret")
    found["dangling"].symlink_to(tmp_path / "nothing")
    found["folder"].mkdir()
    os.mkfifo(found["pipe"])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(found["socket"]))
        yield found
    assert (tmp_path / "secret").read_text() == "secret" and not (tmp_path / "nothing").exists()


SAID = {
    "link": "is a symbolic link, which is not followed, expected a plain file",
    "dangling": "is a symbolic link, which is not followed, expected a plain file",
    "folder": "is a folder, expected a plain file",
    "pipe": "is a pipe, expected a plain file",
    "socket": "is a device or socket, expected a plain file",
}


@pytest.mark.parametrize("kind", SAID)
def test_only_plain_files_are_read_and_added_to(kinds: dict[str, Path], kind: str) -> None:
    for use in (files.read_plain, files.open_to_append, files.require):
        with pytest.raises(UserError, match=f"{kinds[kind]}: {SAID[kind]}"):
            use(kinds[kind])
    assert files.read_plain(kinds["link"].parent.parent / "secret") == b"secret"
    with pytest.raises(UserError, match="has 6 bytes, expected at most 5"):
        files.read_plain(kinds["link"].parent.parent / "secret", limit=5)


SMALL = (
    "config.json",
    "metrics.jsonl",
    "results.json",
    "report.html",
    "lock",
    "wandb-id",
    "projectors.safetensors",
    "reference.npz",
)
FOLDERS = ("checkpoints", "ema", "samples", "tensorboard", "wandb", "probe")


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("name", [*SMALL, *FOLDERS])
def test_what_a_run_holds_is_what_its_name_says(kinds: dict[str, Path], tmp_path: Path, name: str, kind: str) -> None:
    """Whether it is used or trained on: nothing is read, and nothing written."""
    if (name, kind) in {(folder, "folder") for folder in FOLDERS}:
        return
    config = resolve(tiny(), MANIFEST)
    run = Run(tmp_path / "run")
    run.open(config, MANIFEST, "x")
    place = run.path / name
    place.unlink(missing_ok=True)
    kinds[kind].rename(place)
    expected = f"{place}: is .*expected {'a folder' if name in FOLDERS else 'a plain file'}: remove it"
    with pytest.raises(UserError, match=expected):
        Run.existing(run.path)
    with pytest.raises(UserError, match=expected):
        run.check(config, MANIFEST)
    with pytest.raises(UserError, match=expected):
        train(tiny(), run.path)
    place.rename(kinds[kind])


def test_checkpoints_that_are_a_file_are_said_before_anything_is_trained(store: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints: is a file, expected a folder"):
        train(tiny(data__path=str(store)), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_a_linked_run_directory_is_its_user_s_own_choice(store: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    train(tiny(data__path=str(store), train__steps=2), tmp_path / "run")
    assert Run.existing(tmp_path / "run").results()["steps"] == 2


def test_pictures_that_are_none_are_not_in_the_report(kinds: dict[str, Path], tmp_path: Path) -> None:
    """Only pictures of the run's own names, that are whole PNGs."""
    run = Run(tmp_path / "run")
    run.open(resolve(tiny(), MANIFEST), MANIFEST, "x")
    grid(run.grid(2))
    whole = run.grid(2).read_bytes()
    run.grid(4).symlink_to(tmp_path / "secret")
    run.grid(6).mkdir()
    run.grid(8).write_bytes(b"GIF89a")
    run.grid(10).write_bytes(whole[:-20])
    run.grid(12).write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    os.mkfifo(run.grid(14))
    (tmp_path / "other.png").write_bytes(whole)
    run.grid(16).symlink_to(tmp_path / "other.png")
    for name in ("step-0000002 (copy).png", "step-2.png", "step-x.png", "step-<b>.png", "other.png"):
        (run.samples / name).write_bytes(whole)
    page = report.render(run).read_text()
    assert page.count("<img alt=") == 1 and "step 2<" in page
    for step, problem in (
        (4, "is a symbolic link"), (6, "is a folder"), (8, "is no PNG"), (10, "is damaged"), (12, "is damaged"),
        (14, "is a pipe"), (16, "is a symbolic link"),
    ):  # fmt: skip
        assert f"<p>step-{step:07d}.png {problem}" in page


def test_a_checkpoint_that_is_a_link_is_no_checkpoint(store: Path, tmp_path: Path) -> None:
    run = train(tiny(data__path=str(store), train__steps=4), tmp_path / "run")
    (run.checkpoints / "0000004").rename(tmp_path / "elsewhere")
    (run.checkpoints / "0000004").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="0000004.*the checkpoint is a symbolic link, expected a folder"):
        sample.load_ema(run)


def test_what_is_removed_of_checkpoints_is_their_own(tmp_path: Path) -> None:
    """A link among them goes itself; what it leads to stays."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (".0000006.tmp", ".0000002.old", "0000003"):
        (folder / name).symlink_to(tmp_path / "photos")
    checkpoint.Checkpoints(folder).close()
    checkpoint.prune(folder, 0, 0, 9)
    (folder / "0000004").mkdir()
    checkpoint.prune(folder, 1, 0, 9)
    assert (tmp_path / "photos" / "one.jpg").exists() and [p.name for p in folder.iterdir()] == ["0000004"]


def test_parts_of_a_sampling_in_a_linked_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "part-00000-1.npy").write_text("precious")
    (tmp_path / "parts").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="parts is a symbolic link, expected a folder of parts"):
        Parts(tmp_path / "parts", 4, 32).open({})
    assert (tmp_path / "mine" / "part-00000-1.npy").read_text() == "precious"


def test_the_id_for_wandb_is_not_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    (tmp_path / "wandb-id").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="wandb-id: is a symbolic link"):
        Logger(Run(tmp_path), 0, 10, "project", {})
    assert not (tmp_path / "nothing").exists()


def test_samples_in_a_run_do_not_go_through_a_link(store: Path, tmp_path: Path) -> None:
    """A linked folder that the user names is the user's choice."""
    run = train(tiny(data__path=str(store), train__steps=2, sample__num=4, sample__steps=1), tmp_path / "run")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "samples.npz").write_text("precious")
    default = run.samples / "step-0000002-ode-1-cfg-1-seed-0"
    default.symlink_to(mine)
    given = (run, run.config(), Request(), (1.0,))
    with pytest.raises(UserError, match="seed-0: is a symbolic link, which is not followed, expected a folder"):
        sample_run(*given, None, None, "cpu")
    assert (mine / "samples.npz").read_text() == "precious"
    sample_run(*given, default, None, "cpu")
    assert (mine / "samples.npz").stat().st_size > 100
