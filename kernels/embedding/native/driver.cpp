// The C functions that cpu.py calls: cuts a call into tasks, spreads them over threads, and picks the instruction set.
//
// Backward in two parallel phases. First, per table, the (row, source) keys of all its lookups are collected and radix-sorted
// (stable, so equal rows keep the order of lookups and positions). Then runs of equal rows are cut into chunks of similar size,
// each summed and applied by one thread. A run is never split, so the result does not depend on the number of threads. Updates of
// long bags go table by table instead (by_table.h), with the same sums in the same order.
//
// No ids are trusted: forward and sorting return BAD_INPUT before anything of the user's is written, and cpu.py then asks
// reference.check_inputs for the words.
#include "../../native/cpu_level.h"
#include "api.h"
#include "by_table.h"
#include "call.h"
#include "sorted_keys.h"

namespace {

Builds<Kernels> builds = BUILDS(tw_kernels);

// ---- tasks ----

// Runs the second phase. `write` fills in what a job writes to, given its table.
template <class Write> void apply_all(const Call& c, const Sorted& s, Write write, Meanwhile before = Meanwhile()) {
    const Kernels* kernels = builds.active();
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
    }, before);
}

// Whether the row numbers ascend strictly and lie in the table; without branches, so in vectors.
bool rows_fit(const SparseArg& a) {
    int64_t fall = 0;
    for (int64_t u = 1; u < a.count; ++u) fall |= int64_t(a.rows[u] <= a.rows[u - 1]);
    return !a.count || (!fall && a.rows[0] >= 0 && a.rows[a.count - 1] < a.table_rows);
}

void copy_extra(const Call& c, int64_t e, int64_t first, int64_t last) {
    const ExtraArg& a = c.extra_args[e];
    const SlotArg& slot = c.slot_args[c.extras[e].slot];
    for (int64_t i = first; i < last && i < a.rows; ++i)
        memcpy(slot.data + (i * slot.stride + c.extras[e].column) * c.element, a.data + i * a.stride * c.element,
               size_t(c.extras[e].width * c.element));
}

}  // namespace

#define TW_API extern "C" __attribute__((visibility("default")))

// The version of this interface; cpu.py refuses a library built from other sources.
TW_API int64_t tw_abi() { return 8; }

// 0 baseline, 1 AVX2, 2 AVX-512. A level below 0 or above what the CPU has only asks.
TW_API int64_t tw_level(int64_t level) { return builds.ask(level); }

// All lookups and extras of a call, into its slots.
TW_API int64_t tw_forward(const int64_t* spec, const int64_t* call) {
    const Call c(spec, call);
    const Kernels* kernels = builds.active();
    const int64_t lookups = c.spec->lookups, parts = lookups + c.spec->extras;
    int64_t most = 0;  // bags
    for (int64_t l = 0; l < lookups; ++l)
        if (c.lookup_args[l].bags > most) most = c.lookup_args[l].bags;
    for (int64_t e = 0; e < c.spec->extras; ++e)
        if (c.extra_args[e].rows > most) most = c.extra_args[e].rows;
    int64_t out_bytes = 0;
    for (int64_t l = 0; l < lookups; ++l) out_bytes += c.lookup_args[l].bags * c.tables[c.lookups[l].table].dim * c.element;
    int64_t all_bytes = out_bytes;
    for (int64_t t = 0; t < c.spec->tables; ++t) all_bytes += c.tables[t].rows * c.tables[t].dim * c.element;
    const bool stream = out_bytes >= STREAM_FROM && all_bytes >= 4 * STREAM_FROM;
    const int64_t threads = c.threads();
    Workspace* w = take_workspace(size_t(c.scratch_bytes() * threads));
    if (!w) return NO_MEMORY;
    // Lookups outermost: the pages of one table at a time fit the TLB and its page table the L2 cache; those of all do not.
    int64_t bags = 4 * BAGS_PER_TASK;
    while (bags > 1 && threads > 1 && parts * ((most + bags - 1) / bags) < 4 * threads) bags /= 2;  // few bags, but long ones
    const int64_t blocks = (most + bags - 1) / bags;
    int result = for_each_task(blocks * parts, threads, [&](int64_t task, int thread) {
        const int64_t l = task / blocks, first = task % blocks * bags;
        if (l >= lookups) {
            copy_extra(c, l - lookups, first, first + bags);
            return int(OK);
        }
        const LookupInfo& info = c.lookups[l];
        const LookupArg& a = c.lookup_args[l];
        if (first >= a.bags) return int(OK);
        const int64_t last = first + bags < a.bags ? first + bags : a.bags;
        LookupArg arg = a;
        if (one_id_each(info, a, first, last)) arg.offsets = nullptr, arg.length = 1;
        else if (!offsets_fit(info, a, first, last)) return int(BAD_INPUT);
        const SlotArg& slot = c.slot_args[info.slot];
        const ForwardJob job = {&c.tables[info.table], &info, &arg, c.table_args[info.table], slot.data + info.column * c.element,
                                slot.stride, first, last, stream, w->data + thread * c.scratch_bytes()};
        return kernels->forward[c.head->dtype](&job);
    });
    give_workspace(w);
    return result;
}

// Sorts the ids of the wanted tables and counts distinct rows. *handle goes to tw_gradients_drop at last.
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
// r * dim. Keeps the handle, for tw_gradients_drop only. The calling thread does `first(with)`, if not null, before it takes part.
TW_API int64_t tw_gradients_fill(const int64_t* spec, const int64_t* call, void* handle, int64_t* const* rows, char* const* values,
                                 int64_t by_row, void (*first)(void*), void* with) {
    const Call c(spec, call);
    const Sorted& s = *static_cast<Sorted*>(handle);
    int64_t out_bytes = 0;
    for (int64_t t = 0; t < c.spec->tables; ++t) out_bytes += s.tables[t].count * c.tables[t].dim * c.element;
    const auto write = [&](RowsJob& job, int64_t t) {
        job.weights = TableArg{values[t], c.tables[t].dim};
        job.rows = rows[t];
        job.by_row = by_row;
        job.stream = out_bytes >= STREAM_FROM;
    };
    const Meanwhile before = {first, with};
    if (!fill_by_table(c, builds.active(), s, write, before)) apply_all(c, s, write, before);
    return OK;
}

// The first of two passes of rowwise AdaGrad: the squared sum of every run at squares[t] + run, in sums' type. Keeps the handle.
TW_API void tw_gradients_squares(const int64_t* spec, const int64_t* call, void* handle, char* const* squares) {
    apply_all(Call(spec, call), *static_cast<Sorted*>(handle), [&](RowsJob& job, int64_t t) { job.squares = squares[t]; });
}

// The second: the update by rowwise AdaGrad, the mean of each run's squares given at means[t] + run. Keeps the handle.
TW_API void tw_gradients_step(const int64_t* spec, const int64_t* call, void* handle, const UpdateArg* updates, char* const* means) {
    const Call c(spec, call);
    apply_all(c, *static_cast<Sorted*>(handle), [&](RowsJob& job, int64_t t) {
        job.weights = c.table_args[t];
        job.update = &updates[t];
        job.squares = means[t];
    });
}

TW_API int64_t tw_update(const int64_t* spec, const int64_t* call, const int64_t* wanted, const UpdateArg* updates) {
    const Call c(spec, call);
    const int64_t threads = c.threads();
    const TableSizes most(c, threads, [&](int64_t t, bool& scaled) { return sizes_of(c, t, wanted[t] != 0, scaled); });
    if (most.pays) return update_by_table(c, builds.active(), wanted, updates, most, threads);
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
TW_API int64_t tw_update_from_sparse(int64_t dtype, int64_t threads, int64_t tables, const SparseArg* args,
                                     const UpdateArg* updates) {
    const Kernels* kernels = builds.active();
    int64_t max_dim = 1, tasks = 0, bytes = 0;
    for (int64_t t = 0; t < tables; ++t) {
        if (args[t].dim > max_dim) max_dim = args[t].dim;
        bytes += args[t].count * args[t].dim * 4;
    }
    if (threads > 1 + bytes / 65536) threads = 1 + bytes / 65536;
    if (for_each_task(tables, threads, [&](int64_t t, int) { return rows_fit(args[t]) ? int(OK) : int(BAD_INPUT); })) return BAD_INPUT;
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
    const Kernels* kernels = builds.active();
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
TW_API void tw_probe(int64_t threads, char* rows, const int64_t* index, int64_t count, int64_t row_bytes, int64_t ahead, char* out,
                     int64_t write) {
    const Kernels* kernels = builds.active();
    const int64_t block = 2048;
    for_each_task((count + block - 1) / block, threads, [&](int64_t i, int) {
        const ProbeJob job = {rows, index, i * block, (i + 1) * block < count ? (i + 1) * block : count, row_bytes, ahead, out};
        if (write) kernels->probe_rmw(&job);
        else { volatile float sink = kernels->probe_gather(&job); (void)sink; }
        return int(OK);
    });
}
