// Which build of a library's kernels the running CPU can execute. Included by each library's driver.cpp, and nowhere else: what is
// compiled under wider target flags must not be emitted here.
#pragma once
#include <stdint.h>

namespace {

// 0 baseline, 1 AVX2, 2 AVX-512.
int supported_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 1;
#endif
    return 0;
}

// The builds by level, and the level in use: the CPU's best, until another is asked for.
template <class Kernels> struct Builds {
    const Kernels* of_level[3];
    int level;

    const Kernels* active() const { return of_level[level]; }
    // A level below 0 or above what the CPU has only asks.
    int64_t ask(int64_t wanted) {
        if (wanted >= 0 && wanted <= supported_level()) level = int(wanted);
        return level;
    }
};

}  // namespace

// The builds named `prefix` and a level; there is one build where the levels mean nothing.
#if defined(__x86_64__)
#define BUILDS(prefix) {{&prefix##_baseline, &prefix##_avx2, &prefix##_avx512}, supported_level()}
#else
#define BUILDS(prefix) {{&prefix##_baseline, &prefix##_baseline, &prefix##_baseline}, supported_level()}
#endif
