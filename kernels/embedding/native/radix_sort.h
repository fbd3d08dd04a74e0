// A stable least-significant-digit radix sort of 64-bit keys on a field of their bits, for one thread and one table's ids:
// a few thousand to a few hundred thousand keys that stay in the L2 cache.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

struct RadixPlan { int passes, digit_bits; };

// Digits of at most 11 bits (2048 counters fit the L1 cache), fewer for few keys, where clearing counters would dominate.
inline RadixPlan plan_radix(int64_t keys, int field_bits) {
    int most = 4;
    while (most < 11 && (int64_t(1) << (most + 1)) < keys) ++most;
    RadixPlan plan = {field_bits == 0 ? 0 : (field_bits + most - 1) / most, 0};
    if (plan.passes) plan.digit_bits = (field_bits + plan.passes - 1) / plan.passes;
    return plan;
}

// Sorts by the bits from `shift` up. The result lies in `keys` after an even number of passes, else in `spare`.
// The two halves of the keys have counters of their own and take turns: where ids are skewed the same counter comes up again and
// again, and each time the core would wait for its last change.
inline void radix_sort(uint64_t* keys, uint64_t* spare, int64_t n, int shift, RadixPlan plan) {
    const uint64_t mask = (uint64_t(1) << plan.digit_bits) - 1;
    const int64_t half = n / 2;
    for (int pass = 0; pass < plan.passes; ++pass, shift += plan.digit_bits) {
        uint32_t low[2048], high[2048];
        memset(low, 0, sizeof(uint32_t) << plan.digit_bits);
        memset(high, 0, sizeof(uint32_t) << plan.digit_bits);
        const uint64_t* upper = keys + half;
        for (int64_t i = 0; i < half; ++i) {
            ++low[(keys[i] >> shift) & mask];
            ++high[(upper[i] >> shift) & mask];
        }
        if (n & 1) ++high[(upper[half] >> shift) & mask];
        uint32_t sum = 0;
        for (uint64_t d = 0; d <= mask; ++d) {
            const uint32_t here = low[d], next = high[d];
            low[d] = sum;
            high[d] = sum += here;
            sum += next;
        }
        for (int64_t i = 0; i < half; ++i) {
            spare[low[(keys[i] >> shift) & mask]++] = keys[i];
            spare[high[(upper[i] >> shift) & mask]++] = upper[i];
        }
        if (n & 1) spare[high[(upper[half] >> shift) & mask]++] = upper[half];
        uint64_t* t = keys;
        keys = spare;
        spare = t;
    }
}

}  // namespace
