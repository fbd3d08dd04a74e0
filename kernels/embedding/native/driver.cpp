// The C functions that cpu.py calls: cuts a call into tasks, spreads them over threads, and picks the instruction set.
//
// Backward in two parallel phases. First, per table, the (row, source) keys of all its lookups are collected and radix-sorted
// (stable, so equal rows keep the order of lookups and positions). Then runs of equal rows are cut into chunks of similar size,
// each summed and applied by one thread. A run is never split, so the result does not depend on the number of threads.
//
// No ids are trusted: forward and sorting return BAD_INPUT before anything of the user's is written, and cpu.py then asks
// reference.check_inputs for the words.
#include <stdlib.h>
#include <string.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "abi.h"
#include "radix_sort.h"

using namespace tw;

namespace {

enum Result { OK = 0, BAD_INPUT = 1, UNSUPPORTED = 2, NO_MEMORY = 3 };

const int64_t BAGS_PER_TASK = 128, KEYS_PER_TASK = 256;

// ---- instruction sets ----

int supported_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 1;
#endif
    return 0;
}
const Kernels* kernels_of(int level) {
#if defined(__x86_64__)
    if (level == 2) return &tw_kernels_avx512;
    if (level == 1) return &tw_kernels_avx2;
#endif
    (void)level;
    return &tw_kernels_baseline;
}
int active_level = supported_level();
const Kernels* active = kernels_of(active_level);

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
        element = head->dtype == F64 ? 8 : head->dtype == F32 ? 4 : 2;
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

// Runs body(task, thread) for every task, in parallel where `threads` > 1. Any nonzero return ends in that return.
template <class Body> int for_each_task(int64_t tasks, int64_t threads, Body body);

#if defined(_OPENMP)
template <class Body> int for_each_task(int64_t tasks, int64_t threads, Body body) {
    int result = OK;
    if (threads > tasks) threads = tasks;
    if (threads > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(threads))
        for (int64_t i = 0; i < tasks; ++i) {
            int r = body(i, omp_get_thread_num());
            if (r) __atomic_store_n(&result, r, __ATOMIC_RELAXED);
        }
        return result;
    }
    for (int64_t i = 0; i < tasks && !result; ++i) result = body(i, 0);
    return result;
}
#else
template <class Body> int for_each_task(int64_t tasks, int64_t, Body body) {
    int result = OK;
    for (int64_t i = 0; i < tasks && !result; ++i) result = body(i, 0);
    return result;
}
#endif

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

// ---- collecting and sorting the keys of one table ----

struct TableRuns {
    Runs runs;
    uint64_t* keys;
    uint32_t* starts;
    const char** source;
    double* scale;  // null: every gradient counts once
    int64_t ids, sources, count;  // ids is 0 for a table that nobody wants
};

int bits_for(uint64_t values) {  // bits to tell `values` things apart
    int bits = 0;
    while (bits < 63 && (uint64_t(1) << bits) < values) ++bits;
    return bits;
}

// A half precision number (10 fraction bits, or 7 for bfloat16) as a double.
double half_value(uint16_t bits, bool brain) {
    const int fraction_bits = brain ? 7 : 10, bias = brain ? 127 : 15;
    const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == 2 * bias + 1) return fraction ? __builtin_nan("") : sign * __builtin_inf();
    const int power = (exponent ? exponent : 1) - bias - fraction_bits;
    return sign * __builtin_ldexp(double(exponent ? fraction | (1 << fraction_bits) : fraction), power);
}

// One sample weight as a double.
double weight_at(const void* weights, int64_t dtype, int64_t p) {
    if (dtype == F64) return static_cast<const double*>(weights)[p];
    if (dtype == F32) return static_cast<const float*>(weights)[p];
    return half_value(static_cast<const uint16_t*>(weights)[p], dtype == BF16);
}

// Appends the keys of one lookup; false where an id is out of range.
template <class I>
bool collect(const LookupInfo& l, const LookupArg& a, int64_t rows, const char* grad, int64_t grad_stride, int shift, int64_t dtype,
             uint64_t*& keys, const char**& source, double* scale, uint64_t& next_source) {
    const I* ids = static_cast<const I*>(a.ids);
    const int64_t padding = l.padding, wrap = l.wrap;
    uint64_t* key = keys;
    bool bad = false;
    for (int64_t b = 0; b < a.bags; ++b, grad += grad_stride) {
        int64_t begin = bag_begin(l, a, b), end = l.pooling == POOL_NONE ? begin + 1 : bag_begin(l, a, b + 1);
        const uint64_t* first_key = key;
        for (int64_t p = begin; p < end; ++p) {
            int64_t row = ids[p];
            row += (row >> 63) & wrap;
            bad |= uint64_t(row) >= uint64_t(rows);
            if (row == padding && padding >= 0) continue;
            *key++ = (uint64_t(row) << shift) | next_source;
            if (a.weights) {  // every id is a source of its own
                *source++ = grad;
                scale[next_source++] = weight_at(a.weights, dtype, p);
            }
        }
        if (a.weights) continue;
        *source++ = grad;
        if (scale) scale[next_source] = l.pooling == POOL_MEAN && key > first_key ? 1.0 / double(key - first_key) : 1.0;
        ++next_source;
    }
    keys = key;
    return !bad;
}

int sort_table(const Call& c, int64_t t, bool wanted, TableRuns& r, uint64_t* spare) {
    if (!wanted) {
        r.starts[0] = 0;
        return OK;
    }
    const int shift = bits_for(uint64_t(r.sources)), row_bits = bits_for(uint64_t(c.tables[t].rows));
    if (shift + row_bits > 63 || r.ids >= int64_t(UINT32_MAX)) return UNSUPPORTED;
    const RadixPlan plan = plan_radix(r.ids, row_bits);
    uint64_t* begin = plan.passes % 2 ? spare : r.keys;  // so that the last pass ends in r.keys
    uint64_t* end = begin;
    const char** source = r.source;
    uint64_t next_source = 0;
    for (int64_t l = c.tables[t].first_lookup; l >= 0; l = c.lookups[l].next) {
        const LookupInfo& info = c.lookups[l];
        const LookupArg& a = c.lookup_args[l];
        const SlotArg& slot = c.slot_args[info.slot];
        if (!slot.data) continue;
        if (!offsets_fit(info, a, 0, a.bags)) return BAD_INPUT;
        const char* grad = slot.data + info.column * c.element;
        const int64_t stride = slot.stride * c.element;
        bool good = a.id_bytes == 4
                        ? collect<int32_t>(info, a, c.tables[t].rows, grad, stride, shift, c.head->dtype, end, source, r.scale, next_source)
                        : collect<int64_t>(info, a, c.tables[t].rows, grad, stride, shift, c.head->dtype, end, source, r.scale, next_source);
        if (!good) return BAD_INPUT;
    }
    const int64_t n = end - begin;
    radix_sort(begin, begin == spare ? r.keys : spare, n, shift, plan);
    r.count = 0;
    for (int64_t p = 0; p < n; ++p)
        if (p == 0 || (r.keys[p] >> shift) != (r.keys[p - 1] >> shift)) r.starts[r.count++] = uint32_t(p);
    r.starts[r.count] = uint32_t(n);
    r.runs = Runs{r.keys, r.starts, r.source, r.scale, r.count, shift};
    return OK;
}

// All keys of a call, sorted: what both gradients and updates start from. Lives in one workspace.
struct Sorted {
    Workspace* workspace;
    TableRuns* tables;
    int64_t* task_end;  // [tables] running total of second-phase tasks
    char* scratch;
    int64_t scratch_bytes, tasks, threads;
};

void lay_out(const Call& c, const int64_t* wanted, Carver& carver, Sorted& s, uint64_t*& spare, int64_t& spare_size) {
    const int64_t T = c.spec->tables, threads = s.threads = c.threads();
    s.tables = carver.take<TableRuns>(T);
    s.task_end = carver.take<int64_t>(T);
    spare_size = 1;
    for (int64_t t = 0; t < T; ++t) {
        TableRuns r;
        memset(&r, 0, sizeof r);
        bool scaled = false;
        for (int64_t l = wanted[t] ? c.tables[t].first_lookup : -1; l >= 0; l = c.lookups[l].next) {
            if (!c.slot_args[c.lookups[l].slot].data) continue;
            const LookupArg& a = c.lookup_args[l];
            r.ids += a.id_count;
            r.sources += a.weights ? a.id_count : a.bags;
            scaled |= a.weights || c.lookups[l].pooling == POOL_MEAN;
        }
        if (r.ids > spare_size) spare_size = r.ids;
        r.keys = carver.take<uint64_t>(r.ids);
        r.starts = carver.take<uint32_t>(r.ids + 1);
        r.source = carver.take<const char*>(r.sources);
        r.scale = scaled ? carver.take<double>(r.sources) : nullptr;
        if (s.workspace) s.tables[t] = r;
    }
    spare = carver.take<uint64_t>(spare_size * threads);
    s.scratch_bytes = c.scratch_bytes();
    s.scratch = carver.take<char>(s.scratch_bytes * threads);
}

int sort_all(const Call& c, const int64_t* wanted, Sorted& s) {
    memset(&s, 0, sizeof s);
    uint64_t* spare;
    int64_t spare_size;
    Carver carver = {nullptr, 0};
    lay_out(c, wanted, carver, s, spare, spare_size);
    s.workspace = take_workspace(carver.used);
    if (!s.workspace) return NO_MEMORY;
    carver = Carver{s.workspace->data, 0};
    lay_out(c, wanted, carver, s, spare, spare_size);
    int result = for_each_task(c.spec->tables, s.threads,
                               [&](int64_t t, int thread) { return sort_table(c, t, wanted[t] != 0, s.tables[t], spare + thread * spare_size); });
    if (result) {
        give_workspace(s.workspace);
        return result;
    }
    for (int64_t t = 0; t < c.spec->tables; ++t) {
        const int64_t keys = s.tables[t].starts[s.tables[t].count];
        s.tasks += (keys + KEYS_PER_TASK - 1) / KEYS_PER_TASK;
        s.task_end[t] = s.tasks;
    }
    return OK;
}

// The first place in an ascending array that is not less than `value`.
template <class T> int64_t place_of(const T* values, int64_t count, int64_t value) {
    int64_t low = 0, high = count;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (int64_t(values[middle]) < value) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Runs the second phase. `write` fills in what a job writes to, given its table.
template <class Write> void apply_all(const Call& c, const Sorted& s, Write write) {
    const Kernels* kernels = active;
    for_each_task(s.tasks, s.threads, [&](int64_t task, int thread) {
        const int64_t t = place_of(s.task_end, c.spec->tables, task + 1);
        const TableRuns& r = s.tables[t];
        const int64_t part = task - (t ? s.task_end[t - 1] : 0);
        RowsJob job;
        memset(&job, 0, sizeof job);
        job.runs = r.runs;
        job.first = place_of(r.starts, r.count, part * KEYS_PER_TASK);  // the runs that start in this part of the keys
        job.last = place_of(r.starts, r.count, (part + 1) * KEYS_PER_TASK);
        job.dim = c.tables[t].dim;
        job.scratch = s.scratch + thread * s.scratch_bytes;
        write(job, t);
        if (job.first < job.last) kernels->rows[c.head->dtype](&job);
        return int(OK);
    });
}

void copy_extra(const Call& c, int64_t e, int64_t first, int64_t last) {
    const ExtraArg& a = c.extra_args[e];
    const SlotArg& slot = c.slot_args[c.extras[e].slot];
    for (int64_t i = first; i < last && i < a.rows; ++i)
        memcpy(slot.data + (i * slot.stride + c.extras[e].column) * c.element, a.data + i * a.stride * c.element, size_t(c.extras[e].width * c.element));
}

}  // namespace

#define TW_API extern "C" __attribute__((visibility("default")))

// The version of this interface; cpu.py refuses a library built from other sources.
TW_API int64_t tw_abi() { return 2; }

// 0 baseline, 1 AVX2, 2 AVX-512. A level below 0 or above what the CPU has only asks.
TW_API int64_t tw_level(int64_t level) {
    if (level >= 0 && level <= supported_level()) {
        active_level = int(level);
        active = kernels_of(active_level);
    }
    return active_level;
}

// All lookups and extras of a call, into its slots.
TW_API int64_t tw_forward(const int64_t* spec, const int64_t* call) {
    const Call c(spec, call);
    const Kernels* kernels = active;
    const int64_t lookups = c.spec->lookups, parts = lookups + c.spec->extras;
    int64_t most = 0;  // bags
    for (int64_t l = 0; l < lookups; ++l)
        if (c.lookup_args[l].bags > most) most = c.lookup_args[l].bags;
    for (int64_t e = 0; e < c.spec->extras; ++e)
        if (c.extra_args[e].rows > most) most = c.extra_args[e].rows;
    const int64_t threads = c.threads();
    Workspace* w = take_workspace(size_t(c.scratch_bytes() * threads));
    if (!w) return NO_MEMORY;
    // Lookups outermost: the pages of one table at a time fit the TLB and its page table the L2 cache; those of all do not.
    const int64_t blocks = (most + BAGS_PER_TASK - 1) / BAGS_PER_TASK;
    int result = for_each_task(blocks * parts, threads, [&](int64_t task, int thread) {
        const int64_t l = task / blocks, first = task % blocks * BAGS_PER_TASK;
        if (l >= lookups) {
            copy_extra(c, l - lookups, first, first + BAGS_PER_TASK);
            return int(OK);
        }
        const LookupInfo& info = c.lookups[l];
        const LookupArg& a = c.lookup_args[l];
        if (first >= a.bags) return int(OK);
        const int64_t last = first + BAGS_PER_TASK < a.bags ? first + BAGS_PER_TASK : a.bags;
        if (!offsets_fit(info, a, first, last)) return int(BAD_INPUT);
        const SlotArg& slot = c.slot_args[info.slot];
        const ForwardJob job = {&c.tables[info.table], &info, &a, c.table_args[info.table], slot.data + info.column * c.element,
                                slot.stride, first, last, w->data + thread * c.scratch_bytes()};
        return kernels->forward[c.head->dtype](&job);
    });
    give_workspace(w);
    return result;
}

// Sorts the ids of the wanted tables and counts distinct rows. *handle goes to tw_gradients_fill or tw_gradients_drop.
TW_API int64_t tw_gradients_begin(const int64_t* spec, const int64_t* call, const int64_t* wanted, int64_t* counts, void** handle) {
    const Call c(spec, call);
    Sorted* s = static_cast<Sorted*>(malloc(sizeof(Sorted)));
    if (!s) return NO_MEMORY;
    int result = sort_all(c, wanted, *s);
    if (result) {
        free(s);
        return result;
    }
    for (int64_t t = 0; t < c.spec->tables; ++t) counts[t] = s->tables[t].count;
    *handle = s;
    return OK;
}

TW_API void tw_gradients_drop(void* handle) {
    Sorted* s = static_cast<Sorted*>(handle);
    give_workspace(s->workspace);
    free(s);
}

// Writes row numbers (where rows[t] is not null) and summed gradients: run u at values[t] + u * dim, or with by_row, row r at
// r * dim. Frees the handle.
TW_API int64_t tw_gradients_fill(const int64_t* spec, const int64_t* call, void* handle, int64_t* const* rows, char* const* values,
                                 int64_t by_row) {
    const Call c(spec, call);
    const Sorted& s = *static_cast<Sorted*>(handle);
    for (int64_t t = 0; t < c.spec->tables; ++t) {
        const TableRuns& r = s.tables[t];
        for (int64_t u = 0; rows[t] && u < r.count; ++u) rows[t][u] = int64_t(r.keys[r.starts[u]] >> r.runs.shift);
    }
    apply_all(c, s, [&](RowsJob& job, int64_t t) {
        job.weights = TableArg{values[t], c.tables[t].dim};
        job.by_row = by_row;
    });
    tw_gradients_drop(handle);
    return OK;
}

TW_API int64_t tw_update(const int64_t* spec, const int64_t* call, const int64_t* wanted, const UpdateArg* updates) {
    const Call c(spec, call);
    Sorted s;
    int result = sort_all(c, wanted, s);
    if (result) return result;
    apply_all(c, s, [&](RowsJob& job, int64_t t) {
        job.weights = c.table_args[t];
        job.update = &updates[t];
    });
    give_workspace(s.workspace);
    return OK;
}

// Updates from summed gradients. BAD_INPUT unless every table's row numbers ascend strictly and lie in the table.
TW_API int64_t tw_update_from_sparse(int64_t dtype, int64_t threads, int64_t tables, const SparseArg* args, const UpdateArg* updates) {
    const Kernels* kernels = active;
    int64_t max_dim = 1, tasks = 0;
    for (int64_t t = 0; t < tables; ++t) {
        const SparseArg& a = args[t];
        for (int64_t u = 0; u < a.count; ++u)
            if (uint64_t(a.rows[u]) >= uint64_t(a.table_rows) || (u && a.rows[u] <= a.rows[u - 1])) return BAD_INPUT;
        if (a.dim > max_dim) max_dim = a.dim;
    }
    int64_t bytes = 0;
    for (int64_t t = 0; t < tables; ++t) bytes += args[t].count * args[t].dim * 4;
    if (threads > 1 + bytes / 65536) threads = 1 + bytes / 65536;
    const int64_t scratch = (SCRATCH_ROWS * max_dim * 8 + 63) & ~int64_t(63);
    Workspace* w = take_workspace(size_t(scratch * threads) + size_t(tables) * sizeof(int64_t));
    if (!w) return NO_MEMORY;
    int64_t* task_end = reinterpret_cast<int64_t*>(w->data + scratch * threads);
    for (int64_t t = 0; t < tables; ++t) task_end[t] = tasks += (args[t].count + KEYS_PER_TASK - 1) / KEYS_PER_TASK;
    for_each_task(tasks, threads, [&](int64_t task, int thread) {
        const int64_t t = place_of(task_end, tables, task + 1);
        const int64_t first = (task - (t ? task_end[t - 1] : 0)) * KEYS_PER_TASK, end = first + KEYS_PER_TASK;
        const SparseJob job = {&args[t], &updates[t], first, end < args[t].count ? end : args[t].count, w->data + thread * scratch};
        kernels->sparse[dtype](&job);
        return int(OK);
    });
    give_workspace(w);
    return OK;
}

// Gradients of the sample weights of every lookup l with out[l] not null (zero-filled by the caller).
TW_API int64_t tw_sample_weight_gradients(const int64_t* spec, const int64_t* call, char* const* out) {
    const Call c(spec, call);
    const Kernels* kernels = active;
    const int64_t threads = c.threads();
    Workspace* w = take_workspace(size_t(c.scratch_bytes() * threads));
    if (!w) return NO_MEMORY;
    int result = OK;
    for (int64_t l = 0; l < c.spec->lookups && !result; ++l) {
        const LookupInfo& info = c.lookups[l];
        const LookupArg& a = c.lookup_args[l];
        const SlotArg& slot = c.slot_args[info.slot];
        if (!out[l] || !slot.data) continue;
        if (!offsets_fit(info, a, 0, a.bags)) result = BAD_INPUT;
        else result = for_each_task((a.bags + BAGS_PER_TASK - 1) / BAGS_PER_TASK, threads, [&](int64_t block, int thread) {
            const int64_t first = block * BAGS_PER_TASK, last = first + BAGS_PER_TASK < a.bags ? first + BAGS_PER_TASK : a.bags;
            const DotJob job = {&c.tables[info.table], &info, &a, c.table_args[info.table], slot.data + info.column * c.element,
                                slot.stride, first, last, out[l], w->data + thread * c.scratch_bytes()};
            return kernels->dots[c.head->dtype](&job);
        });
    }
    give_workspace(w);
    return result;
}

// The machine's own limits: read (and, with `out`, copy) rows at random, or read, change and write them back.
TW_API void tw_probe(int64_t threads, char* rows, const int64_t* index, int64_t count, int64_t row_bytes, int64_t ahead, char* out, int64_t write) {
    const Kernels* kernels = active;
    const int64_t block = 256;
    for_each_task((count + block - 1) / block, threads, [&](int64_t i, int) {
        const ProbeJob job = {rows, index, i * block, (i + 1) * block < count ? (i + 1) * block : count, row_bytes, ahead, out};
        if (write) kernels->probe_rmw(&job);
        else { volatile float sink = kernels->probe_gather(&job); (void)sink; }
        return int(OK);
    });
}
