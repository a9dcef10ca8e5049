/* The optimizer step of adamw_ema.h on a GPU, in two launches and without a word to the host.
 *
 * norm_pass   one partial sum per chunk; the last block to finish adds them up in a fixed order and writes the scalars
 *             of the step, so neither a replay of a CUDA graph nor the order of the blocks changes a bit
 * update_pass everything else, over the same chunks; returns at once when a gradient was not finite
 *
 * Plain C interface, loaded with ctypes; the tables live in device memory and are uploaded once.
 */
#include <cuda_runtime.h>

#include "adamw_ema.h"

#if CUDART_VERSION < 12010
#error "kernel parameters above 4 KiB need CUDA 12.1"
#endif

using namespace lsep;

namespace {

constexpr int kThreads = 256;

/* A kernel parameter: gradients may live elsewhere every step, and this way they need no copy and no table. */
struct Grads {
    const void *at[kMaxTensors];
};

/* At the start of Args::scratch, zero before the first step; the chunks' partial sums follow. */
struct Workspace {
    Scalars scalars;
    unsigned finished;  // blocks of the norm pass; back at zero when it ends
};

constexpr int64_t kPartials = (sizeof(Workspace) + 15) / 16 * 16;  // byte offset

/* What the norm pass reads and writes besides the gradients. */
struct Norm {
    const Entry *entries;
    const Chunk *chunks;
    const float *lr;
    int64_t *step, *skipped;
    float *norm, *partials;
    Workspace *space;
    int64_t groups;
    Settings settings;
};

static_assert(sizeof(Grads) + sizeof(Norm) <= 32764, "kernel parameters end at 32,764 bytes");
static_assert(kChunk % (8 * kThreads) == 0, "a chunk starts where its tensor's alignment holds");

/* The sum over the block in every thread, always added in the same order. */
template <typename T>
__device__ T block_sum(T value) {
    __shared__ T warps[kThreads / 32];
    for (int k = 16; k > 0; k /= 2) value += __shfl_xor_sync(~0u, value, k);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    T sum = 0;
    for (int w = 0; w < kThreads / 32; w++) sum += warps[w];
    return sum;
}

template <typename G>
__device__ float chunk_squares(const G *grad, int size) {
    constexpr int N = 16 / sizeof(G);
    const int packed = (uintptr_t)grad % 16 ? 0 : size / N * N;
    float sums[N] = {};
#pragma unroll 4
    for (int i = threadIdx.x * N; i < packed; i += kThreads * N) {
        const Pack<G, N> g = load<N>(grad + i);
        for (int j = 0; j < N; j++) sums[j] += widen(g.at[j]) * widen(g.at[j]);
    }
    for (int i = packed + threadIdx.x; i < size; i += kThreads) {
        const float g = widen(load<1>(grad + i).at[0]);
        sums[0] += g * g;
    }
    float sum = 0;
    for (int j = 0; j < N; j++) sum += sums[j];
    return sum;
}

/* Leaves this block's sum in memory and tells, to all its threads, whether those of all blocks are there.
 *
 * The sum is written before the fence and the fence before the count (release); the last block counts, fences
 * (acquire) and meets at the barrier before any of its threads reads. atomicInc wraps to zero at the last block, so the
 * next launch finds the counter as this one did.
 */
__device__ bool leave_and_count(float sum, float *partials, unsigned *finished) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        partials[blockIdx.x] = sum;
        __threadfence();
        last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

template <typename G>
__global__ void __launch_bounds__(kThreads)
    norm_pass(const __grid_constant__ Norm job, const __grid_constant__ Grads grads) {
    const Chunk chunk = job.chunks[blockIdx.x];
    const G *grad = (const G *)grads.at[chunk.tensor];
    float sum = 0;
    if (grad) {
        const int64_t rest = job.entries[chunk.tensor].numel - chunk.offset;
        sum = chunk_squares(grad + chunk.offset, (int)(rest < kChunk ? rest : kChunk));
    }
    sum = block_sum(sum);
    if (!leave_and_count(sum, job.partials, &job.space->finished)) return;

    double squares = 0;
#pragma unroll 8
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) squares += __ldcg(job.partials + i);  // past the L1
    squares = block_sum(squares);
    if (threadIdx.x == 0)
        begin_step(squares, job.settings, job.lr, job.groups, job.step, job.skipped, job.norm, &job.space->scalars);
}

template <typename G, int EMAS, typename W>
__device__ void sweep(const Slice<G, EMAS, W> &slice, const Constants &c) {
    const int packed = slice.template aligned<4>() ? slice.size / 4 * 4 : 0;
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < packed; i += kThreads * 4) slice.template update<4>(i, c);
#pragma unroll 1
    for (int i = packed + threadIdx.x; i < slice.size; i += kThreads) slice.template update<1>(i, c);
}

/* Three blocks a multiprocessor leave 80 registers a thread and spill none; four to six 16-byte loads of 768 threads
 * are 48 to 72 KiB in flight, above the 25 to 45 KiB that bandwidth times latency comes to on an H100, H200 or B200. */
template <typename G, int EMAS, typename W>
__global__ void __launch_bounds__(kThreads, 3)
    update_pass(const Entry *entries, const Chunk *chunks, const Scalars *scalars,
                const __grid_constant__ Constants constants, const __grid_constant__ Grads grads) {
    const Scalars &s = *scalars;
    if (s.skip) return;
    const Chunk chunk = chunks[blockIdx.x];
    const Entry &entry = entries[chunk.tensor];
    const void *grad = grads.at[chunk.tensor];
    if (grad)
        sweep(Slice<G, EMAS, W>(entry, chunk, grad, s), constants);
    else
        sweep(Slice<void, EMAS, W>(entry, chunk, grad, s), constants);
}

}  // namespace

LSEP_EXPORT void lsep_adamw_ema_layout(int64_t *out) { layout(out); }

LSEP_EXPORT int64_t lsep_adamw_ema_scratch(int64_t chunks) { return kPartials + chunks * (int64_t)sizeof(float); }

LSEP_EXPORT const char *lsep_adamw_ema_error(int code) { return cudaGetErrorString((cudaError_t)code); }

/* Loads every kernel: a lazy first load inside a stream capture could fail, and a GPU too old is found out here. */
LSEP_EXPORT int lsep_adamw_ema_prepare(int64_t device) {
    cudaFuncAttributes found;
    cudaError_t code = cudaSetDevice((int)device);
    const auto want = [&](const void *kernel) {
        if (code == cudaSuccess) code = cudaFuncGetAttributes(&found, kernel);
    };
    for (int64_t grad_type : {kFloat32, kBfloat16}) {
        with_grad_type(grad_type, [&](auto grad) { want((const void *)norm_pass<typename decltype(grad)::type>); });
        for (int64_t emas = 0; emas <= kMaxEmas; emas++)
            for (int64_t weight_type : {kNone, kFloat32, kBfloat16})
                with_types(grad_type, emas, weight_type, [&](auto grad, auto count, auto weight) {
                    want((const void *)update_pass<typename decltype(grad)::type, decltype(count)::value,
                                                   typename decltype(weight)::type>);
                });
    }
    cudaGetLastError();  // the code is in hand; a later launch must not find it again
    return code;
}

/* Both launches on args->stream; returns a code of cudaError_t. */
LSEP_EXPORT int lsep_adamw_ema(const Args *args) {
    const cudaError_t code = cudaSetDevice((int)args->device);  // this library has a runtime of its own
    if (code != cudaSuccess) return code;
    Grads grads;
    for (int64_t i = 0; i < args->tensors; i++) grads.at[i] = args->grads[i];
    for (int64_t i = args->tensors; i < kMaxTensors; i++) grads.at[i] = nullptr;
    const Constants constants(args->settings);
    Workspace *space = (Workspace *)args->scratch;
    float *partials = (float *)((char *)space + kPartials);
    const Norm norm = {args->entries, args->chunks, args->lr, args->step, args->skipped,
                       args->norm, partials, space, args->groups, args->settings};
    const unsigned blocks = (unsigned)args->chunk_count;
    const cudaStream_t stream = (cudaStream_t)args->stream;
    with_grad_type(args->grad_type, [&](auto grad) {
        norm_pass<typename decltype(grad)::type><<<blocks, kThreads, 0, stream>>>(norm, grads);
    });
    with_types(args->grad_type, args->emas, args->weight_type, [&](auto grad, auto emas, auto weight) {
        update_pass<typename decltype(grad)::type, decltype(emas)::value, typename decltype(weight)::type>
            <<<blocks, kThreads, 0, stream>>>(args->entries, args->chunks, &space->scalars, constants, grads);
    });
    return cudaGetLastError();
}
