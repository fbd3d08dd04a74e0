// The C functions that cache.py calls.
#include "cache.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string said;

template <class Work>
int64_t guarded(Work work) {
    try {
        return work();
    } catch (const twt::Failure& failure) {
        said = failure.what;
    } catch (const std::exception& error) {
        said = error.what();
    }
    return -1;
}

twt::Cache& at(void* cache) { return *static_cast<twt::Cache*>(cache); }

std::vector<twt::Part> parts_of(int64_t count, const int64_t* bytes, const int64_t* start, const double* a, const double* b) {
    std::vector<twt::Part> parts;
    for (int64_t i = 0; i < count; i++) parts.push_back({bytes[i], start[i], a[i], b[i]});
    return parts;
}

int64_t row_bytes(const std::vector<twt::Part>& parts) {
    int64_t bytes = 0;
    for (const twt::Part& part : parts) bytes += part.bytes;
    return bytes;
}

}  // namespace

API int64_t twt_abi() { return 3; }
API const char* twt_error() { return said.c_str(); }

API void* twt_open(const char* folder, int64_t rows, int64_t count, const int64_t* bytes, const int64_t* start, const double* a, const double* b,
                   uint64_t seed, int64_t slots, int64_t lfu, int64_t create, int64_t wanted) {
    void* made = nullptr;
    guarded([&] {
        std::vector<twt::Part> parts = parts_of(count, bytes, start, a, b);
        std::unique_ptr<twt::Store> store(new twt::Store(folder, rows, parts, seed, create != 0, wanted, slots * row_bytes(parts) * 3 / 5));
        made = new twt::Cache(std::move(store), parts, seed, slots, lfu != 0);
        return 0;
    });
    return made;
}
API void* twt_open_memory(char* memory, unsigned char* bits, int64_t rows, int64_t count, const int64_t* bytes, const int64_t* start, const double* a, const double* b,
                          uint64_t seed, int64_t slots, int64_t lfu) {
    void* made = nullptr;
    guarded([&] {
        std::vector<twt::Part> parts = parts_of(count, bytes, start, a, b);
        std::unique_ptr<twt::Memory> store(new twt::Memory(memory, bits, rows, parts));
        made = new twt::Cache(std::move(store), parts, seed, slots, lfu != 0);
        return 0;
    });
    return made;
}
API void twt_close(void* cache) { delete static_cast<twt::Cache*>(cache); }
API int64_t twt_fetch(void* cache, const int64_t* ids, int64_t n, int64_t* slots, char* const* arrays, int64_t train, twt::Move move,
                         int64_t later) {
    return guarded([&] { return at(cache).fetch(ids, n, slots, arrays, train != 0, move, later != 0); });
}
API int64_t twt_ready(void* cache, int64_t ticket) { return at(cache).ready(ticket); }
API int64_t twt_complete(void* cache, int64_t ticket, char* const* arrays) {
    return guarded([&] { return at(cache).complete(ticket, arrays), int64_t(0); });
}
API int64_t twt_release(void* cache, int64_t ticket) {
    return guarded([&] { return at(cache).release(ticket), int64_t(0); });
}
API int64_t twt_prepare(void* cache, char* const* arrays, twt::Move move) {
    return guarded([&] { return at(cache).prepare(arrays, move), int64_t(0); });
}
API int64_t twt_finish(void* cache) {
    return guarded([&] { return at(cache).finish(), int64_t(0); });
}
API int64_t twt_places(void* cache, const int64_t* ids, int64_t n, int64_t* slots, int64_t change) {
    return guarded([&] { return at(cache).find_all(ids, n, slots, change != 0), int64_t(0); });
}
API int64_t twt_forget(void* cache) {
    return guarded([&] { return at(cache).forget(), int64_t(0); });
}
API int64_t twt_peek(void* cache, const int64_t* ids, int64_t n, int64_t part, char* out, char* const* arrays) {
    return guarded([&] { return at(cache).peek(ids, n, part, out, arrays), int64_t(0); });
}
API int64_t twt_poke(void* cache, const int64_t* ids, int64_t n, int64_t part, const char* from, char* const* arrays) {
    return guarded([&] { return at(cache).poke(ids, n, part, from, arrays), int64_t(0); });
}
API void twt_counters(void* cache, int64_t* out) { at(cache).counters(out); }
API void twt_start(int64_t bytes, int64_t start, double a, double b, int64_t number, uint64_t seed, const int64_t* rows, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) twt::start_row({bytes, start, a, b}, number, seed, rows[i], out + i * (bytes / 4));
}
