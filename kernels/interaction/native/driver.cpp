// The C functions that cpu.py calls: checks the pairs, cuts the batch into tasks, spreads them over threads, and picks the
// instruction set. Every sample is computed by one thread in a fixed order, so results do not depend on the number of threads.
#include <stdlib.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../../native/cpu_level.h"
#include "abi.h"
#include "bf16.h"

using namespace twi;

namespace {

Builds<Kernels> builds = BUILDS(twi_kernels);

// Threads worth waking: waking one costs as much as some 100,000 multiplications.
int64_t threads_for(const Call& c) {
    const int64_t numbers = c.kind == FM ? c.features : c.kind == PRODUCTS || c.pairs * 8 < c.features * c.features ? c.pairs : c.features * c.features / 4;
    const int64_t most = 1 + c.batch * c.dim * numbers / 131072;
    return c.threads < most ? c.threads : most;
}

#if defined(TWI_BF16)
const LowKernels* low_kernels() { return supported_level() == 2 && __builtin_cpu_supports("avx512bf16") ? &twi_kernels_bf16 : nullptr; }
#else
const LowKernels* low_kernels() { return nullptr; }
#endif

}  // namespace

#define TWI_API extern "C" __attribute__((visibility("default")))

// The version of this interface; cpu.py refuses a library built from other sources.
TWI_API int64_t twi_abi() { return 2; }

// 0 baseline, 1 AVX2, 2 AVX-512. A level below 0 or above what the CPU has only asks.
TWI_API int64_t twi_level(int64_t level) { return builds.ask(level); }

// May calls be `low`?
TWI_API int64_t twi_low() { return low_kernels() != nullptr; }

TWI_API int64_t twi_run(const Call* call) {
    const Call& c = *call;
    for (int64_t p = 0; p < c.pairs; ++p)
        if (uint32_t(c.first[p]) >= uint64_t(c.features) || uint32_t(c.second[p]) >= uint64_t(c.features)) return BAD_PAIR;
    const Kernels* kernels = builds.active();
    static const LowKernels* const low = low_kernels();
    void (*const run)(const Job*) = c.low ? low->run[c.backward] : kernels->run[c.kind][c.wide][c.backward];
    int64_t threads = threads_for(c);
    if (threads < 1) threads = 1;
    const int64_t each = ((c.low ? low->scratch : kernels->scratch)(call) + 4095) & ~int64_t(4095);
    char* scratch = static_cast<char*>(aligned_alloc(4096, size_t(each * threads)));
    if (!scratch) return NO_MEMORY;
#if defined(_OPENMP)
    if (threads > 1) {
        const int64_t tasks = threads * 8, block = (c.batch + tasks - 1) / tasks;
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(threads))
        for (int64_t t = 0; t < tasks; ++t) {
            const int64_t begin = t * block, end = begin + block < c.batch ? begin + block : c.batch;
            const Job job = {call, begin, end, scratch + omp_get_thread_num() * each};
            if (begin < end) run(&job);
        }
        free(scratch);
        return OK;
    }
#endif
    const Job job = {call, 0, c.batch, scratch};
    run(&job);
    free(scratch);
    return OK;
}
