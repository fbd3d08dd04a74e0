// bfloat16 matrix products with AVX512-BF16, summed in float32. Empty elsewhere.
//
// vdpbf16ps adds to each of 16 sums the products of two pairs of values, so panels hold pairs along the depth, 4 bytes each. Blocked as
// the float32 products are; a part of the depth is longer, for its panels of b need not stay in the first-level cache: 24 products
// take 12 cycles and need two lines of b. Values so small that bfloat16 holds them as subnormals count as 0, as in oneDNN.
#include "bf16.h"
#if defined(TWM_BF16)
#include <immintrin.h>  // before the target changes, so that nothing in it is compiled for AVX-512 by accident
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif

using namespace twm;

namespace {

constexpr int64_t MR = TILE_ROWS, NR = TILE_COLS;

#include "../../native/vectors.inc"


inline __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (__mmask32(1) << n) - 1; }
inline __m512 floats(__m512i x) { return _mm512_castsi512_ps(x); }

// 16 pairs that lie side by side, of which `there` values count.
inline __m512i along(const uint16_t* from, int64_t there) { return _mm512_maskz_loadu_epi16(first32(there), from); }
inline __m512i along(const float* from, int64_t there) {
    const __m512 left = _mm512_maskz_loadu_ps(first(there), from), right = _mm512_maskz_loadu_ps(first(there - 16), from + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(right, left);
}

// 16 pairs of which the second values lie `stride` behind the first; `two`: are there second ones?
inline __m512i pairs(const uint16_t* from, int64_t stride, __mmask16 there, bool two) {
    const __m512i left = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
    const __m512i right = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(two ? there : 0, from + (two ? stride : 0)));
    return _mm512_or_si512(left, _mm512_slli_epi32(right, 16));
}
inline __m512i pairs(const float* from, int64_t stride, __mmask16 there, bool two) {
    const __m512 left = _mm512_maskz_loadu_ps(there, from), right = _mm512_maskz_loadu_ps(two ? there : 0, from + (two ? stride : 0));
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(left)), high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(right));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// `width` values at each of `depth` steps into panels of W pairs a pair of steps: value w of step p is from[p * stride + w], or, if
// `across`, from[w * stride + p]. Zeros beyond the width and the depth.
template <int64_t W, class T> void pack(const T* from, int64_t stride, bool across, int64_t width, int64_t depth, uint32_t* to) {
    const int64_t steps = (depth + 1) / 2;
    if (across) {
        for (int64_t w0 = 0; w0 < width; w0 += W, to += W * steps)
            for (int64_t p = 0; p < steps; p += 16) {
                const int64_t some = least(16, steps - p);
                for (int64_t w = 0; w < W; w += 16) {
                    const int64_t there = least(W, width - w0) - w;
                    const T* start = from + (w0 + w) * stride + 2 * p;
                    __m512 r[16];
                    for (int i = 0; i < 16; i++) r[i] = i < there ? floats(along(start + i * stride, depth - 2 * p)) : _mm512_setzero_ps();
                    transpose(r);
                    const __mmask16 kept = first(W - w);
                    if (some == 16)
                        for (int i = 0; i < 16; i++) _mm512_mask_storeu_ps(to + (p + i) * W + w, kept, r[i]);
                    else
                        for (int64_t i = 0; i < some; i++) _mm512_mask_storeu_ps(to + (p + i) * W + w, kept, r[i]);
                }
            }
        return;
    }
    constexpr int64_t TOGETHER = W > 12 ? 1 : 8;  // panels at once, so that what a step reads is long enough for the cache's lines
    for (int64_t w0 = 0; w0 < width; w0 += W * TOGETHER, to += W * TOGETHER * steps)
        for (int64_t p = 0; p < steps; p++) {
            // Rows that lie far apart are no stream that the processor would fetch ahead by itself.
            const char* const ahead = reinterpret_cast<const char*>(from + (2 * p + 16) * stride + w0);
            for (int64_t at = 0; at < W * TOGETHER * int64_t(sizeof(T)); at += 64) {
                _mm_prefetch(ahead + at, _MM_HINT_T0);
                _mm_prefetch(ahead + at + stride * int64_t(sizeof(T)), _MM_HINT_T0);
            }
            for (int64_t panel = 0; panel < TOGETHER && w0 + panel * W < width; panel++)
                for (int64_t w = 0; w < W; w += 16) {
                    const int64_t there = least(W, width - w0 - panel * W) - w;
                    const __m512i some = pairs(from + 2 * p * stride + w0 + panel * W + w, stride, first(there), 2 * p + 1 < depth);
                    _mm512_mask_storeu_epi32(to + panel * W * steps + p * W + w, first(W - w), some);
                }
        }
}

template <int64_t W> void pack(const Operand& m, bool across, int64_t w, int64_t p, int64_t width, int64_t depth, uint32_t* to) {
    const int64_t at = across ? w * m.stride + p : p * m.stride + w;
    if (m.wide)
        pack<W>(static_cast<const float*>(m.values) + at, m.stride, across, width, depth, to);
    else
        pack<W>(static_cast<const uint16_t*>(m.values) + at, m.stride, across, width, depth, to);
}

// A tile of R rows and at most NR columns, from `row` and `col` of out on: what this part of the depth adds.
template <int R, bool WIDE> void tile(const Product& p, const uint32_t* a, const uint32_t* b, int64_t steps, int64_t row, int64_t col, bool add, bool last) {
    const __mmask16 left = first(p.cols - col), right = first(p.cols - col - 16);
    constexpr int64_t SIZE = WIDE ? 4 : 2;
    const int64_t stride = p.cols * SIZE;
    char* const start = static_cast<char*>(p.out) + row * stride + col * SIZE;
    __m512 s[R][2];
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) {
        s[i][0] = s[i][1] = _mm512_setzero_ps();
        _mm_prefetch(start + i * stride, _MM_HINT_T0);
        if (WIDE) _mm_prefetch(start + i * stride + 64, _MM_HINT_T0);
    }
    for (int64_t k = 0; k < steps; k++, a += MR, b += NR) {
        const __m512bh b0 = (__m512bh)_mm512_load_si512(b), b1 = (__m512bh)_mm512_load_si512(b + 16);
#pragma GCC unroll 12
        for (int i = 0; i < R; i++) {
            const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[i]));
            s[i][0] = _mm512_dpbf16_ps(s[i][0], x, b0);
            s[i][1] = _mm512_dpbf16_ps(s[i][1], x, b1);
        }
    }
    const __m512 zero = _mm512_setzero_ps(), least_kept = _mm512_set1_ps(1.17549435e-38f);  // what is below is 0 in bfloat16
    if (last && p.bias != nullptr) {
        const __m512 bias0 = _mm512_maskz_loadu_ps(left, p.bias + col), bias1 = _mm512_maskz_loadu_ps(right, p.bias + col + 16);
#pragma GCC unroll 12
        for (int i = 0; i < R; i++) {
            s[i][0] = _mm512_add_ps(s[i][0], bias0);
            s[i][1] = _mm512_add_ps(s[i][1], bias1);
        }
    }
    __m512 sum0 = zero, sum1 = zero;
    const bool writes = !WIDE && p.bits != nullptr && p.sums == nullptr, reads = !WIDE && p.sums != nullptr;
    const __m512 scale = _mm512_set1_ps(p.scale);
#pragma GCC unroll 12
    for (int i = 0; i < R; i++) {
        char* const at = start + i * stride;
        if (add) {
            s[i][0] = _mm512_add_ps(s[i][0], _mm512_maskz_loadu_ps(left, at));
            s[i][1] = _mm512_add_ps(s[i][1], _mm512_maskz_loadu_ps(right, at + 64));
        }
        if (last && p.relu) {  // in this order, so that NaN stays
            s[i][0] = _mm512_max_ps(zero, s[i][0]);
            s[i][1] = _mm512_max_ps(zero, s[i][1]);
        }
        if (writes) {  // not less, so that NaN passes
            const __mmask16 low = left & _mm512_cmp_ps_mask(s[i][0], least_kept, _CMP_NLT_UQ), high = right & _mm512_cmp_ps_mask(s[i][1], least_kept, _CMP_NLT_UQ);
            p.bits[(row + i) * ((p.cols + 31) / 32) + col / 32] = uint32_t(low) | uint32_t(high) << 16;
        }
        if (reads) {
            const uint32_t word = p.bits[(row + i) * ((p.cols + 31) / 32) + col / 32];
            s[i][0] = _mm512_maskz_mul_ps(__mmask16(word), s[i][0], scale);
            s[i][1] = _mm512_maskz_mul_ps(__mmask16(word >> 16), s[i][1], scale);
            sum0 = _mm512_add_ps(sum0, s[i][0]);
            sum1 = _mm512_add_ps(sum1, s[i][1]);
        }
        if (WIDE) {
            _mm512_mask_storeu_ps(at, left, s[i][0]);
            _mm512_mask_storeu_ps(at + 64, right, s[i][1]);
        } else {
            _mm512_mask_storeu_epi16(at, first32(p.cols - col), (__m512i)_mm512_cvtne2ps_pbh(s[i][1], s[i][0]));
        }
    }
    if (reads) {
        float* const to = p.sums + row / p.block * p.cols + col;
        const bool more = row % p.block != 0;
        _mm512_mask_storeu_ps(to, left, _mm512_add_ps(sum0, _mm512_maskz_loadu_ps(more ? left : 0, to)));
        _mm512_mask_storeu_ps(to + 16, right, _mm512_add_ps(sum1, _mm512_maskz_loadu_ps(more ? right : 0, to + 16)));
    }
}

typedef void (*Tile)(const Product&, const uint32_t*, const uint32_t*, int64_t, int64_t, int64_t, bool, bool);
#define EACH(wide)                                                                                                                      \
    {nullptr, tile<1, wide>, tile<2, wide>, tile<3, wide>, tile<4, wide>, tile<5, wide>, tile<6, wide>, tile<7, wide>, tile<8, wide>,    \
     tile<9, wide>, tile<10, wide>, tile<11, wide>, tile<12, wide>}
const Tile TILES[2][MR + 1] = {EACH(false), EACH(true)};

void pack_b(const Product& p, int64_t from, int64_t col, uint32_t* to) {
    pack<NR>(p.b, p.b.turned, col, from, least(NR, p.cols - col), least(p.part, p.depth - from), to);
}

void rows(const Product& p, int64_t from, int64_t top, const uint32_t* b, uint32_t* room) {
    const int64_t some = least(p.part, p.depth - from), steps = (some + 1) / 2, high = least(p.block, p.rows - top);
    pack<MR>(p.a, !p.a.turned, top, from, high, some, room);
    for (int64_t j = 0; j < p.cols; j += NR)
        for (int64_t i = 0; i < high; i += MR)
            TILES[p.wide][least(MR, high - i)](p, room + i * steps, b + j * steps, steps, top + i, j, from > 0, from + some == p.depth);
}

}  // namespace

extern const Bf16Kernels twm_kernels_bf16 = {pack_b, rows};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
