"""The stand-in for a GPU itself: each check fires, each card says what it is, torch's libraries go through it, and the
observer's figures are right and change nothing."""

import json
from pathlib import Path

import pytest
import standin_run

pytestmark = [
    pytest.mark.standin,
    pytest.mark.skipif(standin_run.missing() is not None, reason=str(standin_run.missing())),
]

# ---------------------------------------------------------------------------------------------------------------------
# CUDA's own functions, called without torch

RAW = """
import ctypes
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_ulonglong, c_void_p
cuda = ctypes.CDLL(None)
def new(n):
    p = c_void_p()
    return p if cuda.cudaMalloc(byref(p), c_size_t(n)) == 0 else None
def pinned(n):
    p = c_void_p()
    assert cuda.cudaHostAlloc(byref(p), c_size_t(n), 0) == 0
    return p
def stream(flags=1):
    s = c_void_p()
    assert cuda.cudaStreamCreateWithFlags(byref(s), flags) == 0
    return s
def event():
    e = c_void_p()
    assert cuda.cudaEventCreate(byref(e)) == 0
    return e
def begin(s, mode=0):
    assert cuda.cudaStreamBeginCapture(s, mode) == 0
def end(s):
    g = c_void_p()
    return cuda.cudaStreamEndCapture(s, byref(g)), g
def fill(p, n, s=None):
    return cuda.cudaMemsetAsync(p, 0, c_size_t(n), s)
def copy(to, source, n, s=None):
    return cuda.cudaMemcpyAsync(to, source, c_size_t(n), 4, s)
def after(p, n):
    return c_void_p(p.value + n)
"""


def raw(code: str, **given: object) -> standin_run.Result:
    done = standin_run.run(["-c", RAW + code], **given)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return done


REFUSED = {
    "allocation": ("s = stream(); begin(s); assert new(512) is None; assert end(s)[0] != 0", "cudaMalloc during"),
    "free": ("p = new(512); s = stream(); begin(s); assert cuda.cudaFree(p) != 0", "cudaFree during a capture"),
    "pinned": ("s = stream(); begin(s); assert cuda.cudaHostAlloc(byref(c_void_p()), 64, 0) != 0", "cudaHostAlloc"),
    "synchronisation": ("s = stream(); begin(s); assert cuda.cudaDeviceSynchronize() != 0", "cudaDeviceSynchronize"),
    "of the stream": ("s = stream(); begin(s); assert cuda.cudaStreamSynchronize(s) != 0", "of a stream that captures"),
    "of a captured event": (
        "s, e = stream(), event(); begin(s); cuda.cudaEventRecord(e, s); assert cuda.cudaEventSynchronize(e) != 0",
        "event that was recorded in a capture",
    ),
    "pageable copy": (
        "p = new(64); s = stream(); begin(s); assert copy(p, ctypes.create_string_buffer(64), 64, s) != 0",
        "pageable host memory was captured",
    ),
    "unjoined stream": (
        "p, s, t, e = new(64), stream(), stream(), event(); begin(s); cuda.cudaEventRecord(e, s);"
        "cuda.cudaStreamWaitEvent(t, e, 0); fill(p, 64, t); assert end(s)[0] != 0",
        "was not joined",
    ),
    "joined too early": (
        "p, s, t, e, f = new(64), stream(), stream(), event(), event(); begin(s); cuda.cudaEventRecord(e, s);"
        "cuda.cudaStreamWaitEvent(t, e, 0); fill(p, 64, t); cuda.cudaEventRecord(f, t);"
        "cuda.cudaStreamWaitEvent(s, f, 0); fill(p, 64, t); assert end(s)[0] != 0",
        "was not joined",
    ),
    "event from outside": (
        "s, t, e = stream(), stream(), event(); cuda.cudaEventRecord(e, t); begin(s);"
        "assert cuda.cudaStreamWaitEvent(s, e, 0) != 0",
        "an event recorded outside of it",
    ),
    "event of another capture": (
        "s, t, e = stream(), stream(), event(); begin(s, 2); begin(t, 2); cuda.cudaEventRecord(e, t);"
        "assert cuda.cudaStreamWaitEvent(s, e, 0) != 0",
        "event of another capture",
    ),
    "launch outside": (
        "p, s, t = new(64), stream(), stream(); begin(s); fill(p, 64, t)", "outside the capture of its thread"
    ),
    "legacy stream": (
        "p, s = new(64), stream(0); begin(s); assert fill(p, 64) != 0",
        "on the legacy stream while a blocking stream captures",
    ),
    "copy past the end": ("p, q = new(1024), pinned(4096); copy(p, q, 2048)", "a copy writes past its allocation"),
    "copy from freed memory": (
        "p, q = new(1024), pinned(1024); cuda.cudaFree(p); copy(q, p, 64)", "a copy reads memory that is not allocated"
    ),
    "fill past the end": ("p = new(512); fill(p, 1024)", "a copy fills past its allocation"),
    "graph of freed memory": (
        "p, s, x = new(512), stream(), c_void_p(); begin(s); fill(p, 512, s); code, g = end(s); assert code == 0;"
        "assert cuda.cudaGraphInstantiate(byref(x), g, c_ulonglong(0)) == 0; assert cuda.cudaGraphLaunch(x, s) == 0;"
        "cuda.cudaFree(p); assert cuda.cudaGraphLaunch(x, s) != 0",
        "memory that it uses was freed",
    ),
    "shared memory": ("assert cuda.cudaFuncSetAttribute(c_void_p(64), 8, 300000) != 0", "a block may have 232448"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_gpu_refuses_is_a_violation(case: str) -> None:
    code, text = REFUSED[case]
    violations = raw(code).log.violations
    assert len(violations) == 1
    assert text in violations[0]


PERMITTED = {
    "joined stream": (
        "p, s, t, e, f = new(64), stream(), stream(), event(), event(); begin(s); cuda.cudaEventRecord(e, s);"
        "cuda.cudaStreamWaitEvent(t, e, 0); fill(p, 64, t); cuda.cudaEventRecord(f, t);"
        "cuda.cudaStreamWaitEvent(s, f, 0); assert end(s)[0] == 0"
    ),
    "joined through a third": (
        "p, s, t, u = new(64), stream(), stream(), stream(); es = [event() for _ in range(4)]; begin(s)\n"
        "for e, a, b in zip(es, (s, t, u), (t, u, s)):\n"
        "    fill(p, 64, a); cuda.cudaEventRecord(e, a); cuda.cudaStreamWaitEvent(b, e, 0)\n"
        "assert end(s)[0] == 0"
    ),
    "pinned copy": (
        "p, q, s = new(64), pinned(64), stream(); begin(s); assert copy(p, q, 64, s) == 0; assert end(s)[0] == 0"
    ),
    "another thread's work": (
        "import threading\np, s, t = new(64), stream(), stream(); begin(s, 1)\n"
        "def other():\n    fill(p, 64, t); assert cuda.cudaStreamSynchronize(t) == 0; assert new(64)\n"
        "x = threading.Thread(target=other); x.start(); x.join(); assert end(s)[0] == 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PERMITTED)
def test_what_a_gpu_permits_is_none(case: str) -> None:
    assert raw(PERMITTED[case]).log.violations == []


def test_device_memory_is_finite_and_faults_on_the_host() -> None:
    out = raw(
        "free, total = c_size_t(), c_size_t(); cuda.cudaMemGetInfo(byref(free), byref(total))\n"
        "p = new(free.value // 2); assert p and new(free.value) is None\n"
        "cuda.cudaFree(p); assert new(free.value - 512); print(total.value)",
        memory=4 << 30,
    )
    assert int(out.stdout) == 4 << 30
    assert [e.kind for e in out.log.events if e.kind in ("malloc", "oom", "free")] == [
        "malloc",
        "oom",
        "free",
        "malloc",
    ]
    reads = standin_run.run(["-c", RAW + "ctypes.string_at(new(64), 1)"])
    assert reads.returncode == -11  # SIGSEGV, as with a GPU


def test_small_copies_move_bytes_and_large_ones_do_not() -> None:
    code = """
def there_and_back(n):
    a, p, b = pinned(n), new(n), pinned(n)
    ctypes.memset(a, 7, n); copy(p, a, n); copy(b, p, n)
    return ctypes.string_at(b, 1)[0]
print(there_and_back(1000), there_and_back(2000))
"""
    assert raw(code, env={"STANDIN_COPY": "1500"}).stdout.split() == ["7", "0"]


def test_log_of_waits_and_of_copies() -> None:
    log = raw(
        "p, b, q, e = new(64), ctypes.create_string_buffer(64), pinned(64), event()\n"
        "copy(p, q, 64); cuda.cudaEventRecord(e, None); cuda.cudaEventSynchronize(e); copy(b, p, 64)"
    ).log
    assert [e.text for e in log.syncs] == ["cudaEventSynchronize", "cudaMemcpyAsync 64 bytes device->host pageable"]
    assert [(x.kind, x.name, x.bytes) for x in log.launches] == [
        ("copy", "host->device", 64),
        ("copy", "device->host pageable", 64),
    ]
    assert log.peak() == 512


LT = """
desc, pref, count = c_void_p(), c_void_p(), c_int()
layouts = [c_void_p() for _ in range(3)]
def product(kind, m, n, k, ta=0, offset=0, epilogue=1, promise=256):
    cuda.cublasLtMatmulDescCreate(byref(desc), 68, 0)
    for name, value in ((3, ta), (7, epilogue)):
        cuda.cublasLtMatmulDescSetAttribute(desc, name, byref(c_int(value)), c_size_t(4))
    shapes = ((k, m) if ta else (m, k), (k, n), (m, n))
    for layout, (rows, cols), t in zip(layouts, shapes, (kind, kind, 14)):
        cuda.cublasLtMatrixLayoutCreate(byref(layout), t, c_ulonglong(rows), c_ulonglong(cols), c_ulonglong(rows))
    cuda.cublasLtMatmulPreferenceCreate(byref(pref))
    for which in (5, 6, 7, 8):
        cuda.cublasLtMatmulPreferenceSetAttribute(pref, which, byref(c_int(promise)), c_size_t(4))
    a, b, d = layouts
    result = ctypes.create_string_buffer(128)
    code = cuda.cublasLtMatmulAlgoGetHeuristic(None, desc, a, b, d, d, pref, 1, result, byref(count))
    if code:
        return code
    one, p = c_float(1), new(1 << 24)
    where = [after(p, i << 20) for i in (1, 2, 3)]
    where[1] = after(where[1], offset)
    return cuda.cublasLtMatmul(None, desc, byref(one), where[0], a, where[1], b, byref(c_float(0)), where[2], d,
                               where[2], d, result, None, c_size_t(0), None)
"""


def test_a_product_of_cublaslt_is_counted_and_its_operands_checked() -> None:
    out = raw(LT + "assert product(14, 64, 128, 256) == 0")
    (gemm,) = out.log.launches
    assert (gemm.kind, gemm.flops) == ("gemm", 2 * 64 * 128 * 256)
    assert gemm.bytes == 2 * (64 * 256 + 256 * 128 + 64 * 128)
    assert raw(LT + "assert product(14, 64, 64, 64, offset=8, promise=8) != 0").log.violations == [
        "cublasLtMatmul: operand B is not aligned to 16 bytes"
    ]
    promised = raw(
        LT
        + "assert product(14, 64, 64, 64, offset=16) != 0; assert product(14, 64, 64, 64, offset=16, promise=16) == 0"
    )
    assert promised.log.violations == ["cublasLtMatmul: operand B is not aligned to 256 bytes"]


def test_fp8_products_need_what_the_card_needs() -> None:
    e4m3 = 28
    assert raw(LT + f"assert product({e4m3}, 64, 64, 64, ta=1) == 0").log.violations == []
    assert "not A^T B" in raw(LT + f"assert product({e4m3}, 64, 64, 64) != 0").log.violations[0]
    assert "multiples of 16" in raw(LT + f"assert product({e4m3}, 72, 64, 64, ta=1) != 0").log.violations[0]
    assert "without fp8" in raw(LT + f"assert product({e4m3}, 64, 64, 64, ta=1) != 0", card="a100").log.violations[0]


# ---------------------------------------------------------------------------------------------------------------------
# torch and Triton on it

CARDS = {
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448),
    "h200": ("NVIDIA H200", (9, 0), 132, 232448),
    "b200": ("NVIDIA B200", (10, 0), 148, 232448),
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912),
}
CARD = """
import ctypes, json, torch, triton, triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, scaled_dot_product_attention

@triton.jit
def double_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i, mask=i < N), mask=i < N)

x = torch.zeros(1000, device="cuda")
compiled = double_kernel[(2,)](x, torch.empty_like(x), 1000, BLOCK=512)
p = torch.cuda.get_device_properties(0)
print(json.dumps([p.name, [p.major, p.minor], p.multi_processor_count, p.shared_memory_per_block_optin, p.total_memory,
                  compiled.metadata.target.arch, compiled.n_regs]))
"""
LIBRARIES = """
image = torch.zeros(2, 4, 16, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
weight = torch.zeros(8, 4, 3, 3, device="cuda", dtype=torch.bfloat16, requires_grad=True)
conv2d(image, weight, padding=1).sum().backward()
q, k, v = (torch.zeros(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
    scaled_dot_product_attention(q, k, v).sum().backward()
torch.linalg.eigvalsh(torch.zeros(8, 8, device="cuda")), torch.linalg.cholesky_ex(torch.zeros(8, 8, device="cuda"))
try:
    torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError as error:
    print(str(error)[:100])
y = torch.empty(64 << 20, device="cuda")
gone = torch.empty_like(y).data_ptr()
torch.cuda.empty_cache()
pointer = ctypes.c_void_p
arguments = [pointer(gone), pointer(y.data_ptr()), ctypes.c_int(1000), pointer(), pointer()]
pointers = (pointer * 5)(*[ctypes.cast(ctypes.byref(a), pointer) for a in arguments])
one = [ctypes.c_uint(n) for n in (1, 1, 1, 128, 1, 1, 0)]
ctypes.CDLL(None).cuLaunchKernel(pointer(compiled.function), *one, None, pointers, None)
for size in (2, 80, 10240, 3000000):
    values = torch.empty(size, device="cuda")
    print(values.isfinite().all().item(), values.isnan().any().item(), len(values.nonzero()))
print(torch.full((3,), 7.0, device="cuda").tolist(), torch.ones(2, device="cuda", dtype=torch.int64).tolist())
graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
with torch.cuda.graph(graph):
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        doubled = y * 2
    torch.cuda.current_stream().wait_stream(side)
    total = doubled.sum()
graph.replay(), graph.replay()
"""


@pytest.mark.parametrize("card", CARDS)
def test_a_card_is_what_it_says_and_triton_compiles_for_it(card: str, tmp_path: Path) -> None:
    (tmp_path / "card.py").write_text(CARD)
    memory = 8 << 30 if card == "b200" else None
    done = standin_run.run([str(tmp_path / "card.py")], card=card, memory=memory)
    assert done.returncode == 0, done.stderr
    name, capability, processors, shared, total, arch, registers = json.loads(done.stdout)
    assert (name, tuple(capability), processors, shared) == CARDS[card]
    assert arch == 10 * capability[0] + capability[1]
    assert 8 <= registers <= 64  # read from the cubin
    low, high = {"h200": (139, 141), "b200": (8, 8)}.get(card, (79, 80))
    assert low <= total / 2**30 <= high
    assert [x.name for x in done.log.launches if x.kind == "triton"] == ["double_kernel"]
    assert done.log.violations == []


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> standin_run.Result:
    script = tmp_path_factory.mktemp("libraries") / "libraries.py"
    script.write_text(CARD + LIBRARIES)
    done = standin_run.run([str(script)])
    assert done.returncode == 0, done.stderr
    return done


def test_convolution_and_attention_go_through_cudnn(libraries: standin_run.Result) -> None:
    work = {x.name: (x.bytes, x.flops) for x in libraries.log.launches if x.kind == "cudnn"}
    images, weights, results = 2 * 2 * 4 * 256, 2 * 8 * 4 * 9, 2 * 2 * 8 * 256
    convolution = (images + weights + results, 2 * 2 * 8 * 256 * 4 * 9)
    scores = 2 * 4 * 256 * 256 * 64
    for name in ("convolution", "convolution_backward_data", "convolution_backward_filter"):
        assert work[name] == convolution, name
    assert work["attention"][1] == 4 * scores
    assert work["attention_backward"][1] == 10 * scores
    tokens, statistics = 2 * 2 * 4 * 256 * 64, 4 * 2 * 4 * 256
    assert work["attention"][0] == pytest.approx(4 * tokens + statistics, abs=64)
    # The tensors, the statistics and, where the caller writes the operations out, sums and dQ in float32 between them.
    assert 8 * tokens + statistics <= work["attention_backward"][0] <= 10 * tokens + 2 * statistics + 64


def test_memory_that_is_short_or_gone(libraries: standin_run.Result) -> None:
    assert "CUDA out of memory" in libraries.stdout
    assert libraries.log.of("oom")
    assert libraries.log.violations == ["kernel double_kernel: argument 0 points to memory that is not allocated"]


def test_what_is_asked_of_all_values_comes_out_well(libraries: standin_run.Result) -> None:
    lines = libraries.stdout.splitlines()
    assert lines[-5:-1] == ["True False 0"] * 4
    assert lines[-1] == "[7.0, 7.0, 7.0] [1, 1]"


def test_graphs_are_counted(libraries: standin_run.Result) -> None:
    captured = libraries.log.captured()
    ((_, _, nodes),) = libraries.log.captures()
    assert nodes == len(captured) >= 2
    assert len({x.stream for x in captured}) == 2
    assert len(libraries.log.replays()) == 2
    assert libraries.log.waits_between_replays() == []
    assert {x.kind for x in libraries.log.launches} >= {"solver", "graph", "cudnn", "triton", "kernel"}


@pytest.mark.parametrize("allocator", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_other_allocators_of_torch(allocator: str) -> None:
    code = """
import torch
x = [torch.zeros(50 << 18, device="cuda") for _ in range(3)]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x[0] * 2
graph.replay()
try:
    torch.empty(1 << 42, dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError:
    print(torch.cuda.max_memory_allocated() >> 20)
"""
    done = standin_run.run(["-c", code], env={"PYTORCH_ALLOC_CONF": allocator, "PYTORCH_CUDA_ALLOC_CONF": allocator})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["200"]
    assert done.log.violations == []


# ---------------------------------------------------------------------------------------------------------------------
# The observer

OBSERVED = """
import torch
from lsep_kernels import ops
from lsep_kernels.attention import attention

def compiled(a, b):
    return torch.sin(a * b) + a

a, b = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
a + b
a.add_(b)
torch.zeros(4, 1, device="cuda").expand(4, 100) * 2
function = torch.compile(compiled, options={"triton.autotune_pointwise": False})
function(a, b), function(a, b)
m = torch.zeros(256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
(m @ m.T).sum().backward()
qkv = torch.zeros(2, 256, 3 * 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
attention(qkv, 2).sum().backward()
torch.compile(lambda x: attention(x, 2), fullgraph=True)(qkv).sum().backward()
"""


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> list[standin_run.Result]:
    """The same program with the observer and without it."""
    script = tmp_path_factory.mktemp("observed") / "observed.py"
    script.write_text(OBSERVED)
    # What an earlier run compiled would be found by the second child alone.
    uncached = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    both = [standin_run.run([str(script)], observe=observe, env=uncached) for observe in (True, False)]
    for done in both:
        assert done.returncode == 0, done.stderr
    return both


def test_the_observer_changes_nothing(observed: list[standin_run.Result]) -> None:
    launches = [[(x.kind, x.name, x.grid, x.block, x.shared) for x in done.log.launches] for done in observed]
    assert launches[0] == launches[1]
    assert all(x.label == "-" for x in observed[1].log.launches)


def _bytes(done: standin_run.Result, label: str) -> list[float]:
    return [x.bytes for x in done.log.launches if x.label == label and x.bytes]


def test_bytes_of_atens_operators_and_of_inductors_kernels(observed: list[standin_run.Result]) -> None:
    done, mib = observed[0], 1 << 20
    assert _bytes(done, "aten::add")[0] == 12 * mib
    assert _bytes(done, "aten::add_")[0] == 12 * mib
    assert 4 * (4 + 400) in _bytes(done, "aten::mul")  # an expanded dimension counts once
    assert _bytes(done, "triton_poi_fused_add_mul_sin_0") == [12 * mib, 12 * mib]
    products = [x for x in done.log.launches if x.kind == "gemm"]
    assert [x.flops for x in products] == [2 * 256 * 256 * 512] * 3
    assert {x.bytes for x in products} == {2 * (2 * 256 * 512 + 256 * 256)}
    assert {x.label for x in products} == {"aten::mm"}  # two of them of the backward pass, in a thread of its own
    assert len({x.thread for x in products}) == 2


def test_bytes_and_operations_of_our_kernels(observed: list[standin_run.Result]) -> None:
    done, tokens, rows = observed[0], 2 * 2 * 256 * 128, 4 * 2 * 2 * 256  # a token's tensor in bf16, a statistic
    expected = {
        "_attention_forward_kernel": (4 * tokens + rows, 4),
        "_attention_backward_q_kernel": (6 * tokens + 2 * rows, 6),
        "_attention_backward_kv_kernel": (6 * tokens + 2 * rows, 8),
    }
    for name, (moved, products) in expected.items():
        figures = [(x.bytes, x.flops) for x in done.log.launches if x.name == name]
        assert figures == [(moved, products * 2 * 256 * 256 * 128)] * 2, name  # eager, then compiled
