"""The files of a folder or of a zip archive, named by their relative path with `/`.

Sizes are looked at before memory is taken: an archive of 3 MB can promise a file of 3 GB.
"""

import os
import re
import zipfile
from pathlib import Path

from lsep.data.regular import open_regular, read_regular
from lsep.errors import UserError, told

JSON_LIMIT = 256 << 20
"""Bytes of a list of labels: 1.28 million images have 50 MB."""
ROW_LIMIT = 64 << 20
"""Bytes of one row's file: a latent of 512 pixels has 0.5 MB."""
_LARGE, _RATIO = 16 << 20, 100
"""Files of an archive above so many bytes must not unpack to more than so many times theirs; lists of labels are 10."""
Names = list[str]


class Tree:
    """Files to be listed and read, from several threads at once."""

    def __init__(self, path: Path, what: str = "latents") -> None:
        """what: names the expected content in errors."""
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._names: frozenset[str] = frozenset()
        if not path.is_dir():
            try:
                self._zip = zipfile.ZipFile(open_regular(path))  # open as long as the source
            except FileNotFoundError:
                raise UserError(f"{path}: does not exist, expected a folder or a zip archive of {what}") from None
            except Exception as error:  # as in read
                raise UserError(f"{path}: expected a folder or a zip archive of {what} ({told(error)})") from None
            self._names = frozenset(n for n in self._zip.namelist() if not n.endswith("/"))

    @property
    def archive(self) -> bool:
        """Whether it is a zip archive."""
        return self._zip is not None

    def has(self, name: str) -> bool:
        return name in self._names if self._zip else (self.path / name).is_file()

    def has_folder(self, name: str) -> bool:
        if self._zip:
            return any(n.startswith(name + "/") for n in self._names)
        return (self.path / name).is_dir()

    def folders(self) -> Names:
        """Names of the folders at the top, also of those without files."""
        if self._zip:
            return sorted({n.partition("/")[0] for n in self._zip.namelist() if "/" in n})
        return sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir())

    def list(self, folder: str, pattern: str) -> Names:
        """Names below `folder` ("" for all) whose last part matches the regular expression, sorted as strings."""
        match = re.compile(pattern).fullmatch
        if self._zip:
            under = folder and folder + "/"
            return sorted(n for n in self._names if n.startswith(under) and match(n.rpartition("/")[2]))
        return sorted(name for name in self._walk(folder) if match(name.rpartition("/")[2]))

    def _walk(self, folder: str) -> Names:
        """All files below a folder, through links too, but for one that leads back to where it is."""
        top = str(self.path / folder) if folder else str(self.path)
        found, ways = [], {top: {os.path.realpath(top)}}
        for base, folders, files in os.walk(top, followlinks=True):
            way = ways.pop(base)
            for name in [*folders]:
                below = os.path.join(base, name)  # noqa: PTH118 - as os.walk joins them
                place = os.path.realpath(below)
                if place in way:
                    folders.remove(name)
                else:
                    ways[below] = way | {place}
            relative = os.path.relpath(base, self.path)
            found += files if relative == "." else [f"{relative}/{file}" for file in files]
        return found

    def read(self, name: str, limit: int = ROW_LIMIT) -> bytes:
        """A whole file of at most `limit` bytes."""
        try:
            if self._zip is None:
                return read_regular(self.path / name, limit)
            info = self._zip.getinfo(name)
            size = info.file_size  # more than it says is never unpacked
            if size > limit:
                raise ValueError(f"{size} bytes found, expected at most {limit}")
            if size > _LARGE and size > _RATIO * info.compress_size:  # nested lists take 20 times their text in memory
                raise ValueError(f"{size} bytes packed in {info.compress_size}, expected at most {_RATIO} for each")
            return self._zip.read(name)
        except Exception as error:  # zipfile meets damage with anything from EOFError to UnicodeDecodeError
            found = error.strerror if isinstance(error, OSError) and error.strerror else told(error)
            raise UserError(f"{self.where(name)}: cannot be read ({found}), expected a whole file") from None

    def where(self, name: str) -> str:
        """The file's name in messages."""
        return f"{self.path}:{name}" if self._zip else str(self.path / name)
