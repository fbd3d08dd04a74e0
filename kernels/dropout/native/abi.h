// What crosses the borders: Python <-> driver.cpp and driver.cpp <-> one kernels_*.cpp per instruction set.
//
// Plain structs only, no functions: this header is compiled under different target flags, so anything that could be emitted here
// might be merged by the linker into code that the running CPU cannot execute.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace twd {

enum { WORDS = 624, SHIFT = 397 };  // of the Mersenne twister MT19937

// The start of what torch.Generator.get_state() gives for a CPU generator.
struct GeneratorState {
    uint64_t seed;
    int32_t left, seeded;  // left - 1 words of the present block have not been drawn
    uint64_t next;         // the first of them
    uint64_t words[WORDS];
};

struct Kernels {
    // The next block of the generator's words, and the same words tempered.
    void (*next_block)(uint32_t* words);
    void (*temper)(const uint32_t* words, uint32_t* tempered, int64_t count);
    // For each value two drawn words make 53 bits; the value is kept, times scale, if they are below the limit.
    void (*apply)(const uint32_t* drawn, const float* x, float* y, uint8_t* kept, int64_t count, uint64_t limit, float scale);
    // grad times scale where kept, times 0 elsewhere.
    void (*back)(const float* grad, const uint8_t* kept, float* out, int64_t count, float scale);
    // A layer's end, in place: ReLU if asked, then dropout by `drawn` (as in apply; none if null). Bit j of `bits` says whether value
    // j passes its gradient on: kept, and not a number that ReLU made 0. Values are float32, or bfloat16 if `half`.
    void (*finish)(const uint32_t* drawn, void* y, uint32_t* bits, int64_t count, bool half, bool relu, uint64_t limit, float scale);
    // grad times scale where the bit is set, else 0.
    void (*masked)(const void* grad, const uint32_t* bits, void* out, int64_t count, bool half, float scale);
};

}  // namespace twd

extern const twd::Kernels twd_kernels_baseline, twd_kernels_avx2, twd_kernels_avx512;
