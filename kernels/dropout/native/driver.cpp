// The C functions that cpu.py calls. The draws are those of torch's CPU generator, word for word: its state comes in and goes back.
#include <string.h>

#include "../../native/cpu_level.h"
#include "abi.h"

using namespace twd;

namespace {

Builds<Kernels> builds = BUILDS(twd_kernels);

// The words that torch's generator draws, in order; `store` hands the generator on.
struct Stream {
    GeneratorState* generator;
    const Kernels* kernels;
    uint32_t words[WORDS];
    int64_t next;

    explicit Stream(void* state) : generator(static_cast<GeneratorState*>(state)), kernels(builds.active()) {
        for (int j = 0; j < WORDS; j++) words[j] = uint32_t(generator->words[j]);
        next = generator->left == 1 ? WORDS : int64_t(generator->next);
    }
    int64_t take(uint32_t* drawn, int64_t most) {  // at least one word, at most a block
        if (next == WORDS) {
            kernels->next_block(words);
            next = 0;
        }
        const int64_t count = WORDS - next < most ? WORDS - next : most;
        kernels->temper(words + next, drawn, count);
        next += count;
        return count;
    }
    void store() {
        for (int j = 0; j < WORDS; j++) generator->words[j] = words[j];
        generator->next = uint64_t(next);
        generator->left = int32_t(WORDS + 1 - next);
    }
};

}  // namespace

#define TW_EXPORT extern "C" __attribute__((visibility("default")))

TW_EXPORT int64_t twd_abi() { return 3; }

// The instruction set in use; a level that this CPU has makes it that one, for tests.
TW_EXPORT int64_t twd_level(int64_t level) { return builds.ask(level); }

// y = dropout(x) for `count` values, and which values were kept; `state` moves on by two words a value.
TW_EXPORT void twd_dropout(void* state, const float* x, float* y, uint8_t* kept, int64_t count, uint64_t limit, double scale) {
    Stream stream(state);
    uint32_t drawn[WORDS + 1];  // at most one word waits for its other half
    int64_t waiting = 0;
    while (count > 0) {
        const int64_t have = waiting + stream.take(drawn + waiting, 2 * count - waiting), values = have / 2;
        stream.kernels->apply(drawn, x, y, kept, values, limit, float(scale));
        if ((waiting = have % 2)) drawn[0] = drawn[2 * values];
        x += values;
        y += values;
        kept += values;
        count -= values;
    }
    stream.store();
}

// The end of a layer, in place on y [rows, cols], float32 or, if `half`, bfloat16: ReLU if asked; dropout unless `state` is null. bits:
// [rows, words].
TW_EXPORT void twd_finish(void* state, char* y, uint32_t* bits, int64_t rows, int64_t cols, int64_t half, int64_t relu, uint64_t limit,
                          double scale, int64_t threads) {
    const Kernels* kernels = builds.active();
    const int64_t words = (cols + 31) / 32, part = 256, size_of = half ? 2 : 4;
    if (state == nullptr) {
        (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(threads)) if (threads > 1 && rows * cols > 1 << 16)
#endif
        for (int64_t r = 0; r < rows; r++)
            kernels->finish(nullptr, y + r * cols * size_of, bits + r * words, cols, half != 0, relu != 0, 0, 1.0f);
        return;
    }
    Stream stream(state);
    uint32_t drawn[2 * part];
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < cols; c += part) {
            const int64_t size = cols - c < part ? cols - c : part;
            for (int64_t have = 0; have < 2 * size;) have += stream.take(drawn + have, 2 * size - have);
            char* here = y + (r * cols + c) * size_of;
            kernels->finish(drawn, here, bits + r * words + c / 32, size, half != 0, relu != 0, limit, float(scale));
        }
    }
    stream.store();
}

TW_EXPORT void twd_masked(const char* grad, const uint32_t* bits, char* out, int64_t rows, int64_t cols, int64_t half, double scale,
                          int64_t threads) {
    const Kernels* kernels = builds.active();
    const int64_t words = (cols + 31) / 32, width = cols * (half ? 2 : 4);
    (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(threads)) if (threads > 1 && rows * cols > 1 << 16)
#endif
    for (int64_t r = 0; r < rows; r++)
        kernels->masked(grad + r * width, bits + r * words, out + r * width, cols, half != 0, float(scale));
}

TW_EXPORT void twd_back(const float* grad, const uint8_t* kept, float* out, int64_t count, double scale, int64_t threads) {
    const Kernels* kernels = builds.active();
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
