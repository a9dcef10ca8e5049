"""A function of the user's, named `MODULE:FUNCTION` or `FILE.py:FUNCTION` on the command line."""

import functools
import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lsep.errors import UserError, out_of_memory, shown, told


def load_function(flag: str, name: str, also: str = "") -> Callable[..., Any]:
    """The function `name`; UserError, naming `flag`, where it cannot be had. `also`: what else could be named."""
    place, _, function_name = name.rpartition(":")
    if not place or not function_name:
        raise UserError(f"{flag} is {shown(name)}, expected {also}MODULE:FUNCTION or FILE.py:FUNCTION")
    module = load_module(flag, place)
    try:
        function = getattr(module, function_name, None)
        if not callable(function):
            raise UserError(f"{flag} {name}: {place} has no function {function_name!r}")
        inspect.signature(function)
    except UserError:
        raise
    except Exception as error:  # of a function in C, or of a module's own __getattr__
        raise UserError(
            f"{flag} {name}: what it takes cannot be told ({told(error)}), expected a function written in Python"
        ) from None
    return _explained(function, f"{flag} {name}")


def _explained(function: Callable[..., Any], where: str) -> Callable[..., Any]:
    """`function`, whose errors are sentences that say where in the user's code they come from."""

    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        try:
            return function(*args, **given)
        except UserError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            frames = traceback.extract_tb(error.__traceback__)[1:]  # without this one
            line = f", at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
            raise UserError(f"{where}: the function failed ({told(error)}){line}") from error

    return call


def load_module(flag: str, place: str) -> ModuleType:
    """The module of a name, or of a .py file; raises UserError, naming `flag`, where it cannot be had."""
    path = Path(place)
    try:
        if path.suffix == ".py" and not path.is_file():
            raise UserError(f"{flag}: {place[:200]} does not exist, expected a Python file")
        if path.suffix != ".py":
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"lsep_function_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's own code; a script may end the program
        raise UserError(f"{flag}: {place[:200]} cannot be imported ({told(error)})") from error
