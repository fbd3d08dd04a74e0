// Backwards that go table by table, each applied by one thread. Part of driver.cpp.
//
// With long bags the gradient of a bag is read once for each of its ids, in the order of rows, and the gradients of one table lie
// far apart in their slot. Copied side by side they stay in the L2 cache of the core that reads them: a seventh less time at
// pooling 10. The sums are made in the same order as in two phases, so the bits are the same.
#pragma once
#include "sorted_keys.h"

namespace {

const int64_t PACK_FROM = 4;             // ids a bag
const int64_t PACK_AT_MOST = 2 << 20;    // bytes of gradients

struct TableSizes {
    int64_t ids, sources, gradient_bytes, scaled;  // the most of any table
    bool pays;

    // `runs_of(t, has_scales)`: the runs of table t, as far as they are known.
    template <class RunsOf> TableSizes(const Call& c, int64_t threads, RunsOf runs_of) : ids(0), sources(0), gradient_bytes(0), scaled(0), pays(false) {
        int64_t all = 0, packed = 0;
        for (int64_t t = 0; t < c.spec->tables; ++t) {
            bool has_scales = false;
            const TableRuns r = runs_of(t, has_scales);
            const int64_t bytes = packed_bytes(c, t, r);
            all += r.ids;
            packed += bytes ? r.ids : 0;
            if (r.ids > ids) ids = r.ids;
            if (r.sources > sources) sources = r.sources;
            if (bytes > gradient_bytes) gradient_bytes = bytes;
            scaled |= has_scales;
        }
        pays = 2 * packed > all && (threads == 1 || 2 * threads * ids <= all);  // and no thread is left with one long table
    }
    // 0: they stay where they are.
    static int64_t packed_bytes(const Call& c, int64_t t, const TableRuns& r) {
        const int64_t bytes = r.sources * c.tables[t].dim * c.element;
        return r.ids >= PACK_FROM * r.sources && bytes <= PACK_AT_MOST ? bytes : 0;
    }
};

template <class I> bool ids_fit(const LookupArg& a, int64_t rows, int64_t wrap) {
    const I* ids = static_cast<const I*>(a.ids);
    uint64_t worst = 0;
    for (int64_t p = 0; p < a.id_count; ++p) {
        const int64_t id = ids[p];
        const uint64_t row = uint64_t(id + ((id >> 63) & wrap));
        worst |= row | (uint64_t(rows - 1) - row);
    }
    return worst >> 63 == 0;
}

// What sort_table would say of the table, before any other table is written to.
int check_table(const Call& c, int64_t t, const TableRuns& r) {
    if (!can_sort(c, t, r)) return UNSUPPORTED;
    for (int64_t l = r.ids ? c.tables[t].first_lookup : -1; l >= 0; l = c.lookups[l].next) {
        const LookupInfo& info = c.lookups[l];
        const LookupArg& a = c.lookup_args[l];
        if (!c.slot_args[info.slot].data) continue;
        const int64_t rows = c.tables[t].rows;
        if (!offsets_fit(info, a, 0, a.bags)) return BAD_INPUT;
        if (!(a.id_bytes == 4 ? ids_fit<int32_t>(a, rows, info.wrap) : ids_fit<int64_t>(a, rows, info.wrap))) return BAD_INPUT;
    }
    return OK;
}

// What one thread works in, large enough for any table.
struct Bench {
    TableRuns runs;
    uint64_t* spare;
    double* scale;
    char *packed, *scratch;
};

int update_by_table(const Call& c, const Kernels* kernels, const int64_t* wanted, const UpdateArg* updates, const TableSizes& most,
                    int64_t threads) {
    int result = for_each_task(c.spec->tables, threads, [&](int64_t t, int) {
        bool scaled;
        return check_table(c, t, sizes_of(c, t, wanted[t] != 0, scaled));
    });
    if (result) return result;
    Workspace* w = nullptr;
    Bench* benches = nullptr;
    for (int pass = 0; pass < 2; ++pass) {  // how much, then where
        Carver carver = {w ? w->data : nullptr, 0};
        benches = carver.take<Bench>(threads);
        for (int64_t k = 0; k < threads; ++k) {
            Bench b;
            memset(&b, 0, sizeof b);
            b.runs.keys = carver.take<uint64_t>(most.ids + MOST_AHEAD);
            b.runs.starts = carver.take<uint32_t>(most.ids + 1 + MOST_AHEAD);
            b.runs.source = carver.take<const char*>(most.sources);
            b.spare = carver.take<uint64_t>(most.ids);
            b.scale = carver.take<double>(most.scaled ? most.sources : 0);
            b.packed = carver.take<char>(most.gradient_bytes);
            b.scratch = carver.take<char>(c.scratch_bytes());
            if (w) benches[k] = b;
        }
        if (!w && !(w = take_workspace(carver.used))) return NO_MEMORY;
    }
    result = for_each_task(c.spec->tables, threads, [&](int64_t t, int thread) {
        const Bench& b = benches[thread];
        bool scaled;
        TableRuns r = sizes_of(c, t, wanted[t] != 0, scaled);
        if (!r.ids) return int(OK);
        r.keys = b.runs.keys, r.starts = b.runs.starts, r.source = b.runs.source;
        r.scale = scaled ? b.scale : nullptr;
        const int sorted = sort_table(c, t, true, r, b.spare, TableSizes::packed_bytes(c, t, r) ? b.packed : nullptr);
        if (sorted) return sorted;
        RowsJob job;
        memset(&job, 0, sizeof job);
        job.runs = r.runs;
        job.last = r.count;
        job.dim = c.tables[t].dim;
        job.scratch = b.scratch;
        job.weights = c.table_args[t];
        job.update = &updates[t];
        if (job.last) kernels->rows[c.head->dtype](&job);
        return int(OK);
    });
    give_workspace(w);
    return result;
}

// Sorted gradients, stored table by table where that pays; else false. `write` fills in what a job writes to, given its table.
template <class Write> bool fill_by_table(const Call& c, const Kernels* kernels, const Sorted& s, Write write, Meanwhile first) {
    const TableSizes most(c, s.threads, [&](int64_t t, bool&) { return s.tables[t]; });
    Workspace* w = most.pays ? take_workspace(size_t(most.gradient_bytes * s.threads)) : nullptr;
    if (!w) return false;
    for_each_task(c.spec->tables, s.threads, [&](int64_t t, int thread) {
        const TableRuns& r = s.tables[t];
        RowsJob job;
        memset(&job, 0, sizeof job);
        job.runs = r.runs;
        job.last = r.count;
        job.dim = c.tables[t].dim;
        job.scratch = s.scratch + thread * s.scratch_bytes;
        write(job, t);
        if (TableSizes::packed_bytes(c, t, r)) {
            Packed packed = {w->data + thread * most.gradient_bytes, job.dim * c.element};
            for (int64_t k = 0; k < r.sources; ++k) r.source[k] = packed.take(r.source[k], 0);
        }
        if (job.last) kernels->rows[c.head->dtype](&job);
        return int(OK);
    }, first);
    give_workspace(w);
    return true;
}

}  // namespace
