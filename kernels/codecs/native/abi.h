// What crosses the borders: Python <-> driver.cpp and driver.cpp <-> one kernels_*.cpp per instruction set.
//
// Plain structs only, no functions: this header is compiled under different target flags, so anything that could be emitted here
// might be merged by the linker into code that the running CPU cannot execute.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace twc {

struct Kernels {
    // `rows` rows of `dim` floats, `stride` floats apart -> dim codes, scale and offset for each, without gaps.
    void (*encode)(const float* x, int64_t stride, uint8_t* payload, int64_t rows, int64_t dim);
    // The reverse; here `stride` is in bytes and the floats have no gaps.
    void (*decode)(const uint8_t* payload, int64_t stride, float* x, int64_t rows, int64_t dim);
    // One row of floats into a float16 (or, if `brain`, bfloat16) row, stochastically rounded with the hashes of its columns.
    void (*round_row)(const float* x, uint16_t* out, int64_t dim, uint32_t row_hash, bool brain);
};

}  // namespace twc

extern const twc::Kernels twc_kernels_baseline, twc_kernels_avx2, twc_kernels_avx512;
