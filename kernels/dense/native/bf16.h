// What crosses the border between bf16_driver.cpp and bf16_avx512.cpp. No functions: see abi.h.
#pragma once
#include <stdint.h>

#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define TWM_BF16 1  // the compiler knows the instructions
#endif

namespace twm {

enum { TILE_ROWS = 12, TILE_COLS = 32 };  // of sums that registers hold

// A matrix as it lies in memory: value (i, j) is at values[i * stride + j], or at values[j * stride + i] if `turned`; float32 if
// `wide` (rounded to bfloat16 when it is packed), else bfloat16.
struct Operand {
    const void* values;
    int64_t stride;
    bool turned, wide;
};

// out [rows, cols], contiguous = a [rows, depth] x b [depth, cols] + bias [cols] or null, then ReLU if asked. Float32 if `wide`, else
// bfloat16. All sizes at least 1; where out is bfloat16, `part` is not less than the depth.
//
// `bits` or null: [rows, words], column c at bit c % 32 of word c / 32, where out is bfloat16. Without `sums` they are written: which values
// ReLU passes. With `sums` [blocks of rows, cols] they are read: a value becomes value * scale where its bit is set, else 0, and columns are
// added up for each block.
struct Product {
    Operand a, b;
    const float* bias;
    void* out;
    int64_t rows, cols, depth;
    bool relu, wide;
    uint32_t* bits;
    float* sums;
    float scale;
    int64_t part;   // of the depth, an even number: how much is packed at a time
    int64_t block;  // of the rows: how many are packed at a time
};

struct Bf16Kernels {
    // The depth from `from` on, at most a part of it, of TILE_COLS columns of b from `col` on: [pairs of the depth, TILE_COLS] x 4 bytes.
    void (*pack)(const Product& p, int64_t from, int64_t col, uint32_t* to);
    // A block of rows from `top` on, of all columns: adds that part of the depth. `b`: all panels that `pack` made of it.
    void (*rows)(const Product& p, int64_t from, int64_t top, const uint32_t* b, uint32_t* room);
};

}  // namespace twm

#if defined(TWM_BF16)
extern const twm::Bf16Kernels twm_kernels_bf16;
#endif
