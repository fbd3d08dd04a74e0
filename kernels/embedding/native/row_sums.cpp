// Sums of looked-up rows of which only the sign, and whether they are zero, matters: see pooled.py.
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

enum : int64_t { AHEAD = 24 };  // rows asked for before their use

// The sum of n numbers in another order than anyone else's. NaN where that order could decide whether the result is zero: any two
// orders differ by at most 2 n u sum|x| (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2; u is half an ulp of 1).
template <class T> T sum_of(const T* x, int64_t n) {
    T sum[4] = {0, 0, 0, 0}, size[4] = {0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int k = 0; k < 4; ++k) sum[k] += x[i + k], size[k] += std::fabs(x[i + k]);
    for (; i < n; ++i) sum[0] += x[i], size[0] += std::fabs(x[i]);
    const T total = (sum[0] + sum[1]) + (sum[2] + sum[3]), all = (size[0] + size[1]) + (size[2] + size[3]);
    const T doubt = T(n) * 2 * std::numeric_limits<T>::epsilon() * all;
    return all == 0 || std::fabs(total) > doubt ? total : std::numeric_limits<T>::quiet_NaN();
}

template <class T, class I>
int64_t sums(const T* table, int64_t stride, int64_t rows, int64_t dim, const I* ids, int64_t count, T* out, int64_t threads) {
    int64_t bad = 0, doubtful = 0;
    (void)threads;
#pragma omp parallel for num_threads(int(threads)) reduction(+ : bad, doubtful) schedule(static) if (threads > 1)
    for (int64_t p = 0; p < count; ++p) {
        const uint64_t row = uint64_t(ids[p]);
        if (row >= uint64_t(rows)) {
            ++bad;
            continue;
        }
        const int64_t later = p + AHEAD < count ? int64_t(ids[p + AHEAD]) : 0;
        if (uint64_t(later) < uint64_t(rows)) {
            const T* ahead = table + later * stride;
            for (int64_t i = 0; i < dim; i += int64_t(64 / sizeof(T))) __builtin_prefetch(ahead + i);
            __builtin_prefetch(ahead + dim - 1);  // a row that does not start on a cache line ends in one more
        }
        out[p] = sum_of(table + int64_t(row) * stride, dim);
        doubtful += out[p] != out[p];
    }
    return bad ? -1 : doubtful;
}

}  // namespace

// Writes one sum for each id; returns how many are NaN (in doubt: to be made again), or -1 for an id outside the table.
extern "C" __attribute__((visibility("default"))) int64_t tw_row_sums(const void* table, int64_t is_double, int64_t stride,
                                                                      int64_t rows, int64_t dim, const void* ids, int64_t id_bytes,
                                                                      int64_t count, void* out, int64_t threads) {
    const int32_t* narrow = static_cast<const int32_t*>(ids);
    const int64_t* wide = static_cast<const int64_t*>(ids);
    if (is_double) {
        const double* t = static_cast<const double*>(table);
        double* o = static_cast<double*>(out);
        return id_bytes == 4 ? sums(t, stride, rows, dim, narrow, count, o, threads) : sums(t, stride, rows, dim, wide, count, o, threads);
    }
    const float* t = static_cast<const float*>(table);
    float* o = static_cast<float*>(out);
    return id_bytes == 4 ? sums(t, stride, rows, dim, narrow, count, o, threads) : sums(t, stride, rows, dim, wide, count, o, threads);
}
