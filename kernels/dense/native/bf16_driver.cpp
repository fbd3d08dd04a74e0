// The C functions that bf16.py calls, and what is shared between threads: one packs some panels of b, then some blocks of rows.
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "../../native/cpu_level.h"
#include "bf16.h"

namespace {

#include "room.inc"

thread_local Room panels, block;

#if defined(TWM_BF16)
const twm::Bf16Kernels* kernels() {
    return supported_level() == 2 && __builtin_cpu_supports("avx512bf16") ? &twm_kernels_bf16 : nullptr;
}
#else
const twm::Bf16Kernels* kernels() { return nullptr; }
#endif

constexpr int64_t PART = 2048;           // of the depth, where sums may be added to what is there
constexpr int64_t BLOCK_BYTES = 400000;  // of packed rows: they stay in the second-level cache

inline int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

int64_t part_of(int64_t depth) {
    const int64_t parts = (depth + PART - 1) / PART;
    return rounded_up((depth + parts - 1) / parts, 2);
}

// As many blocks as divide evenly among the threads, of whole tiles.
int64_t block_rows(int64_t rows, int64_t part, int64_t threads) {
    const int64_t most = BLOCK_BYTES / (2 * part), blocks = rounded_up((rows + most - 1) / most, threads);
    return rounded_up((rows + blocks - 1) / blocks, twm::TILE_ROWS);
}

}  // namespace

#define TW_EXPORT extern "C" __attribute__((visibility("default")))

TW_EXPORT int64_t twb_ready() { return kernels() != nullptr; }

// How many blocks of rows a product has; see below.
TW_EXPORT int64_t twb_blocks(int64_t rows, int64_t depth, int64_t threads) {
    const int64_t high = block_rows(rows, rounded_up(depth, 2), threads);
    return (rows + high - 1) / high;
}

// 0, or 1 where there is no memory for it. `wide`: 1 for a float32 a, 2 for b, 4 for out.
TW_EXPORT int64_t twb_product(const void* a, int64_t a_stride, int64_t a_turned, const void* b, int64_t b_stride, int64_t b_turned,
                              const float* bias, void* out, uint32_t* bits, float* sums, float scale, int64_t rows, int64_t cols, int64_t depth,
                              int64_t relu, int64_t wide, int64_t threads) {
    static const twm::Bf16Kernels* const use = kernels();
    twm::Product p = {{a, a_stride, a_turned != 0, (wide & 1) != 0}, {b, b_stride, b_turned != 0, (wide & 2) != 0}, bias, out, rows, cols, depth, relu != 0,
                      (wide & 4) != 0, bits, sums, scale, 0, 0};
    p.part = p.wide ? part_of(depth) : rounded_up(depth, 2);
    p.block = block_rows(rows, p.part, threads);
    const int64_t width = rounded_up(cols, twm::TILE_COLS), steps = p.part / 2;
    uint32_t* const packed = reinterpret_cast<uint32_t*>(panels.of(width * steps));
    if (packed == nullptr) return 1;
    int64_t failed = 0;
#pragma omp parallel num_threads(int(threads)) if (threads > 1) reduction(+ : failed)
    {
        uint32_t* const room = reinterpret_cast<uint32_t*>(block.of(p.block * steps));
        failed = room == nullptr;
        for (int64_t from = 0; from < depth; from += p.part) {
            const int64_t some = from + p.part <= depth ? steps : (depth - from + 1) / 2;
#pragma omp for schedule(static)
            for (int64_t col = 0; col < cols; col += twm::TILE_COLS) use->pack(p, from, col, packed + col * some);
#pragma omp for schedule(static)
            for (int64_t top = 0; top < rows; top += p.block)
                if (room != nullptr) use->rows(p, from, top, packed, room);
        }
    }
    return failed != 0;
}
