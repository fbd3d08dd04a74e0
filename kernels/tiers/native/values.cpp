// Checksums, the values that rows start from, and huge pages.
#include <string.h>
#include <sys/mman.h>

#include "store.h"

namespace twt {

const uintptr_t HUGE = 2 << 20;

namespace {

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc_by_instruction(uint32_t c, const unsigned char* p, size_t bytes) {
    uint64_t wide = c;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    c = uint32_t(wide);
    for (; bytes > 0; bytes--, p++) c = __builtin_ia32_crc32qi(c, *p);
    return c;
}
#endif

uint32_t crc_by_table(uint32_t c, const unsigned char* p, size_t bytes) {
    static const std::vector<uint32_t> table = [] {
        std::vector<uint32_t> made(256);
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t r = i;
            for (int k = 0; k < 8; k++) r = r & 1 ? 0x82f63b78u ^ (r >> 1) : r >> 1;
            made[i] = r;
        }
        return made;
    }();
    for (size_t i = 0; i < bytes; i++) c = table[(c ^ p[i]) & 255] ^ (c >> 8);
    return c;
}

}  // namespace

uint32_t checksum(const void* data, size_t bytes, uint32_t from) {  // CRC-32C (Castagnoli)
    const unsigned char* p = static_cast<const unsigned char*>(data);
#if defined(__x86_64__)
    static const bool instruction = (__builtin_cpu_init(), __builtin_cpu_supports("sse4.2"));
    if (instruction) return ~crc_by_instruction(~from, p, bytes);
#endif
    return ~crc_by_table(~from, p, bytes);
}

namespace {

// The sum of twelve 16-bit numbers, whose deviation is that of twelve uniforms: exact in integers, so the same bits everywhere, and within
// 6 deviations (Irwin-Hall).
inline __attribute__((always_inline)) void normal_row(const Part& part, uint64_t base, float* out) {
    int64_t count = part.bytes / 4;
    double mean = part.a, deviation = part.b;
    for (int64_t i = 0; i < count; i++) {
        int64_t sum = 0;
        for (uint64_t k = 0; k < 3; k++) {
            uint64_t word = mix(base + (uint64_t(i) * 3 + k) * 0x9e3779b97f4a7c15ull);
            sum += int64_t(word & 65535) + int64_t((word >> 16) & 65535) + int64_t((word >> 32) & 65535) + int64_t(word >> 48);
        }
        double z = double(2 * sum - 12 * 65535) / 131072.0;
        double scaled = deviation * z;
        out[i] = float(mean + scaled);
    }
}

void normal_row_anywhere(const Part& part, uint64_t base, float* out) { normal_row(part, base, out); }
#if defined(__x86_64__)
__attribute__((target("avx512f,avx512dq,avx512vl"))) void normal_row_avx512(const Part& part, uint64_t base, float* out) { normal_row(part, base, out); }
#endif

auto normal_row_here() -> void (*)(const Part&, uint64_t, float*) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return normal_row_avx512;
#endif
    return normal_row_anywhere;
}

}  // namespace

// UNIFORM: 24 bits.
void start_row(const Part& part, int64_t number, uint64_t seed, int64_t row, float* out) {
    static const auto normal = normal_row_here();
    int64_t count = part.bytes / 4;
    uint64_t base = mix(mix(mix(seed + 0x9e3779b97f4a7c15ull) ^ uint64_t(number)) ^ uint64_t(row));
    if (part.start == NORMAL) return normal(part, base, out);
    for (int64_t i = 0; i < count; i++) {
        if (part.start == CONSTANT) {
            out[i] = float(part.a);
        } else {
            double u = double(mix(base + uint64_t(i) * 0x9e3779b97f4a7c15ull) >> 40) / 16777216.0;
            double span = (part.b - part.a) * u;
            out[i] = float(part.a + span);
        }
    }
}

void huge_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    uintptr_t from = (reinterpret_cast<uintptr_t>(memory) + HUGE - 1) / HUGE * HUGE, to = (reinterpret_cast<uintptr_t>(memory) + bytes) / HUGE * HUGE;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

}  // namespace twt
