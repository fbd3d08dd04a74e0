// tanh of many float32 values. Meanings: ../cpu.py.
#include <stdint.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define TWH_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TWH_CLONES
#endif
#define TWH_API extern "C" __attribute__((visibility("default")))

namespace {

#include "../../native/curves.inc"

const int64_t BLOCK = 16384;  // values: fewer are not worth another thread

// y may be x.
TWH_CLONES void block_of(const float* x, float* y, int64_t count) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
    for (int64_t i = 0; i < count; ++i) y[i] = tangent(x[i]);
}

}  // namespace

// The version of this interface; cpu.py refuses a library built from other sources.
TWH_API int64_t twh_abi() { return 1; }

TWH_API void twh_tanh(const float* x, float* y, int64_t count, int64_t threads) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
    if (threads > blocks) threads = blocks;
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
        for (int64_t b = 0; b < blocks; ++b) block_of(x + b * BLOCK, y + b * BLOCK, b + 1 < blocks ? BLOCK : count - b * BLOCK);
        return;
    }
#endif
    block_of(x, y, count);
}
