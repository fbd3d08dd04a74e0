// What a GRU does at each step after its products: all rows of one step, forward and backward. Meanings: ../cpu.py.
#include <stdint.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define TWG_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TWG_CLONES
#endif
#define TWG_API extern "C" __attribute__((visibility("default")))

namespace {

#include "../../native/curves.inc"

}  // namespace

// The version of this interface; cpu.py refuses a library built from other sources.
TWG_API int64_t twg_abi() { return 1; }

// of_x [rows, 3 dim] every x_stride values, of_h [rows, 3 dim] and before [rows, dim] contiguous -> after, contiguous, and again to out every
// out_stride values; kept [rows, 4 dim]: r, z, n and what h adds to n.
TWG_API TWG_CLONES void twg_forward(
    int64_t rows, int64_t dim, const float* of_x, int64_t x_stride, const float* of_h, const float* before, float* after, float* out,
    int64_t out_stride, float* kept) {
    for (int64_t i = 0; i < rows; ++i) {
        const float *__restrict x = of_x + i * x_stride, *__restrict h = of_h + i * 3 * dim, *__restrict old = before + i * dim;
        float *__restrict made = after + i * dim, *__restrict copy = out + i * out_stride, *__restrict k = kept + i * 4 * dim;
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
        for (int64_t j = 0; j < dim; ++j) {
            const float r = sigmoid(x[j] + h[j]), z = sigmoid(x[j + dim] + h[j + dim]), of_n = h[j + 2 * dim];
            const float n = tangent(x[j + 2 * dim] + r * of_n), value = n + z * (old[j] - n);
            k[j] = r, k[j + dim] = z, k[j + 2 * dim] = n, k[j + 3 * dim] = of_n;
            made[j] = value, copy[j] = value;
        }
    }
}

// The gradient of `after` is grad (every grad_stride values; null: none) + carried + back. -> x_grad [rows, 3 dim] every x_stride values, h_grad
// [rows, 3 dim] contiguous, and in carried what reaches `before` other than through h_grad.
TWG_API TWG_CLONES void twg_backward(
    int64_t rows, int64_t dim, const float* grad, int64_t grad_stride, float* carried, const float* back, const float* kept,
    const float* before, float* x_grad, int64_t x_stride, float* h_grad) {
    for (int64_t i = 0; i < rows; ++i) {
        const float *__restrict g = grad ? grad + i * grad_stride : nullptr, *__restrict b = back + i * dim, *__restrict k = kept + i * 4 * dim;
        const float* __restrict old = before + i * dim;
        float *__restrict c = carried + i * dim, *__restrict x = x_grad + i * x_stride, *__restrict h = h_grad + i * 3 * dim;
        if (g)
            for (int64_t j = 0; j < dim; ++j) c[j] += g[j];
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC ivdep
#endif
        for (int64_t j = 0; j < dim; ++j) {
            const float r = k[j], z = k[j + dim], n = k[j + 2 * dim], whole = c[j] + b[j];
            const float to_n = whole * (1.0f - z) * (1.0f - n * n), to_z = whole * (old[j] - n) * z * (1.0f - z);
            const float to_r = to_n * k[j + 3 * dim] * r * (1.0f - r);
            x[j] = to_r, x[j + dim] = to_z, x[j + 2 * dim] = to_n;
            h[j] = to_r, h[j + dim] = to_z, h[j + 2 * dim] = to_n * r;
            c[j] = whole * z;
        }
    }
}
