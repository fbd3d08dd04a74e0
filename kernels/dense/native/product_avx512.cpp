// float32 matrix products with AVX-512, for one thread. Empty elsewhere.
//
// The usual three levels of blocking: a part of the depth at a time, all of b of that part is packed into panels of NR columns; of a, MC rows
// into panels of MR rows, which stay in the second-level cache; a tile of MR x NR sums lives in registers. Packing takes either
// layout of either operand, so that no transposed copy is made for a weight's gradient.
#if defined(__x86_64__)
#include <immintrin.h>  // before the target changes, so that nothing in it is compiled for AVX-512 by accident
#include <stdint.h>
#include <string.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#include "abi.h"

using twm::Finish;
using twm::Matrix;

namespace {

// Measured on Zen 5 with DLRM's layers: the larger part of the depth writes each result once, the smaller block of a stays near.
constexpr int64_t MR = 12, NR = 32, MC = 48, KC = 1024;

#include "../../native/vectors.inc"

// Asks for what packing reads some steps later: with rows a page apart the processor does not see it coming.
inline void soon(const float* values) { _mm_prefetch(reinterpret_cast<const char*>(values), _MM_HINT_T0); }

// `width` values at each of `depth` steps into panels of W values a step: value w of step p is from[p * stride + w], or, if `across`,
// from[w * stride + p]. Zeros beyond the width.
template <int64_t W> void pack(const float* from, int64_t stride, bool across, int64_t width, int64_t depth, float* to) {
    if (across) {
        for (int64_t w0 = 0; w0 < width; w0 += W, to += W * depth)
            for (int64_t p = 0; p < depth; p += 16) {
                const int64_t steps = least(16, depth - p);
                for (int64_t w = 0; w < W; w += 16) {
                    const int64_t there = least(W, width - w0) - w;
                    const float* start = from + (w0 + w) * stride + p;
                    __m512 r[16];
                    for (int i = 0; i < 16; i++) soon(start + i * stride + 64);
                    for (int i = 0; i < 16; i++) r[i] = i < there ? _mm512_maskz_loadu_ps(first(steps), start + i * stride) : _mm512_setzero_ps();
                    transpose(r);
                    const __mmask16 kept = first(W - w);
                    if (steps == 16)
                        for (int i = 0; i < 16; i++) _mm512_mask_storeu_ps(to + (p + i) * W + w, kept, r[i]);
                    else
                        for (int64_t i = 0; i < steps; i++) _mm512_mask_storeu_ps(to + (p + i) * W + w, kept, r[i]);
                }
            }
        return;
    }
    // Several panels at once, so that what a step reads is long enough for the cache's lines.
    constexpr int64_t TOGETHER = 8 * 12 / W + (W > 12);
    for (int64_t w0 = 0; w0 < width; w0 += W * TOGETHER, to += W * TOGETHER * depth)
        for (int64_t p = 0; p < depth; p++) {
            for (int64_t w = w0; w < w0 + W * TOGETHER; w += 16) soon(from + (p + 8) * stride + w);
            for (int64_t panel = 0; panel < TOGETHER && w0 + panel * W < width; panel++)
                for (int64_t w = 0; w < W; w += 16) {
                    const int64_t there = least(W, width - w0 - panel * W) - w;
                    const __m512 some = _mm512_maskz_loadu_ps(first(there), from + p * stride + w0 + panel * W + w);
                    _mm512_mask_storeu_ps(to + panel * W * depth + p * W + w, first(W - w), some);
                }
        }
}

// As torch's threshold_backward: 0 only where `of` is at most 0, so that NaN passes.
inline __m512 passed(__m512 value, __m512 of) { return _mm512_maskz_mov_ps(__mmask16(~_mm512_cmp_ps_mask(of, _mm512_setzero_ps(), _CMP_LE_OQ)), value); }

// A tile of R rows and at most NR columns; `add` to what is there. `kept`: see Finish, from the tile's place on.
template <int R>
void tile(int64_t depth, const float* a, const float* b, float* out, int64_t stride, int64_t cols, bool add, const float* bias, bool relu,
          const float* kept, int64_t kept_stride, float* sums) {
    const __mmask16 left = first(cols), right = first(cols - 16);
    __m512 s[R][2];
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) {
        s[i][0] = s[i][1] = _mm512_setzero_ps();
        _mm_prefetch(reinterpret_cast<const char*>(out + i * stride), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(out + i * stride + 16), _MM_HINT_T0);
        if (kept != nullptr) soon(kept + i * kept_stride), soon(kept + i * kept_stride + 16);
    }
    for (int64_t p = 0; p < depth; p++, a += MR, b += NR) {
        const __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + 16);
#pragma GCC unroll 12
        for (int i = 0; i < R; i++) {
            const __m512 x = _mm512_set1_ps(a[i]);
            s[i][0] = _mm512_fmadd_ps(x, b0, s[i][0]);
            s[i][1] = _mm512_fmadd_ps(x, b1, s[i][1]);
        }
    }
    const __m512 zero = _mm512_setzero_ps();
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) {
        float* row = out + i * stride;
        if (add) {
            s[i][0] = _mm512_add_ps(s[i][0], _mm512_maskz_loadu_ps(left, row));
            s[i][1] = _mm512_add_ps(s[i][1], _mm512_maskz_loadu_ps(right, row + 16));
        }
        if (bias != nullptr) {
            s[i][0] = _mm512_add_ps(s[i][0], _mm512_maskz_loadu_ps(left, bias));
            s[i][1] = _mm512_add_ps(s[i][1], _mm512_maskz_loadu_ps(right, bias + 16));
        }
        if (relu) {  // in this order, so that NaN stays
            s[i][0] = _mm512_max_ps(zero, s[i][0]);
            s[i][1] = _mm512_max_ps(zero, s[i][1]);
        }
        if (kept != nullptr) {
            const float* of = kept + i * kept_stride;
            s[i][0] = passed(s[i][0], _mm512_maskz_loadu_ps(left, of));
            s[i][1] = passed(s[i][1], _mm512_maskz_loadu_ps(right, of + 16));
        }
        _mm512_mask_storeu_ps(row, left, s[i][0]);
        _mm512_mask_storeu_ps(row + 16, right, s[i][1]);
    }
    if (kept != nullptr) {
#pragma GCC unroll 12
        for (int i = 1; i < R; i++) {
            s[0][0] = _mm512_add_ps(s[0][0], s[i][0]);
            s[0][1] = _mm512_add_ps(s[0][1], s[i][1]);
        }
        _mm512_mask_storeu_ps(sums, left, _mm512_add_ps(s[0][0], _mm512_maskz_loadu_ps(left, sums)));
        _mm512_mask_storeu_ps(sums + 16, right, _mm512_add_ps(s[0][1], _mm512_maskz_loadu_ps(right, sums + 16)));
    }
}

typedef void (*Tile)(int64_t, const float*, const float*, float*, int64_t, int64_t, bool, const float*, bool, const float*, int64_t, float*);
const Tile TILES[MR + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

int64_t room(int64_t cols, int64_t depth) { return (rounded_up(cols, NR) + MC) * least(rounded_up(depth, 16), KC); }

void product(const Matrix& a, const Matrix& b, const Finish& finish, float* out, int64_t rows, int64_t cols, int64_t depth, float* room) {
    if (finish.kept != nullptr) memset(finish.sums, 0, size_t(cols) * sizeof(float));
    const int64_t parts = (depth + KC - 1) / KC, part = least(rounded_up((depth + parts - 1) / parts, 16), KC);
    float* const packed_b = room;
    float* const packed_a = room + rounded_up(cols, NR) * part;
    for (int64_t p = 0; p < depth; p += part) {
        const int64_t some = least(part, depth - p);
        const bool last = p + some == depth;
        pack<NR>(b.values + (b.turned ? p : p * b.stride), b.stride, b.turned, cols, some, packed_b);
        for (int64_t top = 0; top < rows; top += MC) {
            const int64_t high = least(MC, rows - top);
            pack<MR>(a.values + (a.turned ? p * a.stride + top : top * a.stride + p), a.stride, !a.turned, high, some, packed_a);
            for (int64_t j = 0; j < cols; j += NR)
                for (int64_t i = 0; i < high; i += MR)
                    TILES[least(MR, high - i)](some, packed_a + i * some, packed_b + j * some, out + (top + i) * cols + j, cols, cols - j, p > 0,
                                               last && finish.bias != nullptr ? finish.bias + j : nullptr, last && finish.relu,
                                               last && finish.kept != nullptr ? finish.kept + (top + i) * finish.kept_stride + j : nullptr,
                                               finish.kept_stride, finish.kept != nullptr ? finish.sums + j : nullptr);
        }
    }
}

// Sums of some rows at a time, so that a long column loses no more than torch's own sum does.
void masked(const float* grad, int64_t stride, const float* kept, float* out, float* sums, int64_t rows, int64_t cols) {
    constexpr int64_t ROWS = 64, COLS = 1024;
    const __m512 zero = _mm512_setzero_ps();
    memset(sums, 0, size_t(cols) * sizeof(float));
    alignas(64) float part[COLS];
    for (int64_t left = 0; left < cols; left += COLS)
        for (int64_t top = 0; top < rows; top += ROWS) {
            const int64_t width = least(COLS, cols - left);
            memset(part, 0, sizeof part);
            for (int64_t r = top; r < least(top + ROWS, rows); r++)
                for (int64_t c = 0; c < width; c += 16) {
                    const __mmask16 there = first(width - c);
                    const __m512 of = _mm512_maskz_loadu_ps(there, kept + r * cols + left + c);
                    // As torch's threshold_backward: 0 only where it is at most 0, so that NaN passes.
                    const __mmask16 passes = there & __mmask16(~_mm512_cmp_ps_mask(of, zero, _CMP_LE_OQ));
                    const __m512 some = _mm512_maskz_loadu_ps(passes, grad + r * stride + left + c);
                    _mm512_mask_storeu_ps(out + r * cols + left + c, there, some);
                    _mm512_store_ps(part + c, _mm512_add_ps(_mm512_load_ps(part + c), some));
                }
            for (int64_t c = 0; c < width; c++) sums[left + c] += part[c];
        }
}

}  // namespace

extern const twm::Kernels twm_kernels_avx512 = {product, room, masked};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
