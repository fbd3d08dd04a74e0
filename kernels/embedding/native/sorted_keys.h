// The first phase of every backward: collect the (row, source) keys of each table and sort them. Part of driver.cpp.
#pragma once
#include "call.h"
#include "radix_sort.h"

namespace {

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

// Where the gradients of one table's bags are copied to lie side by side: see by_table.h.
struct Packed {
    char* next;  // null: they stay where they are
    int64_t row_bytes;

    const char* take(const char* gradient, int64_t stride) {
        if (!next) return gradient;
        for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(gradient + 12 * stride + i);
        char* to = next;
        memcpy(to, gradient, size_t(row_bytes));
        next += row_bytes;
        return to;
    }
};

// Appends the keys of one lookup; false where an id is out of range.
template <class I>
bool collect(const LookupInfo& l, const LookupArg& a, int64_t rows, const char* grad, int64_t grad_stride, int shift, int64_t dtype,
             Packed& packed, uint64_t*& keys, const char**& source, double* scale, uint64_t& next_source) {
    const I* ids = static_cast<const I*>(a.ids);
    const int64_t padding = l.padding, wrap = l.wrap;
    uint64_t* key = keys;
    bool bad = false;
    if (padding < 0 && !a.weights && !wrap) {  // nothing to decide about any id
        uint64_t worst = 0;                    // its sign bit is set where an id is out of range
        const int64_t each = l.pooling == POOL_NONE ? 1 : a.offsets ? 0 : a.length;
        int64_t p = 0;
        for (int64_t b = 0; b < a.bags; ++b, grad += grad_stride, ++next_source) {
            const int64_t end = each ? p + each : bag_begin(l, a, b + 1);
            if (scale) scale[next_source] = l.pooling == POOL_MEAN && end > p + 1 ? 1.0 / double(end - p) : 1.0;
            for (; p < end; ++p) {
                const uint64_t row = uint64_t(int64_t(ids[p]));
                worst |= row | (uint64_t(rows - 1) - row);
                key[p] = (row << shift) | next_source;
            }
            source[b] = packed.take(grad, grad_stride);
        }
        keys += p;
        source += a.bags;
        return worst >> 63 == 0;
    }
    int64_t end = bag_begin(l, a, 0);
    for (int64_t b = 0; b < a.bags; ++b, grad += grad_stride) {
        const int64_t begin = end;
        end = l.pooling == POOL_NONE ? begin + 1 : bag_begin(l, a, b + 1);
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

// Whether rows and sources fit a key.
bool can_sort(const Call& c, int64_t t, const TableRuns& r) {
    return bits_for(uint64_t(r.sources)) + bits_for(uint64_t(c.tables[t].rows)) <= 63 && r.ids < int64_t(UINT32_MAX);
}

int sort_table(const Call& c, int64_t t, bool wanted, TableRuns& r, uint64_t* spare, char* packed_rows = nullptr) {
    if (!wanted) {
        r.starts[0] = 0;
        return OK;
    }
    const int shift = bits_for(uint64_t(r.sources)), row_bits = bits_for(uint64_t(c.tables[t].rows));
    if (!can_sort(c, t, r)) return UNSUPPORTED;
    const RadixPlan plan = plan_radix(r.ids, row_bits);
    uint64_t* begin = plan.passes % 2 ? spare : r.keys;  // so that the last pass ends in r.keys
    uint64_t* end = begin;
    const char** source = r.source;
    uint64_t next_source = 0;
    Packed packed = {packed_rows, c.tables[t].dim * c.element};
    for (int64_t l = c.tables[t].first_lookup; l >= 0; l = c.lookups[l].next) {
        const LookupInfo& info = c.lookups[l];
        LookupArg a = c.lookup_args[l];
        const SlotArg& slot = c.slot_args[info.slot];
        if (!slot.data) continue;
        if (one_id_each(info, a, 0, a.bags)) a.offsets = nullptr, a.length = 1;
        else if (!offsets_fit(info, a, 0, a.bags)) return BAD_INPUT;
        const char* grad = slot.data + info.column * c.element;
        const int64_t stride = slot.stride * c.element;
        auto collect_ids = a.id_bytes == 4 ? collect<int32_t> : collect<int64_t>;
        if (!collect_ids(info, a, c.tables[t].rows, grad, stride, shift, c.head->dtype, packed, end, source, r.scale, next_source)) return BAD_INPUT;
    }
    const int64_t n = end - begin;
    radix_sort(begin, begin == spare ? r.keys : spare, n, shift, plan);
    // Each run's end is where its last key puts it; without branches, since where a run ends is anyone's guess.
    int64_t count = 0;
    r.starts[0] = 0;
    if (n) r.keys[n] = ~r.keys[n - 1];
    for (int64_t p = 0; p < n; ++p) {
        r.starts[count + 1] = uint32_t(p + 1);
        count += (r.keys[p] >> shift) != (r.keys[p + 1] >> shift);
    }
    r.count = count;
    r.sources = int64_t(next_source);
    for (int64_t k = 1; k <= MOST_AHEAD; ++k) r.starts[count + k] = uint32_t(n);
    for (int64_t k = 0; n && k < MOST_AHEAD; ++k) r.keys[n + k] = r.keys[n - 1];
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

// How much a table's keys take, as far as they are wanted: ids, sources, and whether these have scales.
TableRuns sizes_of(const Call& c, int64_t t, bool wanted, bool& scaled) {
    TableRuns r;
    memset(&r, 0, sizeof r);
    scaled = false;
    for (int64_t l = wanted ? c.tables[t].first_lookup : -1; l >= 0; l = c.lookups[l].next) {
        if (!c.slot_args[c.lookups[l].slot].data) continue;
        const LookupArg& a = c.lookup_args[l];
        r.ids += a.id_count;
        r.sources += a.weights ? a.id_count : a.bags;
        scaled |= a.weights || c.lookups[l].pooling == POOL_MEAN;
    }
    return r;
}

void lay_out(const Call& c, const int64_t* wanted, Carver& carver, Sorted& s, uint64_t*& spare, int64_t& spare_size) {
    const int64_t T = c.spec->tables, threads = s.threads = c.threads();
    s.tables = carver.take<TableRuns>(T);
    s.task_end = carver.take<int64_t>(T);
    spare_size = 1;
    for (int64_t t = 0; t < T; ++t) {
        bool scaled;
        TableRuns r = sizes_of(c, t, wanted[t] != 0, scaled);
        if (r.ids > spare_size) spare_size = r.ids;
        r.keys = carver.take<uint64_t>(r.ids + MOST_AHEAD);
        r.starts = carver.take<uint32_t>(r.ids + 1 + MOST_AHEAD);
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
    int result = for_each_task(c.spec->tables, s.threads, [&](int64_t t, int thread) {
        return sort_table(c, t, wanted[t] != 0, s.tables[t], spare + thread * spare_size);
    });
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

}  // namespace
