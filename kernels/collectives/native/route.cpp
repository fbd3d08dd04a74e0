// Which row numbers go to which rank, and where the rows that come back belong: one pass each. route_alike.py and merge_rows.py call them.
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// What goes to one shard: the rows [first, first + count) of what a lookup asks for.
struct Way {
    int64_t lookup, first, count;
};

template <class In, class Out>
bool route(const int64_t* ids, const int64_t* rows, int64_t lookups, const int64_t* lengths, int64_t bags, int64_t used, const Way* ways,
           int64_t streams, Out* payload, int64_t* places, int64_t* header, int64_t* ends) {
    for (int64_t l = 0; l < lookups; ++l) {
        const In* mine = reinterpret_cast<const In*>(ids[l]);
        bool wrong = false;
        for (int64_t i = 0; i < used; ++i) wrong |= uint64_t(int64_t(mine[i])) >= uint64_t(rows[l]);
        if (wrong) return false;
    }
    std::vector<Out> sizes(size_t(bags) + 1);
    Out* to = payload;
    for (int64_t s = 0; s < streams; ++s, header += 3) {
        const In* mine = reinterpret_cast<const In*>(ids[ways[s].lookup]);
        const int64_t first = ways[s].first;
        const uint64_t count = uint64_t(ways[s].count);
        int64_t found = 0, held = 0;
        for (int64_t b = 0; b < bags; ++b) {  // without branches: half of the ids may go elsewhere. What does not count is written over.
            const int64_t before = found;
            for (int64_t i = 0; i < lengths[b]; ++i) {
                const int64_t row = int64_t(*mine++) - first;
                to[found] = Out(row);
                found += uint64_t(row) < count;
            }
            places[held] = b;
            sizes[size_t(held)] = Out(found - before);
            held += found > before;
        }
        bool uneven = false;
        for (int64_t b = 1; b < held; ++b) uneven |= sizes[size_t(b)] != sizes[0];
        if (uneven) {
            memmove(to + held, to, size_t(found) * sizeof(Out));
            memcpy(to, sizes.data(), size_t(held) * sizeof(Out));
            to += held;
        }
        to += found;
        places += held;
        header[0] = held, header[1] = found, header[2] = uneven;
        ends[1] += held;
    }
    ends[0] = to - payload;
    return true;
}

// Rows that came, and the slot they belong to. They came block after block; in a block bag by bag, the rows of its streams side by side.
struct Merge {
    void *received, *slot;
    int64_t stride;          // from row to row of the slot
    const int64_t* places;   // [bags of all streams]: the slot's row
    const int64_t* header;   // [streams, 3]: first its bags, equally many in a block
    const int64_t* columns;  // [streams]: of the slot, where its rows begin
    const int64_t* widths;   // [streams]
    const int64_t* ends;     // [blocks]: after how many streams it ends
    int64_t blocks;
    double scale;
};

// Compiled for wide vectors too; the processor at hand picks.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define TW_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TW_WIDE
#endif
#define TW_INSIDE __attribute__((always_inline))

template <class T, class Each> TW_INSIDE inline void each_row(const Merge& m, Each each) {
    T *received = static_cast<T*>(m.received), *slot = static_cast<T*>(m.slot);
    const int64_t* place = m.places;
    for (int64_t b = 0, s = 0; b < m.blocks; s = m.ends[b++]) {
        const int64_t streams = m.ends[b] - s, bags = m.header[3 * s];
        for (int64_t k = 0; k < bags; ++k)
            for (int64_t j = 0; j < streams; ++j) {
                if (k + 1 < bags) {  // of rows this short the processor asks for none ahead by itself: 0.44 -> 0.30 ms, `part` 0.76 -> 0.37
                    const char* next = reinterpret_cast<const char*>(slot + place[j * bags + k + 1] * m.stride + m.columns[s + j]);
                    for (int64_t at = 0; at < m.widths[s + j] * int64_t(sizeof(T)); at += 64) __builtin_prefetch(next + at);
                }
                each(received, slot + place[j * bags + k] * m.stride + m.columns[s + j], m.widths[s + j]);
                received += m.widths[s + j];
            }
        place += streams * bags;
    }
}

template <class T> TW_INSIDE inline void merge(const Merge& m, bool add) {
    if (!add) return each_row<T>(m, [](const T* row, T* home, int64_t width) TW_INSIDE { memcpy(home, row, size_t(width) * sizeof(T)); });
    each_row<T>(m, [](const T* __restrict row, T* __restrict home, int64_t width) TW_INSIDE {
        for (int64_t c = 0; c < width; ++c) home[c] += row[c];
    });
}

template <class T> TW_INSIDE inline void part(const Merge& m) {
    const T scale = T(m.scale);
    each_row<T>(m, [scale](T* __restrict row, const T* __restrict home, int64_t width) TW_INSIDE {
        for (int64_t c = 0; c < width; ++c) row[c] = home[c] * scale;
    });
}

TW_WIDE void merge_floats(const Merge& m, bool add) { merge<float>(m, add); }
TW_WIDE void merge_doubles(const Merge& m, bool add) { merge<double>(m, add); }
TW_WIDE void part_floats(const Merge& m) { part<float>(m); }
TW_WIDE void part_doubles(const Merge& m) { part<double>(m); }

TW_WIDE void mean_floats(float* mine, const float* theirs, int64_t count) {
    for (int64_t i = 0; i < count; ++i) mine[i] = (mine[i] + theirs[i]) * 0.5f;
}
TW_WIDE void mean_doubles(double* mine, const double* theirs, int64_t count) {
    for (int64_t i = 0; i < count; ++i) mine[i] = (mine[i] + theirs[i]) * 0.5;
}

}  // namespace

#define TW_EXPORT extern "C" __attribute__((visibility("default")))

// 0, or 1 where an id is outside its table. `ends`: how many numbers of payload and of places were written; both have room for one more.
TW_EXPORT int64_t twc_route(const int64_t* ids, const int64_t* rows, int64_t lookups, const int64_t* lengths, int64_t bags, int64_t used,
                            const Way* ways, int64_t streams, int64_t wide_in, int64_t wide_out, void* payload, int64_t* places,
                            int64_t* header, int64_t* ends) {
    ends[0] = ends[1] = 0;
    const auto run = [&](auto in, auto out) {
        using In = decltype(in);
        using Out = decltype(out);
        return route<In, Out>(ids, rows, lookups, lengths, bags, used, ways, streams, static_cast<Out*>(payload), places, header, ends);
    };
    const bool good = wide_in ? wide_out ? run(int64_t(), int64_t()) : run(int64_t(), int32_t()) : wide_out ? run(int32_t(), int64_t()) : run(int32_t(), int32_t());
    return !good;
}

// The slot gets the received rows; `add`: to what is there.
TW_EXPORT void twc_merge(const Merge* m, int64_t add, int64_t is_double) { is_double ? merge_doubles(*m, add) : merge_floats(*m, add); }

// The other way: each received row is `scale` times its place in the slot.
TW_EXPORT void twc_part(const Merge* m, int64_t is_double) { is_double ? part_doubles(*m) : part_floats(*m); }

// mine = (mine + theirs) / 2, the same on both sides to the last bit.
TW_EXPORT void twc_mean(void* mine, const void* theirs, int64_t count, int64_t is_double) {
    if (is_double) mean_doubles(static_cast<double*>(mine), static_cast<const double*>(theirs), count);
    else mean_floats(static_cast<float*>(mine), static_cast<const float*>(theirs), count);
}
