// The C functions that cpu.py calls.
#include "../../native/cpu_level.h"
#include "abi.h"

using namespace twc;

namespace {

Builds<Kernels> builds = BUILDS(twc_kernels);

}  // namespace

#define TW_EXPORT extern "C" __attribute__((visibility("default")))

TW_EXPORT int64_t twc_abi() { return 2; }

// The instruction set in use; a level that this CPU has makes it that one, for tests.
TW_EXPORT int64_t twc_level(int64_t level) { return builds.ask(level); }

namespace {

// run(first row, rows) over all rows, in parts of some 64 Ki values.
template <class Run>
void in_parts(int64_t rows, int64_t dim, int64_t threads, Run run) {
    const int64_t part = 1 + (1 << 16) / dim, parts = (rows + part - 1) / part;
    (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(int(threads)) if (threads > 1 && parts > 1)
#endif
    for (int64_t i = 0; i < parts; i++) run(i * part, rows - i * part < part ? rows - i * part : part);
}

}  // namespace

TW_EXPORT void twc_encode(const float* x, int64_t stride, uint8_t* payload, int64_t rows, int64_t dim, int64_t threads) {
    const Kernels* kernels = builds.active();
    in_parts(rows, dim, threads,
             [=](int64_t i, int64_t count) { kernels->encode(x + i * stride, stride, payload + i * (dim + 8), count, dim); });
}

TW_EXPORT void twc_decode(const uint8_t* payload, int64_t stride, float* x, int64_t rows, int64_t dim, int64_t threads) {
    const Kernels* kernels = builds.active();
    in_parts(rows, dim, threads,
             [=](int64_t i, int64_t count) { kernels->decode(payload + i * stride, stride, x + i * dim, count, dim); });
}

// table[rows[i]] = stochastically rounded x[i]; `hashes` has one for each row.
TW_EXPORT void twc_write_rounded(const float* x, const int64_t* rows, const uint32_t* hashes, uint16_t* table, int64_t stride,
                                 int64_t count, int64_t dim, int64_t brain, int64_t threads) {
    const Kernels* kernels = builds.active();
    in_parts(count, dim, threads, [=](int64_t first, int64_t many) {
        for (int64_t i = first; i < first + many; i++)
            kernels->round_row(x + i * dim, table + rows[i] * stride, dim, hashes[i], brain != 0);
    });
}
