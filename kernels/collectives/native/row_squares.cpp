// Rowwise AdaGrad on tables that are cut into columns, in two passes over the gradients: row_squares.py calls them, and sums over ranks
// in between.
#include <cmath>
#include <cstdint>

namespace {

enum : int64_t { AHEAD = 12 };  // rows asked for before their use

// One table; filled by row_squares.py. Doubles, so that float64 tables lose nothing.
struct Step {
    const void* values;  // [count, cols] summed gradients
    int64_t count, cols;
    void* squares;       // [count]: of this rank's columns; for the step those of all columns
    const int64_t* rows; // [count] distinct, ascending
    void* table;
    int64_t stride;      // of the table's rows
    void* state;         // a number for each row of the table
    double dim;          // columns of the whole row
    double rate, eps;    // rate is negative to maximize
    double keep;         // 1 - lr * weight decay
};

// Compiled for wide vectors too; the processor at hand picks.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#define TW_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TW_WIDE
#endif
#define TW_INSIDE inline __attribute__((always_inline))

template <class T> TW_INSIDE void squares_of(const Step& s) {
    const T* values = static_cast<const T*>(s.values);
    T* out = static_cast<T*>(s.squares);
    for (int64_t k = 0; k < s.count; ++k, values += s.cols) {
        T sum[16] = {};
        int64_t c = 0;
        for (; c + 16 <= s.cols; c += 16)
            for (int i = 0; i < 16; ++i) sum[i] += values[c + i] * values[c + i];
        for (; c < s.cols; ++c) sum[0] += values[c] * values[c];
        for (int half = 8; half; half /= 2)
            for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
        out[k] = sum[0];
    }
}

template <class T> TW_INSIDE void step_of(const Step& s) {
    const T *values = static_cast<const T*>(s.values), *squares = static_cast<const T*>(s.squares);
    T *const table = static_cast<T*>(s.table), *const state = static_cast<T*>(s.state);
    const T dim = T(s.dim), rate = T(s.rate), eps = T(s.eps), keep = T(s.keep);
    for (int64_t k = 0; k < s.count; ++k, values += s.cols) {
        if (k + AHEAD < s.count) {
            const T* later = table + s.rows[k + AHEAD] * s.stride;
            for (int64_t c = 0; c < s.cols; c += int64_t(64 / sizeof(T))) __builtin_prefetch(later + c, 1);
        }
        T& sum = state[s.rows[k]];
        sum += squares[k] / dim;
        const T root = std::sqrt(sum) + eps;
        T* row = table + s.rows[k] * s.stride;
        for (int64_t c = 0; c < s.cols; ++c) row[c] = row[c] * keep - rate * (values[c] / root);
    }
}

TW_WIDE void squares(const Step& s, bool is_double) { is_double ? squares_of<double>(s) : squares_of<float>(s); }
TW_WIDE void step(const Step& s, bool is_double) { is_double ? step_of<double>(s) : step_of<float>(s); }

template <class Run> void each(int64_t tables, int64_t threads, Run run) {
    (void)threads;
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic) if (threads > 1 && tables > 1)
    for (int64_t t = 0; t < tables; ++t) run(t);
}

}  // namespace

#define TW_EXPORT extern "C" __attribute__((visibility("default")))

TW_EXPORT int64_t twc_abi() { return 4; }

TW_EXPORT void twc_squares(const Step* steps, int64_t tables, int64_t is_double, int64_t threads) {
    each(tables, threads, [=](int64_t t) { squares(steps[t], is_double); });
}

TW_EXPORT void twc_step(const Step* steps, int64_t tables, int64_t is_double, int64_t threads) {
    each(tables, threads, [=](int64_t t) { step(steps[t], is_double); });
}
