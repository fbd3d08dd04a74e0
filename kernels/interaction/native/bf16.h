// What crosses the border between driver.cpp and bf16_avx512.cpp. No functions: see abi.h.
#pragma once
#include "abi.h"

#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#define TWI_BF16 1  // the compiler knows the instructions
#endif

namespace twi {

// Of a `low` call.
struct LowKernels {
    int64_t (*scratch)(const Call*);
    void (*run[2])(const Job*);  // forward, backward
};

#if defined(TWI_BF16)
extern "C" const LowKernels twi_kernels_bf16;
#endif

}  // namespace twi
