// How a cache names its slots: sets of 16, and tags that say which row of the table a slot has.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "store.h"

namespace twt {
namespace {

const int64_t WAYS = 16;

struct Slot {
    uint32_t stamp;  // the fetch that used it last
    uint16_t count;  // fetches that used it, as far as that can count
    uint16_t pins : 15, dirty : 1;
};

const size_t PINS = 32767;  // batches that may be under way

struct Set {  // three lines of the CPU's caches, on one page
    uint32_t tags[WAYS];  // 0: nothing is there
    Slot slots[WAYS];
};

// Where a row may be: one of two sets, each with a tag of 32 bits that no other row has there, so that the tags of a set are one line of the
// CPU's caches and a tag says its row. A row is mixed within the bits that rows have (each step can be undone); the sets share the
// range of the result in order, so that the low bits tell rows of a set apart. A tag: 1, which set of the two, 30 bits.
class Places {
  public:
    Places(int64_t rows, int64_t sets) : sets_(uint64_t(sets)) {
        while (bits_ < 62 && (uint64_t(1) << bits_) < uint64_t(rows)) bits_++;
        mask_ = (uint64_t(1) << bits_) - 1;
        half_ = (bits_ + 1) / 2;
        if ((mask_ >> 29) / sets_ > 0)
            throw Failure{"a cache of " + std::to_string(sets * WAYS) + " slots is too small for a table of " + std::to_string(rows) + " rows: one slot for 32 million rows is the least"};
    }

    struct Place {
        int64_t set;
        uint32_t tag;
    };

    Place of(int64_t row, uint64_t which) const {
        uint64_t h = mixed(uint64_t(row));
        if (which) h = mixed(h ^ (mask_ / 3));
        return {int64_t((unsigned __int128)(h) * sets_ >> bits_), TAKEN | uint32_t(which) << 30 | uint32_t(h & LOW)};
    }

    int64_t row(int64_t set, uint32_t tag) const {
        uint64_t first = uint64_t((((unsigned __int128)(uint64_t(set)) << bits_) + sets_ - 1) / sets_);
        uint64_t h = unmixed(first + ((tag - first) & LOW));
        if (tag & SECOND) h = unmixed(h ^ (mask_ / 3));
        return int64_t(h);
    }

  private:
    static const uint32_t TAKEN = 1u << 31, SECOND = 1u << 30, LOW = SECOND - 1;
    static const uint64_t A = 0xbf58476d1ce4e5b9ull, B = 0x94d049bb133111ebull;

    static uint64_t inverse(uint64_t odd) {  // modulo 2**64, by Newton's iteration
        uint64_t x = odd;
        for (int i = 0; i < 5; i++) x *= 2 - odd * x;
        return x;
    }
    uint64_t mixed(uint64_t x) const {
        x = ((x ^ (x >> half_)) * A) & mask_;
        x = ((x ^ (x >> half_)) * B) & mask_;
        return x ^ (x >> half_);
    }
    uint64_t unmixed(uint64_t x) const {
        x = ((x ^ (x >> half_)) * inverse(B)) & mask_;
        x = ((x ^ (x >> half_)) * inverse(A)) & mask_;
        return x ^ (x >> half_);
    }

    uint64_t sets_, mask_;
    int bits_ = 8, half_;
};

// Which of the tags of a set (at a multiple of 64 bytes) are `tag`, a bit for each.
inline uint32_t same(const uint32_t* tags, uint32_t tag) {
#if defined(__SSE2__)
    __m128i wanted = _mm_set1_epi32(int(tag));
    const __m128i* at = reinterpret_cast<const __m128i*>(tags);
    __m128i low = _mm_packs_epi32(_mm_cmpeq_epi32(at[0], wanted), _mm_cmpeq_epi32(at[1], wanted));
    __m128i high = _mm_packs_epi32(_mm_cmpeq_epi32(at[2], wanted), _mm_cmpeq_epi32(at[3], wanted));
    return uint32_t(_mm_movemask_epi8(_mm_packs_epi16(low, high)));
#else
    uint32_t found = 0;
    for (int way = 0; way < WAYS; way++) found |= tags[way] == tag ? 1u << way : 0u;
    return found;
#endif
}

}  // namespace
}  // namespace twt
