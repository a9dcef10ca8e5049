"""A function of the user's, named `MODULE:FUNCTION` or `FILE.py:FUNCTION` on the command line."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lsep.errors import UserError, shown, told


def load_function(flag: str, name: str, also: str = "") -> Callable[..., Any]:
    """The function `name`; UserError, naming `flag`, where it cannot be had. `also`: what else could be named."""
    place, _, function_name = name.rpartition(":")
    if not place or not function_name:
        raise UserError(f"{flag} is {shown(name)}, expected {also}MODULE:FUNCTION or FILE.py:FUNCTION")
    function = getattr(load_module(flag, place), function_name, None)
    if not callable(function):
        raise UserError(f"{flag} {name}: {place} has no function {function_name!r}")
    return function


def load_module(flag: str, place: str) -> ModuleType:
    """The module of a name, or of a .py file; raises UserError, naming `flag`, where it cannot be had."""
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise UserError(f"{flag}: {place} does not exist, expected a Python file")
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"lsep_function_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # a user's own code
        raise UserError(f"{flag}: {place} cannot be imported ({told(error)})") from error
