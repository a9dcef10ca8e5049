/* The optimizer step of adamw_ema.h on the CPU, in one thread: kernels/adamw_ema.py loads this with ctypes. */
#include "adamw_ema.h"

using namespace lsep;

namespace {

template <typename G>
double chunk_squares(const G *grad, int64_t size) {
    double sum = 0;
    for (int64_t i = 0; i < size; i++) {
        const double g = widen(grad[i]);
        sum += g * g;
    }
    return sum;
}

template <typename G>
double squares(const Args &args) {
    double sum = 0;
    for (int64_t c = 0; c < args.chunk_count; c++) {
        const Chunk chunk = args.chunks[c];
        const G *grad = (const G *)args.grads[chunk.tensor];
        const int64_t rest = args.entries[chunk.tensor].numel - chunk.offset;
        if (grad) sum += chunk_squares(grad + chunk.offset, rest < kChunk ? rest : kChunk);
    }
    return sum;
}

template <typename G, int EMAS, typename W>
void sweep(const Slice<G, EMAS, W> &slice, const Constants &constants) {
    const Constants c = constants;  // a copy: no store of the loop can change it
#pragma GCC ivdep
    for (int32_t i = 0; i < slice.size; i++) slice.template update<1>(i, c);
}

template <typename G, int EMAS, typename W>
void update(const Args &args, const Scalars &scalars) {
    const Constants constants(args.settings);
    for (int64_t c = 0; c < args.chunk_count; c++) {
        const Chunk chunk = args.chunks[c];
        const Entry &entry = args.entries[chunk.tensor];
        const void *grad = args.grads[chunk.tensor];
        if (grad)
            sweep(Slice<G, EMAS, W>(entry, chunk, grad, scalars), constants);
        else
            sweep(Slice<void, EMAS, W>(entry, chunk, grad, scalars), constants);
    }
}

}  // namespace

LSEP_EXPORT void lsep_adamw_ema_layout(int64_t *out) { layout(out); }

LSEP_EXPORT int64_t lsep_adamw_ema_scratch(int64_t) { return 0; }

LSEP_EXPORT int lsep_adamw_ema_prepare(int64_t) { return 0; }

LSEP_EXPORT const char *lsep_adamw_ema_error(int) { return "no error"; }

LSEP_EXPORT int lsep_adamw_ema(const Args *args) {
    Scalars scalars = {};
    double sum = 0;
    with_grad_type(args->grad_type, [&](auto grad) { sum = squares<typename decltype(grad)::type>(*args); });
    begin_step(sum, args->settings, args->lr, args->groups, args->step, args->skipped, args->norm, &scalars);
    if (scalars.skip) return 0;
    with_types(args->grad_type, args->emas, args->weight_type, [&](auto grad, auto emas, auto weight) {
        update<typename decltype(grad)::type, decltype(emas)::value, typename decltype(weight)::type>(*args, scalars);
    });
    return 0;
}
