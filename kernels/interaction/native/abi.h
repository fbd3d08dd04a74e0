// What crosses the borders: Python <-> driver.cpp and driver.cpp <-> one kernels_*.cpp per instruction set.
//
// Plain structs of 8-byte fields only, no functions: this header is compiled under different target flags, so anything that
// could be emitted here might be merged by the linker into code that the running CPU cannot execute.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace twi {

enum Kind : int64_t { DOTS = 0, PRODUCTS = 1, FM = 2, KINDS = 3 };
enum Result : int64_t { OK = 0, BAD_PAIR = 1, NO_MEMORY = 2 };

// One call. All arrays are of one type (float, or double where `wide`); strides count elements; the last stride is 1.
//   x [batch, features, dim]; y is the output going forward and its gradient going back; dx [batch, features, dim] contiguous.
//   DOTS:     y [batch, pairs]       y[p] = <x[first[p]], x[second[p]]>
//   PRODUCTS: y [batch, pairs, dim]  y[p] = x[first[p]] * x[second[p]]
//             `low`: x and dx are float, y is bfloat16, x counts as rounded to it, and the pairs are the lower triangle, row by row
//   FM:       y [batch, dim], or [batch] with `reduce`: scale * the sum over i < j of x[i] * x[j]
struct Call {
    int64_t kind, wide, backward, threads;
    int64_t batch, features, dim;
    const char* x;
    int64_t x_batch, x_feature;
    char* y;
    int64_t y_batch, y_item;  // y_item: from pair to pair, or 1 (0 for an expanded gradient) from column to column
    char* dx;
    int64_t pairs;
    const int32_t* first;
    const int32_t* second;
    int64_t reduce, low;
    double scale;
};

// Samples [begin, end) of a call; scratch is aligned to 64 bytes and as large as `scratch` said.
struct Job {
    const Call* call;
    int64_t begin, end;
    char* scratch;
};

struct Kernels {
    int64_t (*scratch)(const Call*);
    void (*run[KINDS][2][2])(const Job*);  // kind, wide, backward
};

extern "C" const Kernels twi_kernels_baseline;
#if defined(__x86_64__)
extern "C" const Kernels twi_kernels_avx2, twi_kernels_avx512;
#endif

}  // namespace twi
