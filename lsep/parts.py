"""The parts of a sampling: files that outlive a kill, and the .npz that is put together of them."""

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lsep import shards
from lsep.errors import UserError, shown
from lsep.files import read_plain, replacing
from lsep.run import write_atomic
from lsep.sample import UNIT

SETTINGS = "settings.json"
"""What decided about samples, beside them or their parts."""
_ROWS = 256
"""Images copied at once when parts are put together."""


class Parts:
    """The parts of a sampling: `part-00000-CRC32.npy` in a folder that is removed in the end."""

    def __init__(self, folder: Path, num: int, batch_size: int) -> None:
        self.folder, self.num = folder, num
        self.size = -(-batch_size // UNIT) * UNIT
        self.count = -(-num // self.size)

    def range(self, index: int) -> tuple[int, int]:
        """First image of a part, and the one after its last."""
        return index * self.size, min((index + 1) * self.size, self.num)

    def open(self, settings: dict[str, Any]) -> None:
        """Begin, or go on with what was drawn under the same settings; raises UserError where they differ."""
        file = self.folder / SETTINGS
        settings = json.loads(json.dumps({**settings, "part": self.size}))
        if self.folder.is_symlink():  # parts are removed in the end, and must be this sampling's own
            raise UserError(f"{self.folder} is a symbolic link, expected a folder of parts or nothing: remove it")
        if file.exists():
            try:
                before = json.loads(read_plain(file))
                known = {"step": before["step"], **before}
                changed = [k for k in settings if known.get(k) != settings[k]]  # earlier versions had fewer
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{file}: not settings of this program, remove {self.folder}") from None
            if changed:
                told = "; ".join(f"{k}: {shown(known.get(k))} -> {shown(settings[k])}" for k in changed)
                raise UserError(
                    f"{self.folder} holds parts of other samples ({told}): remove it or give the same flags"
                )
            return
        try:
            self.folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise UserError(f"{self.folder} is a file, expected a folder of parts or nothing: remove it") from None
        for path in self.folder.glob("part-*.npy"):  # without settings nobody knows what they show
            path.unlink()
        write_atomic(file, json.dumps(settings, indent=2) + "\n")

    def whole(self, index: int) -> Path | None:
        """The file of a part that is there and undamaged; a damaged one is removed."""
        for path in self.folder.glob(f"part-{index:05d}-*.npy"):
            if f"{zlib.crc32(path.read_bytes()):08x}" == path.stem.rpartition("-")[2]:
                return path
            path.unlink()
        return None

    def write(self, index: int, images: np.ndarray) -> None:
        data = io.BytesIO()
        np.save(data, images)
        crc = zlib.crc32(data.getbuffer())
        with replacing(self.folder / f"part-{index:05d}-{crc:08x}.npy", flushed=True) as temporary:
            temporary.write_bytes(data.getbuffer())

    def files(self) -> list[Path]:
        """All parts in order; raises UserError where one is missing."""
        paths = [self.whole(i) for i in range(self.count)]
        missing = [i for i, path in enumerate(paths) if path is None]
        if missing:
            raise UserError(f"{self.folder}: part {missing[0]} is missing or damaged, sample again to draw it")
        return [path for path in paths if path is not None]

    def remove(self) -> None:
        """Settings and parts go as one: parts that a kill left without their settings could be taken for others."""
        shards.remove(self.folder)


def assemble(npz: Path, parts: list[Path], order: np.ndarray, labels: np.ndarray) -> None:
    """Write the images of `parts` in `order` as arr_0, and their labels as arr_1; little of it is in memory at once."""
    first = np.load(parts[0], mmap_mode="r")
    size, shape, kind = len(first), first.shape[1:], first.dtype
    with (
        replacing(npz, flushed=True) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": kind.str, "fortran_order": False, "shape": (len(order), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(order), _ROWS):
                some = order[start : start + _ROWS]
                rows = np.empty((len(some), *shape), kind)
                for row, i in zip(rows, some, strict=True):
                    # Opened anew: an open map holds a file descriptor, and there may be thousands of parts.
                    row[...] = np.load(parts[i // size], mmap_mode="r")[i % size]
                file.write(rows.tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels[order])
