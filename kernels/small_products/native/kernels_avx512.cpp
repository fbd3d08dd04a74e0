// The kernels for x86-64 with AVX-512 F, BW, DQ and VL. Empty elsewhere.
#if defined(__x86_64__)
#include <immintrin.h>  // before the target changes, so that nothing in it is compiled for AVX-512 by accident
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,prefer-vector-width=512")
#endif
#define TW_AVX2 1
#define TW_AVX512 1
#define TWP_KERNELS twp_kernels_avx512
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
