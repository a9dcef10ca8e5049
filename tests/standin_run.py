"""Runs Python on the stand-in for a GPU (standin/standin.c): the real program, on a machine that has none.

    python tests/standin_run.py [--card h100] [--devices 2] [--memory BYTES] [--log FILE] [--observe] -- \\
        python -m lsep train quickstart --train.steps 20

prints, after the command's own output, what it launched, took and did wrong. The Python must have a CUDA build of
torch. Libraries are built when first needed, with gcc against the headers that torch's and Triton's packages bring,
into STANDIN_HOME (default ~/.cache/lsep-standin); csrc needs nvcc, and without it the optimizer's CUDA library is
missing in such a run.
"""

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from standin_log import Log

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "standin"
CARDS = ("h100", "h200", "b200", "a100")


@dataclass(frozen=True)
class Result:
    """What a child left behind."""

    returncode: int
    stdout: str
    stderr: str
    log: Log


def home() -> Path:
    """The folder of built libraries and of compilers' caches."""
    return Path(os.environ.get("STANDIN_HOME") or Path.home() / ".cache" / "lsep-standin")


def _includes() -> list[Path]:
    """The folders of CUDA's headers: in torch's packages, Triton's, and a CUDA toolkit."""
    site = Path(sysconfig.get_paths()["purelib"])
    found = sorted(site.glob("nvidia/*/include"))
    triton = find_spec("triton")
    if triton and triton.origin:
        found.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    toolkit = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return [path for path in (*found, Path(toolkit) / "include") if path.is_dir()]


@cache
def missing() -> str | None:
    """One sentence saying why the stand-in cannot run here, or None."""
    try:
        build = version("torch")
    except PackageNotFoundError:
        return "torch is not installed"
    import torch  # its version string alone does not tell: a build from PyPI has no suffix

    if torch.version.cuda is None:
        return f"torch {build} is a build without CUDA: install one with it (pip install torch==2.14.1)"
    if not torch.version.cuda.startswith("13."):
        return f"torch {build} is for CUDA {torch.version.cuda}: the stand-in is written for CUDA 13"
    if torch.cuda.is_available() and "STANDIN_CARD" not in os.environ:
        return "this machine has a GPU: run the tests on it"
    if not shutil.which("gcc"):
        return "gcc is not installed: the stand-in's library cannot be built"
    for header in (
        "cuda.h",
        "cuda_runtime_api.h",
        "crt/host_defines.h",
        "cublasLt.h",
        "cudnn.h",
        "cusolverDn.h",
        "nccl.h",
    ):
        if not any((folder / header).exists() for folder in _includes()):
            return f"{header} was not found in the packages of torch and Triton, nor in a CUDA toolkit"
    return None


def _built(name: str, sources: Sequence[Path], command: Sequence[str], target: Callable[[str], list[str]]) -> Path:
    """`name` in a folder of home() that is keyed by sources and command; made there when it is not.

    Several processes may come here at once: each builds under a name of its own, the last to be done wins.
    """
    key = hashlib.sha256("\0".join(command).encode())
    for source in sources:
        key.update(source.read_bytes())
    path = home() / key.hexdigest()[:16] / name
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / name
        done = subprocess.run([*command, *target(str(made))], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} cannot be built: {command[0]} ended with {done.returncode}\n{done.stderr}")
        made.rename(path)
    return path


def library() -> Path:
    """The stand-in, built. Raises RuntimeError with the compiler's words where that fails."""
    source = HERE / "standin.c"
    command = ["gcc", "-shared", "-fPIC", "-O2", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1"]
    command += [f"-I{folder}" for folder in _includes()]
    return _built("libcuda.so.1", [source], command, lambda out: ["-o", out, str(source), "-ldl", "-lpthread"])


def csrc() -> Path | str:
    """csrc's CUDA library linked against the shared CUDA runtime, which the stand-in can go before; or why not."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        return "nvcc is not installed: csrc's CUDA library is missing on the stand-in"
    source, header = ROOT / "csrc" / "adamw_ema.cu", ROOT / "csrc" / "adamw_ema.h"
    # One chip's code is enough: none of it runs.
    command = [nvcc, "-shared", "-cudart", "shared", "-O3", "--fmad=false", "-std=c++17", "-arch=sm_90"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return _built("_adamw_ema_cuda.so", [source, header], command, lambda out: ["-o", out, str(source)])


def environment(
    log: Path, card: str, devices: int, memory: int | None, observe: bool, base: Mapping[str, str]
) -> dict[str, str]:
    """The variables of a child on the stand-in."""
    if card not in CARDS:
        raise ValueError(f"card is {card}, expected one of {', '.join(CARDS)}")
    lib, cuda, env = library(), csrc(), dict(base)
    env.pop("TRITON_INTERPRET", None)  # set by tests on a machine without a GPU
    env.pop("CUDA_VISIBLE_DEVICES", None)
    paths = [*([str(HERE / "observer")] if observe else []), str(ROOT), str(ROOT / ".ci" / "typings")]
    first = {"PYTHONPATH": paths, "LD_PRELOAD": [str(lib)], "LD_LIBRARY_PATH": [str(lib.parent)]}
    for name, values in first.items():
        env[name] = ":".join([*values, *filter(None, [env.get(name)])])
    env.setdefault("TRITON_CACHE_DIR", str(home() / "triton"))
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "inductor"))
    env |= {
        "TRITON_LIBCUDA_PATH": str(lib.parent),
        "LSEP_CUDA_LIBRARY": str(cuda) if isinstance(cuda, Path) else str(home() / "not-built-without-nvcc.so"),
        "STANDIN_CARD": card,
        "STANDIN_DEVICES": str(devices),
        "STANDIN_LOG": str(log),
    }
    return env | ({"STANDIN_MEMORY": str(memory)} if memory else {})


def run(
    args: Sequence[str],
    card: str = "h200",
    devices: int = 1,
    memory: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    observe: bool = False,
    cwd: Path | None = None,
    signals: Mapping[float, int] | None = None,
) -> Result:
    """Python with `args` on `devices` cards of `memory` bytes (default: the card's).

    `env` adds to this process's variables. `signals` maps seconds after the start to signals that the child gets.
    Raises subprocess.TimeoutExpired, with the whole group of processes killed, after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        variables = environment(log, card, devices, memory, observe, {**os.environ, **(env or {})})
        child = subprocess.Popen(
            [sys.executable, *args], env=variables, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        try:
            passed = 0.0
            for at, number in sorted((signals or {}).items()):
                try:
                    child.communicate(timeout=at - passed)
                    break
                except subprocess.TimeoutExpired:
                    passed = at
                    child.send_signal(number)
            out, err = child.communicate(timeout=timeout - passed)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            raise
        return Result(child.returncode, out, err, Log.read(log))


def report(log: Log) -> None:
    """A log in words, to stdout."""
    kinds = sorted({x.kind for x in log.launches})
    counts = ", ".join(f"{sum(x.kind == k for x in log.launches)} {k}" for k in kinds)
    print(f"\nlaunches: {counts or 'none'}; waits: {len(log.syncs)}; peak: {log.peak() / 1e9:.3f} GB")
    for pid, number, nodes in log.captures():
        print(f"graph {number} of process {pid}: {nodes} nodes")
    last = log.captured()
    print("the last captured graph:" if last else "all launches:", *log.table(last or None), sep="\n")
    for text in dict.fromkeys(log.violations):
        print(f"violation ({log.violations.count(text)}x): {text}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Run a command on the stand-in for a GPU.")
    parser.add_argument("--card", choices=CARDS, default="h200")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--memory", type=int, help="bytes of each device (default: the card's)")
    parser.add_argument("--log", type=Path, help="keep the log here")
    parser.add_argument("--observe", action="store_true", help="say what each launch moves and does")
    parser.add_argument("command", nargs="+", help="after --: the command")
    given = parser.parse_args(argv)
    reason = missing()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        log = given.log or Path(folder) / "log"
        log.unlink(missing_ok=True)
        env = environment(log, given.card, given.devices, given.memory, given.observe, os.environ)
        command = [
            sys.executable if re.fullmatch(r"python3?", given.command[0]) else given.command[0],
            *given.command[1:],
        ]
        code = subprocess.run(command, env=env).returncode
        report(Log.read(log))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
