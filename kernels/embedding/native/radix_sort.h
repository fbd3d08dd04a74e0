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
// Keys are counted for two passes in one go, and taken from both ends in turn, upwards from where a digit's keys begin and downwards from
// where they end: where ids are skewed the same counter comes up again and again, and each time the core would wait for its last change.
inline void radix_sort(uint64_t* keys, uint64_t* spare, int64_t n, int shift, RadixPlan plan) {
    const int bits = plan.digit_bits;
    const uint64_t mask = (uint64_t(1) << bits) - 1;
    const int64_t half = n / 2;
    uint32_t begin[2][2048], end[2][2048];
    for (int pass = 0; pass < plan.passes; ++pass, shift += bits) {
        uint32_t *first = begin[pass & 1], *last = end[pass & 1];
        if (!(pass & 1)) {
            const bool both = pass + 1 < plan.passes;
            for (int k = 0; k <= both; ++k) {
                memset(begin[k], 0, sizeof(uint32_t) << bits);
                memset(end[k], 0, sizeof(uint32_t) << bits);
            }
            if (n & 1) {
                ++begin[0][(keys[n - 1] >> shift) & mask];
                if (both) ++begin[1][(keys[n - 1] >> shift >> bits) & mask];
            }
            if (both) {
                for (int64_t i = 0; i < half; ++i) {
                    const uint64_t a = keys[i] >> shift, b = keys[half + i] >> shift;
                    ++begin[0][a & mask];
                    ++end[0][b & mask];
                    ++begin[1][(a >> bits) & mask];
                    ++end[1][(b >> bits) & mask];
                }
            } else {
                for (int64_t i = 0; i < half; ++i) {
                    ++begin[0][(keys[i] >> shift) & mask];
                    ++end[0][(keys[half + i] >> shift) & mask];
                }
            }
        }
        uint32_t sum = 0;
        for (uint64_t d = 0; d <= mask; ++d) {
            const uint32_t count = first[d] + last[d];
            first[d] = sum;
            last[d] = sum += count;
        }
        for (int64_t i = 0; i < half; ++i) {
            const uint64_t a = keys[i], b = keys[n - 1 - i];
            spare[first[(a >> shift) & mask]++] = a;
            spare[--last[(b >> shift) & mask]] = b;
        }
        if (n & 1) spare[first[(keys[half] >> shift) & mask]] = keys[half];
        uint64_t* t = keys;
        keys = spare;
        spare = t;
    }
}

}  // namespace
