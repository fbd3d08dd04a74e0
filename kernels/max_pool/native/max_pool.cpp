// The largest value of each column over the rows of a bag, and where its gradient goes. Meanings: ../plain.py.
// Every bag is computed by one thread in a fixed order; the gradient is added up by one thread.
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define TWM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TWM_CLONES
#endif
#define TWM_API extern "C" __attribute__((visibility("default")))

namespace {

enum Kind { PLAIN, KEEP, ADD, MULTIPLY };
enum Mode { FIRST, SHARED, BAG };

struct Call {  // _Call of cpu.py
    int64_t kind, mode, wide, threads, bags, length, dim, rows, stride, padding;
    const char* weight;
    const int64_t *ids, *starts;  // starts: bags + 1 positions, or null where every bag has `length` ids
    const char* mask;             // of the shape of the ids: bool for KEEP, else of the weight's type
    double fill;
    char* out;
    int32_t* chosen;  // FIRST, BAG: the position in its bag whose row was largest, -1 if none; SHARED: how many were
};

int64_t start_of(const Call& c, int64_t bag) { return c.starts ? c.starts[bag] : bag * c.length; }

template <typename T>
struct Position {
    const T* row;
    T add, times, fill;
    bool filled;
    Position(const Call& c, int64_t p) : add(0), times(1), fill(T(c.fill)), filled(false) {
        row = reinterpret_cast<const T*>(c.weight) + c.ids[p] * c.stride;
        if (c.kind == KEEP) filled = !reinterpret_cast<const uint8_t*>(c.mask)[p];
        if (c.kind == ADD) add = reinterpret_cast<const T*>(c.mask)[p];
        if (c.kind == MULTIPLY) times = reinterpret_cast<const T*>(c.mask)[p];
    }
    template <typename F>
    inline __attribute__((always_inline)) void each(const Call& c, F f) const {
        const int64_t dim = c.dim;
        if (filled) {
            for (int64_t d = 0; d < dim; ++d) f(d, fill);
        } else if (c.kind == ADD) {
            for (int64_t d = 0; d < dim; ++d) f(d, T(row[d] + add));
        } else if (c.kind == MULTIPLY) {
            for (int64_t d = 0; d < dim; ++d) f(d, T(row[d] * times));
        } else {
            for (int64_t d = 0; d < dim; ++d) f(d, row[d]);
        }
    }
};

template <typename T>
inline __attribute__((always_inline)) void forward_bag(const Call& c, int64_t bag) {
    T* const best = reinterpret_cast<T*>(c.out) + bag * c.dim;
    int32_t* const chosen = c.chosen + bag * c.dim;
    const int64_t begin = start_of(c, bag), end = start_of(c, bag + 1);
    bool first = true;
    for (int64_t p = begin; p < end; ++p) {
        if (c.mode == BAG && c.ids[p] == c.padding) continue;
        const Position<T> at(c, p);
        const int32_t place = at.filled ? -1 : int32_t(p - begin);
        if (c.mode == SHARED) {
            if (first) at.each(c, [&](int64_t d, T v) { best[d] = v; chosen[d] = v == v; });
            else
                at.each(c, [&](int64_t d, T v) {
                    const bool more = !(v <= best[d]) && best[d] == best[d];  // NaN stays
                    chosen[d] = more ? int32_t(v == v) : chosen[d] + int32_t(v == best[d]);
                    best[d] = more ? v : best[d];
                });
        } else if (first) {
            at.each(c, [&](int64_t d, T v) { best[d] = v; chosen[d] = place; });
        } else if (c.mode == BAG) {
            at.each(c, [&](int64_t d, T v) {
                const bool more = v > best[d];
                chosen[d] = more ? place : chosen[d];
                best[d] = more ? v : best[d];
            });
        } else {
            at.each(c, [&](int64_t d, T v) {
                const bool more = !(v <= best[d]) && best[d] == best[d];
                chosen[d] = more ? place : chosen[d];
                best[d] = more ? v : best[d];
            });
        }
        first = false;
    }
    if (first)
        for (int64_t d = 0; d < c.dim; ++d) best[d] = 0, chosen[d] = c.mode == SHARED ? 0 : -1;
}

TWM_CLONES void forward_float(const Call& c, int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) forward_bag<float>(c, b);
}
TWM_CLONES void forward_double(const Call& c, int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) forward_bag<double>(c, b);
}

template <typename T>
inline __attribute__((always_inline)) void backward_shared(const Call& c, const T* grad, const int32_t* slots, T* values) {
    std::vector<T> share(c.dim), rest(c.dim);  // of a value that is equal to the largest, and of any other
    for (int64_t bag = 0; bag < c.bags; ++bag) {
        const T* const best = reinterpret_cast<const T*>(c.out) + bag * c.dim;
        for (int64_t d = 0; d < c.dim; ++d) {
            const int32_t equal = c.chosen[bag * c.dim + d];
            share[d] = grad[bag * c.dim + d] / T(equal);
            rest[d] = equal ? T(0) : T(0) * share[d];  // as in PyTorch NaN for all where the largest is NaN
        }
        for (int64_t p = start_of(c, bag), end = start_of(c, bag + 1); p < end; ++p) {
            if (slots[p] < 0) continue;
            const Position<T> at(c, p);
            if (at.filled) continue;
            T* const mine = values + int64_t(slots[p]) * c.dim;
            at.each(c, [&](int64_t d, T v) { mine[d] += (v == best[d] ? share[d] : rest[d]) * at.times; });
        }
    }
}

TWM_CLONES void shared_float(const Call& c, const float* g, const int32_t* slots, float* values) { backward_shared(c, g, slots, values); }
TWM_CLONES void shared_double(const Call& c, const double* g, const int32_t* slots, double* values) { backward_shared(c, g, slots, values); }

template <typename T>
void backward(const Call& c, const T* grad, const int32_t* slots, T* values) {
    const T* const mask = c.kind == MULTIPLY ? reinterpret_cast<const T*>(c.mask) : nullptr;
    for (int64_t bag = 0; bag < c.bags; ++bag) {
        const T* const g = grad + bag * c.dim;
        const int32_t* const chosen = c.chosen + bag * c.dim;
        const int64_t begin = start_of(c, bag);
        for (int64_t d = 0; d < c.dim; ++d) {
            if (chosen[d] < 0) continue;
            const int64_t p = begin + chosen[d];
            if (slots[p] >= 0) values[int64_t(slots[p]) * c.dim + d] += mask ? g[d] * mask[p] : g[d];
        }
    }
}

}  // namespace

TWM_API int64_t twm_abi() { return 1; }

// -1, or the place of an id outside of the table.
TWM_API int64_t twm_forward(const Call* call) {
    const Call& c = *call;
    const int64_t ids = start_of(c, c.bags);
    for (int64_t p = 0; p < ids; ++p)
        if (uint64_t(c.ids[p]) >= uint64_t(c.rows)) return p;
    const int64_t block = 64, blocks = (c.bags + block - 1) / block;
    const int threads = ids * c.dim > 65536 ? int(c.threads) : 1;
    (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#endif
    for (int64_t t = 0; t < blocks; ++t) {
        const int64_t to = std::min((t + 1) * block, c.bags);
        if (c.wide) forward_double(c, t * block, to);
        else forward_float(c, t * block, to);
    }
    return -1;
}

// The different ids other than `padding` in order, and for each position the number of its id among them (-1 for padding).
// Returns how many they are, or -1 if there is no memory.
TWM_API int64_t twm_unique(const int64_t* ids, int64_t count, int64_t rows, int64_t padding, int64_t* unique, int32_t* slots) {
    try {
        std::vector<int64_t> keys(ids, ids + count), other(count);
        std::vector<int32_t> places(count), moved(count);
        for (int64_t i = 0; i < count; ++i) places[i] = int32_t(i);
        for (int shift = 0; shift < 63 && (rows - 1) >> shift; shift += 11) {
            int64_t starts[2049] = {0};
            for (int64_t i = 0; i < count; ++i) ++starts[((keys[i] >> shift) & 2047) + 1];
            for (int b = 0; b < 2048; ++b) starts[b + 1] += starts[b];
            for (int64_t i = 0; i < count; ++i) {
                const int64_t to = starts[(keys[i] >> shift) & 2047]++;
                other[to] = keys[i];
                moved[to] = places[i];
            }
            keys.swap(other);
            places.swap(moved);
        }
        int64_t found = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (keys[i] == padding) {
                slots[places[i]] = -1;
                continue;
            }
            if (!found || unique[found - 1] != keys[i]) unique[found++] = keys[i];
            slots[places[i]] = int32_t(found - 1);
        }
        return found;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

// Adds the gradient to `values`, [*, dim] contiguous, at row slots[position]. False if there is no memory.
TWM_API int64_t twm_backward(const Call* call, const void* grad, const int32_t* slots, void* values) {
    const float* const narrow = static_cast<const float*>(grad);
    const double* const wide = static_cast<const double*>(grad);
    try {
        if (call->mode == SHARED && call->wide) shared_double(*call, wide, slots, static_cast<double*>(values));
        else if (call->mode == SHARED) shared_float(*call, narrow, slots, static_cast<float*>(values));
        else if (call->wide) backward(*call, wide, slots, static_cast<double*>(values));
        else backward(*call, narrow, slots, static_cast<float*>(values));
        return 1;
    } catch (const std::bad_alloc&) {
        return 0;
    }
}
