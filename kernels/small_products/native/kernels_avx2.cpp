// The kernels for x86-64 with AVX2, FMA and F16C. Empty elsewhere.
#if defined(__x86_64__)
#include <immintrin.h>  // before the target changes, so that nothing in it is compiled for AVX2 by accident
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt")
#endif
#define TW_AVX2 1
#define TWP_KERNELS twp_kernels_avx2
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
