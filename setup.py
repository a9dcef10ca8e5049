"""Packages and native libraries of the distribution; everything else stands in pyproject.toml.

The folder ``kernels/`` installs as ``lsep_kernels`` and has no ``__init__.py``: a top-level package called ``kernels``
would break installs beside Hugging Face's package of that name.

The CUDA library of ``csrc/adamw_ema.cu`` is built when nvcc (CUDACXX, PATH, CUDA_HOME/bin) and cmake are found.
LSEP_BUILD_CUDA=0 never builds it; with LSEP_BUILD_CUDA=1 the install fails without it.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_LIBRARY = "_adamw_ema_cuda.so"


class SkippedError(Exception):
    """Why the CUDA library was not built, in one sentence."""


def environment() -> dict[str, str]:
    """Without the paths of pip's build environment: a cmake that is a Python script would miss its own package."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}


def find_nvcc() -> str:
    homes = [Path(os.environ[k], "bin") for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    names = [os.environ.get("CUDACXX"), "nvcc", *[str(home / "nvcc") for home in homes]]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise SkippedError("nvcc was found neither as CUDACXX, nor on PATH, nor in CUDA_HOME/bin")
    return found


def find_cmake() -> str:
    for folder in os.get_exec_path():
        found = shutil.which("cmake", path=folder)
        if found and not subprocess.run([found, "--version"], capture_output=True, env=environment()).returncode:
            return found
    raise SkippedError("no working cmake was found on PATH")


def build_cuda(folder: Path) -> None:
    """Build the CUDA library into `folder`; SkippedError where that is not possible."""
    nvcc, cmake = find_nvcc(), find_cmake()
    if not Path("CMakeLists.txt").exists():
        raise SkippedError("CMakeLists.txt is missing from these sources")
    folder.mkdir(parents=True, exist_ok=True)
    # Whatever happens next, no library of older sources stays; a process that runs with it keeps its file.
    (folder / CUDA_LIBRARY).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as build:
        setting = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DLSEP_OUTPUT={build}", "-DLSEP_CUDA=ON", "-DLSEP_HOST=OFF"]
        for command in ([cmake, "-S", ".", "-B", build, *setting], [cmake, "--build", build]):
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
            )
            if done.returncode:
                raise SkippedError(f"{' '.join(command[:3])} failed:\n{done.stdout[-4000:]}")
        shutil.copy(Path(build, CUDA_LIBRARY), folder)


class Build(build_ext):
    """The extensions, then the CUDA library, with one notice of what became of it."""

    def run(self) -> None:
        wanted = os.environ.get("LSEP_BUILD_CUDA") or "auto"
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"LSEP_BUILD_CUDA is {wanted!r}, expected 0 (never), 1 (required) or unset (if possible)")
        in_place = self.inplace  # as for pip install -e
        super().run()
        if wanted == "0":
            print("lsep: CUDA library not built: LSEP_BUILD_CUDA=0", flush=True)
            return
        try:
            build_cuda(Path("kernels") if in_place else Path(self.build_lib, "lsep_kernels"))
        except SkippedError as why:
            if wanted == "1":
                raise SystemExit(f"lsep: LSEP_BUILD_CUDA=1, but the CUDA library was not built: {why}") from None
            print(f"lsep: CUDA library not built, everything else works without it: {why}", flush=True)
        else:
            print("lsep: CUDA library built", flush=True)


setup(
    packages=["lsep", "lsep.cost", "lsep.data", "lsep.evaluate", "lsep.separability", "lsep.weights", "lsep_kernels"],
    package_dir={"lsep": "lsep", "lsep_kernels": "kernels"},
    # Plain shared libraries, loaded with ctypes; without a compiler the build goes on and Python does their work.
    ext_modules=[
        Extension("lsep._rows", ["csrc/rows.c"], extra_compile_args=["-O3"], optional=True),
        Extension(
            "lsep_kernels._adamw_ema_host",
            ["csrc/adamw_ema.cpp"],
            depends=["csrc/adamw_ema.h", "csrc/adamw_ema.cu", "CMakeLists.txt"],  # part of a source distribution
            language="c++",
            # -ffp-contract=off: the same bits on every machine, and on a GPU.
            extra_compile_args="-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math".split(),
            optional=True,
        ),
    ],
    cmdclass={"build_ext": Build},
)
