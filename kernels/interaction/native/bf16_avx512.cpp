// Dots of rows rounded to bfloat16, with AVX512-BF16, summed in float32. Empty elsewhere.
//
// Forward: a sample's rows as pairs along dim, and those transposed; then blocks of the lower triangle of X X^T are summed in registers.
// Backward: dX = L X + L^T X, where L is the lower triangle of the gradients; pairs lie along the features. Values so small that bfloat16
// holds them as subnormals count as 0.
#include "bf16.h"
#if defined(TWI_BF16)
#include <immintrin.h>  // before the target changes, so that nothing in it is compiled for AVX-512 by accident
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif

using namespace twi;

namespace {

#include "../../native/vectors.inc"

enum { ROWS = 8, BACK_ROWS = 6 };  // of sums that registers hold, of two vectors each, or of four

inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (__mmask32(1) << n) - 1; }
inline __m512bh pairs_at(const uint32_t* from) { return (__m512bh)_mm512_load_si512(from); }
inline __m512bh all(uint32_t pair) { return (__m512bh)_mm512_set1_epi32(int(pair)); }

// What a sample needs is read in one go and then worked on for long: that of the next one is asked for meanwhile.
#include "../../native/soon.inc"

// What a sample works in. All sizes are whole vectors.
struct Scratch {
    int64_t features, depth, dim;
    uint32_t *rows, *columns;  // [features, depth]: pairs of neighbours in a row; [depth, features]: the same transposed
    // Going back `rows` is [features / 2, dim]: pairs of neighbouring rows. L is the lower triangle of gradients:
    uint32_t *lower, *upper;  // [features + 32, features / 2]: pairs of L; [features / 2, features]: pairs of L transposed, and some beyond
    Scratch(const Call& c, char* at)
        : features(rounded_up(c.features, 32)), depth(rounded_up((c.dim + 1) / 2, 16)), dim(rounded_up(c.dim, 16)), rows(reinterpret_cast<uint32_t*>(at)),
          columns(rows + features * depth), lower(columns), upper(lower + (features + 32) * (features / 2)) {}
    int64_t count() const {
        const int64_t squares = (features + 32) * features + BACK_ROWS;
        return features * depth + (features * depth > squares ? features * depth : squares);
    }
};

int64_t scratch_bytes(const Call* c) { return Scratch(*c, nullptr).count() * int64_t(sizeof(uint32_t)); }

template <int C>
inline void triangle_rows(uint16_t* y, const Scratch& s, int64_t top, int64_t bottom, int64_t left) {
    __m512 sums[ROWS][C];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < C; c++) sums[r][c] = _mm512_setzero_ps();
    const uint32_t* a = s.rows + top * s.depth;
    const uint32_t* b = s.columns + left;
    for (int64_t k = 0; k < s.depth; k++, b += s.features) {
        __m512bh column[C];
        for (int c = 0; c < C; c++) column[c] = pairs_at(b + 16 * c);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < C; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], all(a[r * s.depth + k]), column[c]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        const int64_t i = top + r;
        uint16_t* const to = y + i * (i - 1) / 2 + left;
        if (i < bottom)
            for (int c = 0; c < C; c++) _mm256_mask_storeu_epi16(to + 16 * c, first(i - left - 16 * c), (__m256i)_mm512_cvtneps_pbh(sums[r][c]));
    }
}

void forward(const Job* job) {
    const Call& c = *job->call;
    const Scratch s(c, job->scratch);
    for (int64_t i = c.features * s.depth; i < s.features * s.depth; i++) s.rows[i] = 0;
    for (int64_t b = job->begin; b < job->end; b++) {
        const float* x = reinterpret_cast<const float*>(c.x) + b * c.x_batch;
        for (int64_t f = 0; f < c.features; f++, x += c.x_feature) {
            soon<0>(x + c.x_batch, c.dim);
            for (int64_t k = 0; k < s.depth; k += 16) {
                const __m512 low = _mm512_maskz_loadu_ps(first(c.dim - 2 * k), x + 2 * k), high = _mm512_maskz_loadu_ps(first(c.dim - 2 * k - 16), x + 2 * k + 16);
                _mm512_store_si512(s.rows + f * s.depth + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            }
        }
        for (int64_t f = 0; f < c.features; f += 16)
            for (int64_t k = 0; k < s.depth; k += 16) {
                __m512 r[16];
                for (int i = 0; i < 16; i++) r[i] = _mm512_load_ps(s.rows + (f + i) * s.depth + k);
                transpose(r);
                for (int i = 0; i < 16; i++) _mm512_store_ps(s.columns + (k + i) * s.features + f, r[i]);
            }
        uint16_t* const y = reinterpret_cast<uint16_t*>(c.y) + b * c.y_batch;
        for (int64_t top = 0; top < c.features; top += ROWS) {
            const int64_t last = least(top + ROWS, c.features) - 1;  // the columns before it are wanted
            int64_t left = 0;
            for (; left + 16 < last; left += 32) triangle_rows<2>(y, s, top, c.features, left);
            if (left < last) triangle_rows<1>(y, s, top, c.features, left);
        }
    }
}

// `most` pairs of the depth from `a` (row r at a + r * row, the next pair `step` further) and `b`.
template <int C>
inline void add_gradients(__m512 (&sums)[BACK_ROWS][C], const uint32_t* a, int64_t row, int64_t step, const uint32_t* b, int64_t dim, int64_t most) {
    for (int64_t k = 0; k < most; k++, a += step, b += dim) {
        __m512bh x[C];
#pragma GCC unroll 4
        for (int v = 0; v < C; v++) x[v] = pairs_at(b + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < BACK_ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < C; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], all(a[r * row]), x[v]);
    }
}

template <int C> inline void gradient_rows(float* dx, const Scratch& s, int64_t top, int64_t features, int64_t dim, int64_t left) {
    __m512 sums[BACK_ROWS][C];
#pragma GCC unroll 6
    for (int r = 0; r < BACK_ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < C; v++) sums[r][v] = _mm512_setzero_ps();
    const int64_t pairs = (features + 1) / 2, before = least((top + BACK_ROWS) / 2, pairs), from = top / 2;
    add_gradients<C>(sums, s.lower + top * (s.features / 2), s.features / 2, 1, s.rows + left, s.dim, before);
    add_gradients<C>(sums, s.upper + from * s.features + top, 1, s.features, s.rows + from * s.dim + left, s.dim, pairs - from);
#pragma GCC unroll 6
    for (int r = 0; r < BACK_ROWS; r++)
        if (top + r < features)
#pragma GCC unroll 4
            for (int v = 0; v < C; v++) _mm512_mask_storeu_ps(dx + (top + r) * dim + left + 16 * v, first(dim - left - 16 * v), sums[r][v]);
}

void backward(const Job* job) {
    const Call& c = *job->call;
    const Scratch s(c, job->scratch);
    const int64_t features = c.features, dim = c.dim, apart = c.x_feature, half = s.features / 2;
    // Of two vectors of 32 values: value i of one beside value i of the other, for the first 16 and the last 16.
    const __m512i ascending = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i both = _mm512_or_si512(ascending, _mm512_slli_epi32(ascending, 16));  // 0 0 1 1 ...
    const __m512i one = _mm512_or_si512(both, _mm512_set1_epi32(32 << 16)), other = _mm512_or_si512(one, _mm512_set1_epi32(16 << 16 | 16));
    const __m512i within = _mm512_or_si512(both, _mm512_set1_epi32(16 << 16));  // the halves of one vector
    for (int64_t i = 0; i < (s.features + BACK_ROWS) * half; i++) s.lower[i] = 0;
    for (int64_t b = job->begin; b < job->end; b++) {
        const uint16_t* y = reinterpret_cast<const uint16_t*>(c.y) + b * c.y_batch;
        soon<0>(y + c.y_batch, c.pairs);
        for (int64_t i = 1; i < features; y += i, i++)
            for (int64_t j = 0; j < i; j += 32) _mm512_store_si512(s.lower + i * half + j / 2, _mm512_maskz_loadu_epi16(first32(i - j), y + j));
        for (int64_t k = 0; 2 * k < features; k++)
            for (int64_t i = 0; i < features; i += 32) {
                const uint32_t* const row = s.lower + 2 * k * half + i / 2;
                const __m512i even = _mm512_load_si512(row), odd = _mm512_load_si512(row + half);
                _mm512_store_si512(s.upper + k * s.features + i, _mm512_permutex2var_epi16(even, one, odd));
                _mm512_store_si512(s.upper + k * s.features + i + 16, _mm512_permutex2var_epi16(even, other, odd));
            }
        const float* x = reinterpret_cast<const float*>(c.x) + b * c.x_batch;
        for (int64_t f = 0; f < features; f += 2, x += 2 * apart) {
            const bool two = f + 1 < features;
            soon<0>(x + c.x_batch, dim);
            soon<0>(x + c.x_batch + apart, dim);
            for (int64_t d = 0; d < s.dim; d += 16) {
                const __mmask16 there = first(dim - d);
                const __m512 even = _mm512_maskz_loadu_ps(there, x + d), odd = _mm512_maskz_loadu_ps(two ? there : 0, x + (two ? apart : 0) + d);
                _mm512_store_si512(s.rows + f / 2 * s.dim + d, _mm512_permutexvar_epi16(within, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
            }
        }
        float* const dx = reinterpret_cast<float*>(c.dx) + b * features * dim;
        for (int64_t top = 0; top < features; top += BACK_ROWS) {
            soon<1>(dx + (features + top) * dim, least(BACK_ROWS, features - top) * dim);
            int64_t left = 0;
            for (; left + 48 < dim; left += 64) gradient_rows<4>(dx, s, top, features, dim, left);
            for (; left < dim; left += 16) gradient_rows<1>(dx, s, top, features, dim, left);
        }
    }
}

}  // namespace

extern "C" const LowKernels twi_kernels_bf16 = {scratch_bytes, {forward, backward}};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
