/* One optimizer step over many tensors: the tables, the scalars of a step, and the rule of an element.
 *
 * Compiled by nvcc (adamw_ema.cu) and by a C++17 compiler (adamw_ema.cpp). Both switch off contraction to fused
 * multiply-adds, so given the same norm a CPU and a GPU agree bit for bit. kernels/reference.py has the same rule.
 */
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>

#include <type_traits>

#ifdef __CUDACC__
#define LSEP_HD __host__ __device__ __forceinline__
#else
#define LSEP_HD inline
#endif
#define LSEP_EXPORT extern "C" __attribute__((visibility("default")))

namespace lsep {

constexpr int64_t kChunk = 16384;  // elements of one block's work; a multiple of every vector width
constexpr int64_t kMaxTensors = 3072;  // their gradient pointers travel as a kernel parameter: at most 32,764 bytes
constexpr int kMaxGroups = 16, kMaxEmas = 2;

// ---------------------------------------------------------------------------------------------------------------------
// The C interface, mirrored by kernels/adamw_ema.py. Every field has eight bytes.

/* A tensor: fp32 masters, moments and averages; `weight` (or null) receives the new masters as Args::weight_type. */
struct Entry {
    float *param, *exp_avg, *exp_avg_sq, *ema[kMaxEmas];
    void *weight;
    int64_t numel, group;
};

/* Elements [offset, min(offset + kChunk, numel)) of a tensor; in tables every tensor has at least one chunk. */
struct Chunk {
    int64_t tensor, offset;
};

struct Settings {
    double beta1, beta2, eps, max_norm, ema_decay[kMaxEmas], weight_decay[kMaxGroups];
};

enum Type : int64_t { kNone = 0, kFloat32 = 1, kBfloat16 = 2 };

/* `grads` lies on the host, `entries` to `scratch` on the device. A null gradient leaves its tensor as it is. */
struct Args {
    const void *const *grads;
    const Entry *entries;
    const Chunk *chunks;
    const float *lr;  // (groups,)
    int64_t *step, *skipped;  // counts of updates made and left out
    float *norm;  // out: of all gradients, before clipping
    void *scratch;  // zeros before the first step; its size is lsep_adamw_ema_scratch(chunk_count)
    void *stream;
    int64_t device, tensors, chunk_count, groups, emas, grad_type, weight_type;
    Settings settings;
};

/* For the Python side, which refuses a library of other sources. */
inline void layout(int64_t *out) {
    out[0] = sizeof(Args), out[1] = sizeof(Entry), out[2] = kChunk, out[3] = kMaxTensors, out[4] = kMaxGroups;
}

// ---------------------------------------------------------------------------------------------------------------------
// Once per step

/* What the elements need to know, in float32: the same every step, */
struct Constants {
    float lerp1, beta2, rest2, eps, ema[kMaxEmas];

    explicit Constants(const Settings &set) {
        lerp1 = (float)(1 - set.beta1), beta2 = (float)set.beta2, rest2 = (float)(1 - set.beta2), eps = (float)set.eps;
        for (int k = 0; k < kMaxEmas; k++) ema[k] = (float)(1 - set.ema_decay[k]);
    }
};

/* and of this step. */
struct Scalars {
    int32_t skip;
    float clip, unbias2;  // min(1, max_norm / norm), 1 / sqrt(1 - beta2^step)
    float decay[kMaxGroups], step_size[kMaxGroups];  // lr weight_decay, lr / (1 - beta1^step)
};

/* base^n by squaring: the same bits from every compiler, which pow() does not promise. */
LSEP_HD double power(double base, int64_t n) {
    double result = 1;
    for (; n > 0; n >>= 1, base *= base)
        if (n & 1) result *= base;
    return result;
}

/* Norm, clip factor and bias corrections from the sum of squared gradients; advances `step`, or `skipped` when the sum
 * is not finite in float32. */
LSEP_HD void begin_step(double squares, const Settings &set, const float *lr, int64_t groups, int64_t *step,
                        int64_t *skipped, float *norm, Scalars *out) {
    const float narrow = (float)squares;
    const bool finite = narrow <= FLT_MAX;  // false for NaN
    const float length = finite ? (float)sqrt(squares) : narrow;
    *norm = length;
    out->skip = !finite;
    if (!finite) {
        *skipped += 1;
        return;
    }
    const int64_t count = *step += 1;
    const double bias1 = 1 - power(set.beta1, count), bias2 = 1 - power(set.beta2, count);
    const float clip = (float)set.max_norm / (length + 1e-6f);  // torch.nn.utils.clip_grad_norm_
    out->clip = clip < 1 ? clip : 1;
    out->unbias2 = (float)(1 / sqrt(bias2));
    for (int64_t g = 0; g < groups; g++) {
        out->decay[g] = (float)((double)lr[g] * set.weight_decay[g]);
        out->step_size[g] = (float)((double)lr[g] / bias1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Once per element

struct Bf16 {
    uint16_t bits;
};

union Word {
    uint32_t bits;
    float value;
};

LSEP_HD float widen(float x) { return x; }

LSEP_HD float widen(Bf16 x) {
    Word word;
    word.bits = (uint32_t)x.bits << 16;
    return word.value;
}

LSEP_HD void narrow(float x, float &out) { out = x; }

/* Round to nearest even, as torch does. */
LSEP_HD void narrow(float x, Bf16 &out) {
    Word word;
    word.value = x;
    const uint32_t rounded = (word.bits + 0x7FFFu + (word.bits >> 16 & 1)) >> 16;
    out.bits = x != x ? 0x7FC0u : (uint16_t)rounded;
}

/* torch.lerp: exact at both ends. */
LSEP_HD float lerp(float from, float to, float weight) {
    return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

/* torch.optim.AdamW with decoupled weight decay; `g` is already clipped.
 *
 * torch multiplies by 1 - decay. Rounded to float32 that is off by up to 3e-8 in the same direction every step, which
 * moves a weight by 1.6e-6 in 100 steps (tests/test_adamw_ema.py) and a decay of 1e-5 by 0.3 %; a difference is not.
 */
LSEP_HD void adamw(float &p, float &m, float &v, float g, const Constants &c, float unbias2, float decay,
                   float step_size) {
    m = lerp(m, g, c.lerp1);
    v = c.beta2 * v + c.rest2 * g * g;
    p = p - (decay * p + step_size * (m / (sqrtf(v) * unbias2 + c.eps)));
}

/* N neighbours, moved by one instruction. */
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

template <int N, typename T>
LSEP_HD Pack<T, N> load(const T *p) {
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(p));  // pointers out of a table: without this the loads are generic ones
#endif
    return *reinterpret_cast<const Pack<T, N> *>(p);
}

template <int N, typename T>
LSEP_HD void store(T *p, const Pack<T, N> &x) {
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(p));
#endif
    *reinterpret_cast<Pack<T, N> *>(p) = x;
}

/* The elements of one chunk. G is void for a tensor without a gradient, W for one without a weight copy. */
template <typename G, int EMAS, typename W>
struct Slice {
    const G *grad;
    float *param, *exp_avg, *exp_avg_sq, *ema[kMaxEmas];
    W *weight;
    int32_t size;
    float clip, unbias2, decay, step_size;

    LSEP_HD Slice(const Entry &e, const Chunk &c, const void *gradient, const Scalars &s) {
        const int64_t rest = e.numel - c.offset;
        size = (int32_t)(rest < kChunk ? rest : kChunk);
        clip = s.clip, unbias2 = s.unbias2, decay = s.decay[e.group], step_size = s.step_size[e.group];
        param = e.param + c.offset, exp_avg = e.exp_avg + c.offset, exp_avg_sq = e.exp_avg_sq + c.offset;
        if constexpr (!std::is_void_v<G>) grad = (const G *)gradient + c.offset;
        for (int k = 0; k < EMAS; k++) ema[k] = e.ema[k] + c.offset;
        if constexpr (!std::is_void_v<W>) weight = (W *)e.weight + c.offset;
    }

    /* Whether packs of N elements may be used. */
    template <int N>
    LSEP_HD bool aligned() const {
        uintptr_t wide = (uintptr_t)param, ok;
        if constexpr (!std::is_void_v<G>) wide |= (uintptr_t)exp_avg | (uintptr_t)exp_avg_sq;
        for (int k = 0; k < EMAS; k++) wide |= (uintptr_t)ema[k];
        ok = wide % (N * sizeof(float));
        if constexpr (!std::is_void_v<G>) ok |= (uintptr_t)grad % (N * sizeof(G));
        if constexpr (!std::is_void_v<W>) ok |= (uintptr_t)weight % (N * sizeof(W));
        return !ok;
    }

    /* Elements i to i + N - 1: all loads before the first store, so that they are in flight together. */
    template <int N>
    LSEP_HD void update(int32_t i, const Constants &c) const {
        Pack<float, N> p = load<N>(param + i), e[kMaxEmas];
        for (int k = 0; k < EMAS; k++) e[k] = load<N>(ema[k] + i);
        if constexpr (!std::is_void_v<G>) {
            const Pack<G, N> g = load<N>(grad + i);
            Pack<float, N> m = load<N>(exp_avg + i), v = load<N>(exp_avg_sq + i);
            for (int j = 0; j < N; j++)
                adamw(p.at[j], m.at[j], v.at[j], widen(g.at[j]) * clip, c, unbias2, decay, step_size);
            store(param + i, p), store(exp_avg + i, m), store(exp_avg_sq + i, v);
        }
        for (int k = 0; k < EMAS; k++) {
            for (int j = 0; j < N; j++) e[k].at[j] = lerp(e[k].at[j], p.at[j], c.ema[k]);
            store(ema[k] + i, e[k]);
        }
        if constexpr (!std::is_void_v<W>) {
            Pack<W, N> w;
            for (int j = 0; j < N; j++) narrow(p.at[j], w.at[j]);
            store(weight + i, w);
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// From run-time types to template arguments

template <typename T>
struct Tag {
    using type = T;
};

template <int N>
using Number = std::integral_constant<int, N>;

template <typename F>
void with_grad_type(int64_t type, F f) {
    type == kBfloat16 ? f(Tag<Bf16>()) : f(Tag<float>());
}

template <typename F>
void with_emas(int64_t emas, F f) {
    emas == 0 ? f(Number<0>()) : emas == 1 ? f(Number<1>()) : f(Number<2>());
}

template <typename F>
void with_weight_type(int64_t type, F f) {
    type == kNone ? f(Tag<void>()) : type == kBfloat16 ? f(Tag<Bf16>()) : f(Tag<float>());
}

/* Calls f with a gradient tag, a number of averages and a weight tag. */
template <typename F>
void with_types(int64_t grad_type, int64_t emas, int64_t weight_type, F f) {
    with_grad_type(grad_type, [&](auto grad) {
        with_emas(emas, [&](auto count) {
            with_weight_type(weight_type, [&](auto weight) { f(grad, count, weight); });
        });
    });
}

}  // namespace lsep
