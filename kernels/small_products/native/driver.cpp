// The C functions that cpu.py calls: cuts the matrices into tasks, spreads them over threads, and picks the instruction set. Every
// product is computed by one thread in a fixed order, so results do not depend on the number of threads.
#include <stdlib.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../../native/cpu_level.h"
#include "abi.h"

using namespace twp;

namespace {

Builds<Kernels> builds = BUILDS(twp_kernels);

}  // namespace

#define TWP_API extern "C" __attribute__((visibility("default")))

// The version of this interface; cpu.py refuses a library built from other sources.
TWP_API int64_t twp_abi() { return 2; }

// 0 baseline, 1 AVX2, 2 AVX-512. A level below 0 or above what the CPU has only asks.
TWP_API int64_t twp_level(int64_t level) { return builds.ask(level); }

TWP_API int64_t twp_run(const Call* call) {
    const Call& c = *call;
    const Kernels* kernels = builds.active();
    const int64_t count = c.outer * c.inner, most = 1 + count * c.m * c.n * c.k / 262144;  // threads worth waking
    int64_t threads = c.threads < most ? c.threads : most;
    if (threads > count) threads = count;
    if (threads < 1) threads = 1;
    const int64_t each = (int64_t(sizeof(float)) * ((c.n + 15) & ~int64_t(15)) * (c.k + 1) + 4095) & ~int64_t(4095);
    char* scratch = static_cast<char*>(aligned_alloc(4096, size_t(each * threads)));
    if (!scratch) return NO_MEMORY;
#if defined(_OPENMP)
    if (threads > 1) {
        const int64_t tasks = threads * 8 < count ? threads * 8 : count, block = (count + tasks - 1) / tasks;
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(threads))
        for (int64_t t = 0; t < tasks; ++t) {
            const int64_t begin = t * block, end = begin + block < count ? begin + block : count;
            const Job job = {call, begin, end, reinterpret_cast<float*>(scratch + omp_get_thread_num() * each)};
            if (begin < end) kernels->run(&job);
        }
        free(scratch);
        return OK;
    }
#endif
    const Job job = {call, 0, count, reinterpret_cast<float*>(scratch)};
    kernels->run(&job);
    free(scratch);
    return OK;
}
