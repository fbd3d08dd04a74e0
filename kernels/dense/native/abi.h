// What crosses the border between driver.cpp and product_avx512.cpp.
//
// No functions: this header is compiled under different target flags, so anything that could be emitted here might be merged by the
// linker into code that the running CPU cannot execute.
#pragma once
#include <stdint.h>

namespace twm {

// A float32 matrix as it lies in memory: value (i, j) is at values[i * stride + j], or at values[j * stride + i] if `turned`.
struct Matrix {
    const float* values;
    int64_t stride;
    bool turned;
};

// What happens to a product before it is written, in this order: `bias` [cols] or null is added; ReLU if asked; 0 where `kept` [rows, cols],
// its rows kept_stride apart, is 0 or less, and then `sums` [cols] get the sum of each column. kept may be null.
struct Finish {
    const float* bias;
    bool relu;
    const float* kept;
    int64_t kept_stride;
    float* sums;
};

struct Kernels {
    // out [rows, cols], contiguous = a [rows, depth] x b [depth, cols], finished. All sizes at least 1.
    void (*product)(const Matrix& a, const Matrix& b, const Finish& finish, float* out, int64_t rows, int64_t cols, int64_t depth, float* room);
    // How many floats of 64-byte aligned room a product takes.
    int64_t (*room)(int64_t cols, int64_t depth);
    // out = grad where kept > 0, else 0, all [rows, cols] with the strides given in values (out is contiguous); sums [cols]: of each
    // column of out.
    void (*masked)(const float* grad, int64_t stride, const float* kept, float* out, float* sums, int64_t rows, int64_t cols);
};

}  // namespace twm

#if defined(__x86_64__)
extern const twm::Kernels twm_kernels_avx512;
#endif
