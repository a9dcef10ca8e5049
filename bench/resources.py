"""What the compiler made of every Triton kernel: registers, spills, shared memory, matrix instructions. No GPU needed.

    python -m bench.resources [--arch 90 80] [--json FILE] [--markdown FILE]
    python -m bench.resources --collected FOLDER [--json FILE] [--markdown FILE]

Every operator is called at the shapes of SiT-XL/2 (and S/2, for heads of 64) with a driver that compiles and does not
launch, so what is compiled is what a step without torch.compile launches. With `--collected` nothing is compiled: the
binaries are those that a run left in its cache (TRITON_CACHE_DIR, or below TORCHINDUCTOR_CACHE_DIR), Inductor's own
kernels among them. The exit code is 1 on a spill, on an instruction in double precision, on more shared memory than a
block may have, and on sm_90 on a kernel of half-precision matrix products without WGMMA (`HGMMA`) or one that waits
(`WARPGROUP.DEPBAR`) after every one of them: ptxas serialises them when registers run out. Beside each operator stands
its floor on an H200, the longer of its bytes and its matrix products at the rates of `lsep.cost.cards`; GELU, a pass of
its own, is added to the products beside it (`lsep.cost.operations`).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.environ.pop("TRITON_INTERPRET", None):
    print("TRITON_INTERPRET is set and was taken away: this compiles", file=sys.stderr)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lsep.cost.cards import CARDS
from lsep.cost.operations import floor
from lsep_kernels import adaln, attention, fp8, gelu_pool, interpolate, mlp, probe_head, velocity_loss
from lsep_kernels.draws import normal, uniform, windows
from lsep_kernels.reference import plain

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
RATES = CARDS["h200"].rates
FP64 = r"\b(?:D(?:ADD|MUL|FMA|MMA|SETP|MNMX)\b|(?:F2F|F2I|I2F|FRND)[.\w]*\.F64\b|MUFU\.\w+64H\b)"
"""Arithmetic in double precision and conversions from and to it; I2F.S64 is one of int64, to float32."""
SINE, SINE_BYTES = re.compile(r"^triton_.*_(?:cos|sin)(?:_|$)"), 32
"""CUDA's sine and cosine reduce huge angles in a small array, which is not in registers, and end that in double
precision: a branch that the angles of a time, below 1000, do not take."""
MATRIX_KERNELS = {"attention_forward", "attention_backward_q", "attention_backward_kv", "probe_matmul"}
B, T, D = 256, 256, 1152
"""SiT-XL/2 at 256 px: the shapes of the floors."""


@dataclass(frozen=True)
class Case:
    """One operator, forward and backward, compiled with a small batch; its floor is that of a batch of B."""

    name: str
    run: Callable[[], Any]
    bytes: float
    flops: float = 0
    beside: float = 0
    """Bytes of a pass of its own, before or after the products."""
    half: bool = True
    """Matrix products, where there are any, in half precision."""
    least_arch: int = 80


@dataclass(frozen=True)
class Row:
    """A compiled kernel."""

    arch: int
    case: str
    kernel: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared: int
    hgmma: int
    hmma: int
    waits: int
    wants_hgmma: bool
    fp64: int = 0
    """Instructions in double precision."""

    @property
    def problem(self) -> str | None:
        sine = SINE.search(self.kernel)
        if self.spill_bytes > (SINE_BYTES if sine else 0):
            return f"spills {self.spill_bytes} bytes"
        if self.fp64 and not sine:
            return f"has {self.fp64} instructions in double precision, expected none"
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"takes {self.shared} bytes of shared memory, at most {SHARED_LIMIT[self.arch]} fit"
        if self.wants_hgmma and (self.hmma or not self.hgmma):
            return f"has {self.hgmma} HGMMA and {self.hmma} HMMA instructions, expected HGMMA only"
        if self.wants_hgmma and self.waits >= self.hgmma > 8:  # a short loop waits once a product anyway
            return f"waits {self.waits} times for {self.hgmma} HGMMA instructions"
        return None


class CompileOnly:
    """A driver for a GPU that is not there; `JITFunction.run` compiles for it and launches nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps the kernels of each device apart

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(arch: int, run: Callable[[], Any]) -> list[tuple[str, Any]]:
    """Names and binaries of the kernels that `run` launches."""
    driver.set_active(CompileOnly(arch))
    found: dict[int, tuple[str, Any]] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        found[id(kernel)] = (_plain_name(self.fn.__name__), kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        run()
    finally:
        JITFunction.run = launch
    return list(found.values())


def measure(arch: int, case: Case, name: str, kernel: Any) -> Row:
    """The row of a kernel that was compiled here."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return _read(
            Path(file.name), arch, case.name, name, kernel.metadata.num_warps, kernel.metadata.shared, case.half
        )


def collected(folder: Path) -> list[Row]:
    """The rows of all binaries below a cache of Triton's or Inductor's; a kernel's case is its folder there.

    Raises FileNotFoundError where there is no binary, or one without the description that Triton writes beside it.
    """
    rows = []
    for cubin in sorted(folder.rglob("*.cubin"), key=lambda path: (path.name, path)):
        about = json.loads(cubin.with_suffix(".json").read_text())
        products = re.findall(r"tt\.dot\b.*?tensor<\d+x\d+x(\w+)", cubin.with_suffix(".ttir").read_text())
        half = any(kind in ("f16", "bf16") for kind in products)
        arch, case = int(about["target"]["arch"]), cubin.parent.name[:12]
        rows.append(_read(cubin, arch, case, _plain_name(cubin.stem), about["num_warps"], about["shared"], half))
    if not rows:
        raise FileNotFoundError(f"{folder} has no file *.cubin, expected a cache of Triton's (TRITON_CACHE_DIR)")
    return rows


def _plain_name(function: str) -> str:
    return function.strip("_").removesuffix("_kernel")


def _read(cubin: Path, arch: int, case: str, name: str, num_warps: int, shared: int, half: bool) -> Row:
    """What cuobjdump, which Triton ships, says of a binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage, code = (
        subprocess.run([tool, flag, cubin], capture_output=True, text=True, check=True).stdout
        for flag in ("-res-usage", "-sass")
    )
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    # A stack frame is where spilled registers go; LDL and STL are the instructions that go there.
    spill = int(fields["STACK"]) + int(fields["LOCAL"])
    spill = spill or 4 * len(re.findall(r"\b(?:LDL|STL)\b", code))
    hgmma, hmma, waits, fp64 = (
        len(re.findall(word, code)) for word in (r"\bHGMMA\b", r"\bHMMA\b", r"\bWARPGROUP\.DEPBAR\b", FP64)
    )
    wants = arch == 90 and name in MATRIX_KERNELS and half
    return Row(
        arch, case, name, num_warps, int(fields["REG"]), spill, shared, hgmma, hmma, waits, wants, fp64
    )  # fmt: skip


def measure_all(arch: int) -> list[Row]:
    """Every case on one architecture."""
    wanted = [case for case in cases() if case.least_arch <= arch]
    return [measure(arch, case, name, kernel) for case in wanted for name, kernel in compiled(arch, case.run)]


def cases() -> Iterator[Case]:
    """Every operator in bf16 at the shapes of XL/2, and what depends on more than the type at others."""
    tokens = B * T
    for d in (D, 1024, 384):
        name = f"T={T} D={d}"
        yield Case(f"norm_modulate {name}", lambda d=d: _adaln(d, gated=False), tokens * d * (4 + 6))
        yield Case(f"gate_residual_norm_modulate {name}", lambda d=d: _adaln(d, gated=True), tokens * d * (8 + 12))
    yield Case("gate_residual_norm_modulate float32 stream", lambda: _adaln(D, True, torch.float32), tokens * D * 32)
    for heads, head, t in ((16, 72, 256), (6, 64, 256), (16, 72, 64), (16, 72, 200)):
        width = heads * head
        yield Case(
            f"attention T={t} head_dim={head}", lambda a=(heads, head, t): _attention(*a),
            B * t * width * 2 * (4 + 8), B * heads * 2 * t * t * head * (2 + 5), least_arch=90,
        )  # fmt: skip
    yield Case("mlp", _mlp, 0, 3 * 2 * 2 * tokens * D * 4 * D, beside=tokens * 4 * D * (4 + 6))
    extra = round(0.8 * B) * T
    yield Case("gelu_pool", lambda: _pool(4 * D, gelu_pool.gelu_pool), extra * 4 * D * (2 + 4))
    yield Case("pool", lambda: _pool(D, gelu_pool.pool), extra * D * (2 + 2))
    classes = 1000
    yield Case("probe_head", lambda: _probe(classes), 4 * 2 * (2 * classes * D + 2 * B * D), 6 * B * classes * D)
    yield Case(
        "probe_head float32", lambda: _probe(classes, torch.float32), 4 * 2 * (2 * classes * D + 2 * B * D), half=False
    )  # fmt: skip
    for gated, moved in ((False, 4 + 1 + 6), (True, 8 + 1 + 12)):
        name = f"{'gate_residual_' if gated else ''}norm_modulate with fp8"
        yield Case(name, lambda gated=gated: _adaln(D, gated, quantize=True), tokens * D * moved, least_arch=90)
    for d in (D, 384):
        # The kernels' own bytes: four inputs of products, GELU and its backward over four widths.
        work = tokens * d * (4 * 3 + 4 * (2 + 1) + 4 * (2 + 2 + 2 + 2 + 1))
        yield Case(f"fp8 linear and mlp D={d}, without products", lambda d=d: _fp8(d), work, least_arch=90)
    latent = 4 * 32 * 32
    for form in ("moments", "samples", "pixels"):
        size = {"moments": 2 * 4, "samples": 4, "pixels": 1}[form]
        yield Case(f"interpolate {form}", lambda form=form: _interpolate(form), B * latent * (size + 8))
    yield Case("velocity_loss", _velocity_loss, B * latent * (2 + 4 + 2 + 4 + 2))
    yield Case("uniform, normal, windows", _draws, B * (3 * 8 + 4 * (4 + 1 + T)))


def _tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point)


def _adaln(d: int, gated: bool, stream: torch.dtype = torch.bfloat16, quantize: bool = False) -> None:
    x, y = _tensor(2, T, d, dtype=stream), _tensor(2, T, d)
    _, _, gate, shift, scale, _ = _tensor(2, 6 * d).chunk(6, -1)
    if gated:
        total, h = adaln.gate_residual_norm_modulate(x, gate, y, shift, scale, quantize=quantize)
        h = plain(h)
        torch.autograd.backward([total, h], [total, h])
    else:
        h = plain(adaln.norm_modulate(x, shift, scale, quantize=quantize))
        h.backward(h)


def _attention(heads: int, head: int, t: int) -> None:
    out = attention.attention(_tensor(2, t, 3 * heads * head), heads)
    out.backward(out)


def _mlp() -> None:
    out = mlp.mlp(_tensor(1, 64, D), _tensor(4 * D, D), _tensor(4 * D), _tensor(D, 4 * D), _tensor(D))
    out.backward(out)


def _pool(d: int, function: Callable[..., torch.Tensor]) -> None:
    out = function(_tensor(2, T, d), torch.zeros(2, T))
    out.backward(out)


def _fp8(d: int) -> None:
    weights = [_tensor(4 * d, d), _tensor(4 * d), _tensor(d, 4 * d), _tensor(d)]
    for weight in (torch.bfloat16, torch.float32):
        x = _tensor(2, T, d)
        out = fp8.mlp(fp8.linear(x, _tensor(d, d), _tensor(d)), *(w.to(weight) for w in weights))
        out.backward(out)


def _probe(classes: int, dtype: torch.dtype = torch.bfloat16) -> None:
    norm, bias, width = torch.float32, torch.zeros(classes), _tensor(D, dtype=torch.float32)
    labels, weights = torch.zeros(B, dtype=torch.int64), torch.zeros(B)
    features, weight = _tensor(B, D, dtype=norm), _tensor(classes, D, dtype=norm)
    for grad in (True, False):  # the loss of an evaluation leaves the gradients out
        with torch.set_grad_enabled(grad):
            probe_head.probe_head(features, width, width, weight, bias, labels, weights, 0.1, dtype)


def _interpolate(form: str) -> None:
    kind = torch.uint8 if form == "pixels" else torch.float32
    rows = torch.zeros(2, 8 if form == "moments" else 4, 32, 32, dtype=kind)
    ids, epoch, t = torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int64), torch.zeros(2)
    for path, seed in (("linear", 0), ("cosine", 2**40)):
        interpolate.interpolate(rows, ids, epoch, t, seed, form, path, 0.0, 0.18215, (0, 1))


def _velocity_loss() -> None:
    loss = velocity_loss.velocity_loss(_tensor(2, T, 16), torch.zeros(2, 4, 32, 32), 2)
    loss.backward(loss)


def _draws() -> None:
    ids, number = torch.zeros(B, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    uniform(0, 2, number, ids)
    normal(0, 2, number, ids, (1,))
    windows(0, (5, 4), number, number, ids, (12, 16), 16)


def table(rows: list[Row]) -> str:
    """Markdown, with the floor of each operator at its first kernel."""
    floors = {}
    for case in cases():
        whole = floor(case.bytes, case.flops, RATES) + floor(case.beside, 0, RATES)
        binds = "FLOPs" if case.flops / RATES.flops > case.bytes / RATES.bytes else "bytes"
        floors[case.name] = f"{whole * 1e6:.0f} us, {binds}" + (" and GELU" if case.beside else "")
    titles = "operator|kernel|sm|warps|registers|spills, B|FP64|shared, KiB|HGMMA|HMMA|waits|floor, forward + backward"
    titles = f"| {titles.replace('|', ' | ')} |"
    lines = [titles, re.sub(r"[^|]+", "---", titles)]
    before = None
    for row in rows:
        first, before = (row.case, row.arch) != before, (row.case, row.arch)
        lines.append(
            f"| {row.case if first else ''} | {row.kernel} | {row.arch} | {row.num_warps} | {row.registers} "
            f"| {row.spill_bytes} | {row.fp64} | {row.shared / 1024:.1f} | {row.hgmma} | {row.hmma} | {row.waits} "
            f"| {floors.get(row.case, '') if first else ''} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 80], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--collected", type=Path, metavar="FOLDER", help="read the binaries of this cache")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    args = parser.parse_args()
    if args.collected:
        try:
            rows = collected(args.collected)
        except FileNotFoundError as error:
            parser.error(str(error))
    else:
        with ProcessPoolExecutor() as pool:
            rows = [row for part in pool.map(measure_all, args.arch) for row in part]
    option = " --collected FOLDER" if args.collected else ""
    heading = f"Triton {triton.__version__}, torch {torch.__version__}: `python -m bench.resources{option}`"
    text = f"{heading}\n\n{table(rows)}\n"
    print(text)
    if args.json:
        found = {"triton": triton.__version__, "torch": torch.__version__, "kernels": [asdict(r) for r in rows]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(text)
    problems = [f"{r.case}, {r.kernel} on sm_{r.arch} {r.problem}" for r in rows if r.problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
