// The C functions that cpu.py calls. The draws are those of torch's CPU generator, word for word: its state comes in and goes back.
#include <string.h>

#include "abi.h"

using namespace twd;

namespace {

int supported_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 1;
#endif
    return 0;
}
const Kernels* kernels_of(int level) {
#if defined(__x86_64__)
    if (level == 2) return &twd_kernels_avx512;
    if (level == 1) return &twd_kernels_avx2;
#endif
    (void)level;
    return &twd_kernels_baseline;
}
int active_level = supported_level();
const Kernels* active = kernels_of(active_level);

}  // namespace

#define TW_EXPORT extern "C" __attribute__((visibility("default")))

TW_EXPORT int64_t twd_abi() { return 1; }

// The instruction set in use; a level that this CPU has makes it that one, for tests.
TW_EXPORT int64_t twd_level(int64_t level) {
    if (level >= 0 && level <= supported_level()) {
        active_level = int(level);
        active = kernels_of(active_level);
    }
    return active_level;
}

// y = dropout(x) for `count` values, and which values were kept; `state` moves on by two words a value.
TW_EXPORT void twd_dropout(void* state, const float* x, float* y, uint8_t* kept, int64_t count, uint64_t limit, double scale) {
    GeneratorState* generator = static_cast<GeneratorState*>(state);
    const Kernels* kernels = active;
    uint32_t words[WORDS], drawn[WORDS + 1];  // at most one word waits for its other half
    for (int j = 0; j < WORDS; j++) words[j] = uint32_t(generator->words[j]);
    int64_t next = generator->left == 1 ? WORDS : int64_t(generator->next);
    int64_t waiting = 0;
    while (count > 0) {
        if (next == WORDS) {
            kernels->next_block(words);
            next = 0;
        }
        int64_t take = WORDS - next;
        if (take > 2 * count - waiting) take = 2 * count - waiting;
        kernels->temper(words + next, drawn + waiting, take);
        next += take;
        const int64_t values = (waiting + take) / 2;
        kernels->apply(drawn, x, y, kept, values, limit, float(scale));
        if ((waiting = (waiting + take) % 2)) drawn[0] = drawn[2 * values];
        x += values;
        y += values;
        kept += values;
        count -= values;
    }
    for (int j = 0; j < WORDS; j++) generator->words[j] = words[j];
    generator->next = uint64_t(next);
    generator->left = int32_t(WORDS + 1 - next);
}

TW_EXPORT void twd_back(const float* grad, const uint8_t* kept, float* out, int64_t count, double scale, int64_t threads) {
    const Kernels* kernels = active;
    const int64_t part = 1 << 16, parts = (count + part - 1) / part;
    (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(threads)) if (threads > 1 && parts > 1)
#endif
    for (int64_t i = 0; i < parts; i++) {
        const int64_t first = i * part, size = count - first < part ? count - first : part;
        kernels->back(grad + first, kept + first, out + first, size, float(scale));
    }
}
