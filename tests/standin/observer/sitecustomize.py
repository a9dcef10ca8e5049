"""Python runs this at its start where the folder is on its path: the observer is put in when torch and Triton come."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as it was imported."""

    def __init__(self, calls: dict[str, Callable[[ModuleType], None]]) -> None:
        self.calls = calls

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        call = self.calls.pop(name, None)
        if call is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            call(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _observe(name: str) -> Callable[[ModuleType], None]:
    def call(module: ModuleType) -> None:
        import observer

        getattr(observer, name)(module)

    return call


sys.meta_path.insert(
    0,
    _AfterImport(
        {
            "torch": _observe("watch_torch"),
            "triton.runtime.jit": _observe("watch_triton"),
            "torch._inductor.runtime.triton_heuristics": _observe("watch_inductor"),
        }
    ),
)
