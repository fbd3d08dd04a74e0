// What crosses the borders: Python <-> driver.cpp and driver.cpp <-> one kernels_*.cpp per instruction set.
//
// Plain structs of 8-byte fields only, no functions: this header is compiled under different target flags, so anything that
// could be emitted here might be merged by the linker into code that the running CPU cannot execute.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace twp {

enum Result : int64_t { OK = 0, NO_MEMORY = 1 };

// y[i, j] = a[i, j] b[i, j] for i below `outer` and j below `inner`: a [m, k] and b [k, n] float32 with any strides (in elements),
// y [outer, inner, m, n] contiguous.
struct Call {
    int64_t outer, inner, m, n, k, threads;
    const float *a, *b;
    float* y;
    int64_t a_outer, a_inner, a_m, a_k;
    int64_t b_outer, b_inner, b_k, b_n;
};

// Matrices [begin, end) of a call; scratch is aligned to 64 bytes and has room for k rows of n values, n rounded up to 16.
struct Job {
    const Call* call;
    int64_t begin, end;
    float* scratch;
};

struct Kernels {
    void (*run)(const Job*);
};

extern "C" const Kernels twp_kernels_baseline;
#if defined(__x86_64__)
extern "C" const Kernels twp_kernels_avx2, twp_kernels_avx512;
#endif

}  // namespace twp
