// The C functions that native.py calls. There is one build, for AVX-512: elsewhere PyTorch's own products are as good.
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "../../native/cpu_level.h"
#include "abi.h"

namespace {

#include "room.inc"

thread_local Room room;

#if defined(__x86_64__)
const twm::Kernels* kernels() { return supported_level() == 2 ? &twm_kernels_avx512 : nullptr; }
#else
const twm::Kernels* kernels() { return nullptr; }
#endif

}  // namespace

#define TW_EXPORT extern "C" __attribute__((visibility("default")))

TW_EXPORT int64_t twm_abi() { return 2; }

TW_EXPORT int64_t twm_ready() { return kernels() != nullptr; }

// 0, or 1 where there is no memory for it.
TW_EXPORT int64_t twm_product(const float* a, int64_t a_stride, int64_t a_turned, const float* b, int64_t b_stride, int64_t b_turned,
                              const float* bias, float* out, int64_t rows, int64_t cols, int64_t depth, int64_t relu, const float* kept,
                              int64_t kept_stride, float* sums) {
    static const twm::Kernels* const use = kernels();
    float* space = room.of(use->room(cols, depth));
    if (space == nullptr) return 1;
    use->product({a, a_stride, a_turned != 0}, {b, b_stride, b_turned != 0}, {bias, relu != 0, kept, kept_stride, sums}, out, rows, cols, depth,
                 space);
    return 0;
}

TW_EXPORT void twm_masked(const float* grad, int64_t stride, const float* kept, float* out, float* sums, int64_t rows, int64_t cols) {
    static const twm::Kernels* const use = kernels();
    use->masked(grad, stride, kept, out, sums, rows, cols);
}
