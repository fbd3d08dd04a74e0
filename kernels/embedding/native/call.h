// One call taken apart, the memory it works in and the threads that share its tasks. Part of driver.cpp.
#pragma once
#include <stdlib.h>
#include <string.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "abi.h"

namespace {

using namespace tw;

const int64_t BAGS_PER_TASK = 128, KEYS_PER_TASK = 256;
const int64_t STREAM_FROM = 4 << 20;  // bytes of output that no cache near a core holds until they are read

enum Result { OK = 0, BAD_INPUT = 1, UNSUPPORTED = 2, NO_MEMORY = 3 };

// ---- memory kept between calls: fresh pages cost more than the sort that would use them ----

struct Workspace {
    char* data;
    size_t size;
    Workspace* next;
};
Workspace* idle = nullptr;
char idle_lock = 0;
const size_t KEEP_AT_MOST = size_t(256) << 20;

void lock_idle() { while (__atomic_test_and_set(&idle_lock, __ATOMIC_ACQUIRE)) {} }
void unlock_idle() { __atomic_clear(&idle_lock, __ATOMIC_RELEASE); }

Workspace* take_workspace(size_t size) {
    lock_idle();
    Workspace* w = idle;
    if (w) idle = w->next;
    unlock_idle();
    if (!w) w = static_cast<Workspace*>(calloc(1, sizeof(Workspace)));
    if (!w) return nullptr;
    if (w->size < size) {
        free(w->data);
        w->size = (size + 4095) & ~size_t(4095);
        w->data = static_cast<char*>(aligned_alloc(4096, w->size));
        if (!w->data) {
            free(w);
            return nullptr;
        }
    }
    return w;
}
void give_workspace(Workspace* w) {
    if (w->size > KEEP_AT_MOST) {
        free(w->data);
        w->data = nullptr;
        w->size = 0;
    }
    lock_idle();
    w->next = idle;
    idle = w;
    unlock_idle();
}

// Hands out aligned pieces; run once with data = null to learn the total.
struct Carver {
    char* data;
    size_t used;
    template <class T> T* take(int64_t count) {
        size_t at = used;
        used += (size_t(count) * sizeof(T) + 63) & ~size_t(63);
        return reinterpret_cast<T*>(data ? data + at : nullptr);
    }
};

// ---- a call, taken apart ----

struct Call {
    const SpecHead* spec;
    const TableInfo* tables;
    const LookupInfo* lookups;
    const ExtraInfo* extras;
    const CallHead* head;
    const TableArg* table_args;
    const LookupArg* lookup_args;
    const SlotArg* slot_args;
    const ExtraArg* extra_args;
    int64_t element, max_dim;

    Call(const int64_t* spec_words, const int64_t* call_words) {
        spec = reinterpret_cast<const SpecHead*>(spec_words);
        tables = reinterpret_cast<const TableInfo*>(spec + 1);
        lookups = reinterpret_cast<const LookupInfo*>(tables + spec->tables);
        extras = reinterpret_cast<const ExtraInfo*>(lookups + spec->lookups);
        head = reinterpret_cast<const CallHead*>(call_words);
        table_args = reinterpret_cast<const TableArg*>(head + 1);
        lookup_args = reinterpret_cast<const LookupArg*>(table_args + spec->tables);
        slot_args = reinterpret_cast<const SlotArg*>(lookup_args + spec->lookups);
        extra_args = reinterpret_cast<const ExtraArg*>(slot_args + spec->slots);
        element = head->dtype == F64 ? 8 : head->dtype == F32 || head->dtype == I8 ? 4 : 2;
        max_dim = 1;
        for (int64_t t = 0; t < spec->tables; ++t)
            if (tables[t].dim > max_dim) max_dim = tables[t].dim;
    }
    // Threads worth waking: waking one costs as much as moving some 64 KB of rows.
    int64_t threads() const {
        int64_t bytes = 0;
        for (int64_t l = 0; l < spec->lookups; ++l) bytes += lookup_args[l].id_count * tables[lookups[l].table].dim * element;
        const int64_t most = 1 + bytes / 65536;
        return head->threads < most ? head->threads : most;
    }
    int64_t scratch_bytes() const { return (SCRATCH_ROWS * max_dim * 8 + 63) & ~int64_t(63); }
};

// Something that the calling thread does before its first task, while others are at theirs.
struct Meanwhile {
    void (*run)(void*);  // null: nothing
    void* with;
    void operator()() const { if (run) run(with); }
};

// Runs body(task, thread) for every task, in parallel where `threads` > 1. Any nonzero return ends in that return.
template <class Body> int for_each_task(int64_t tasks, int64_t threads, Body body, Meanwhile first = Meanwhile()) {
    int result = OK;
    if (threads > tasks) threads = tasks;
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
        {
            if (omp_get_thread_num() == 0) first();
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t i = 0; i < tasks; ++i) {
                int r = body(i, omp_get_thread_num());
                if (r) __atomic_store_n(&result, r, __ATOMIC_RELAXED);
            }
        }
        return result;
    }
#endif
    first();
    for (int64_t i = 0; i < tasks && !result; ++i) result = body(i, 0);
    return result;
}

// ---- offsets ----

int64_t offset_at(const LookupArg& a, int64_t b) {
    return a.offset_bytes == 4 ? static_cast<const int32_t*>(a.offsets)[b] : static_cast<const int64_t*>(a.offsets)[b];
}
// First id of bag b, where b may be the number of bags.
int64_t bag_begin(const LookupInfo& l, const LookupArg& a, int64_t b) {
    if (!a.offsets) return b * a.length;
    if (b < a.bags || l.include_last) return offset_at(a, b);
    return a.bags ? a.id_count : 0;
}
// Whether the offsets of bags [first, last) start at 0, never decrease and end within the ids.
bool offsets_fit(const LookupInfo& l, const LookupArg& a, int64_t first, int64_t last) {
    if (!a.offsets) return true;
    int64_t previous = bag_begin(l, a, first);
    if (previous < 0 || (first == 0 && previous != 0)) return false;
    for (int64_t b = first; b < last; ++b) {
        int64_t next = bag_begin(l, a, b + 1);
        if (next < previous) return false;
        previous = next;
    }
    return previous <= a.id_count;
}

// Does bag b hold id b alone, for all of [first, last)? Then its offsets say nothing, as in a lookup without pooling.
template <class I> bool counts_up(const void* offsets, int64_t first, int64_t last) {
    I differ = 0;
    for (int64_t b = first; b < last; ++b) differ |= static_cast<const I*>(offsets)[b] ^ I(b);
    return differ == 0;
}
bool one_id_each(const LookupInfo& l, const LookupArg& a, int64_t first, int64_t last) {
    if (!a.offsets || bag_begin(l, a, first) != first || bag_begin(l, a, last) != last) return false;
    return a.offset_bytes == 4 ? counts_up<int32_t>(a.offsets, first, last) : counts_up<int64_t>(a.offsets, first, last);
}

}  // namespace
