// What crosses the borders: Python <-> driver.cpp (words of 8 bytes) and driver.cpp <-> one kernels_*.cpp per instruction set.
//
// Plain structs of 8-byte fields only, no functions: this header is compiled under different target flags, so anything that
// could be emitted here might be merged by the linker into code that the running CPU cannot execute.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace tw {

// I8: rows of dim codes with a scale and an offset (dim + 8 bytes, kernels/codecs), which only the forward reads; everything else of
// such a call is F32.
enum Dtype : int64_t { F32 = 0, F64 = 1, F16 = 2, BF16 = 3, I8 = 4 };
enum Pooling : int64_t { POOL_NONE = 0, POOL_SUM = 1, POOL_MEAN = 2 };
enum UpdateKind : int64_t { UPDATE_NONE = -1, UPDATE_SGD = 0, UPDATE_ADAGRAD = 1, UPDATE_ROWWISE_ADAGRAD = 2, UPDATE_ADAM = 3 };

// Static words, one block per GroupSpec: SpecHead, TableInfo[], LookupInfo[], ExtraInfo[]. Filled by cpu.py.
struct SpecHead { int64_t tables, lookups, slots, extras; };
struct TableInfo { int64_t rows, dim, first_lookup; };  // the table's lookups form a list that ends in -1
struct LookupInfo {
    int64_t table, slot, column, pooling;
    int64_t padding;       // row number, or -1
    int64_t include_last;  // offsets hold bags + 1 entries
    int64_t wrap;          // rows when negative ids wrap, else 0
    int64_t next;          // next lookup of the same table, or -1
};
struct ExtraInfo { int64_t slot, column, width; };

// Words of one call: CallHead, TableArg[], LookupArg[], SlotArg[], ExtraArg[]. Strides are in elements.
struct CallHead { int64_t dtype, threads; };
struct TableArg { char* data; int64_t stride; };
struct LookupArg {
    const void* ids;
    int64_t id_count, id_bytes;
    const void* offsets;  // null: every bag has `length` ids
    int64_t offset_bytes, bags, length;
    const void* weights;  // null or id_count values of the table's dtype (F32 for I8)
};
struct SlotArg { char* data; int64_t stride; };  // data is null for a slot without gradient
struct ExtraArg { const char* data; int64_t stride, rows; };

// One per table for tw_update and tw_update_from_sparse. Doubles, so that float64 tables lose nothing.
struct UpdateArg {
    int64_t kind, state_dtype;
    char* state0;
    char* state1;
    double rate;   // lr, or adam's lr * sqrt(1 - b2^t) / (1 - b1^t)
    double eps, one_minus_beta1, one_minus_beta2;
    double keep;   // 1 - lr * weight_decay
    double sign;   // -1 to maximize
};

// Summed gradients of one table: distinct ascending rows [count], values [count, dim] of the table's dtype.
struct SparseArg {
    const int64_t* rows;
    const char* values;
    int64_t stride, count, dim, table_rows;
    TableArg weights;
};

// ---- between driver and kernels ----

// A block of bags of one lookup.
struct ForwardJob {
    const TableInfo* table;
    const LookupInfo* lookup;
    const LookupArg* arg;
    TableArg weights;
    char* out;  // first element of this lookup's columns
    int64_t out_stride, first_bag, last_bag;
    int64_t stream;  // whether the output is too large to find in a cache later
    char* scratch;
};

// Sorted (row, source) keys of one table. Source s is the gradient row at source[s], scaled by scale[s] (null: 1).
struct Runs {
    const uint64_t* keys;      // row << shift | source, ascending by row; equal rows in collection order
    const uint32_t* starts;    // [count + 1] first key of each run of equal rows
    const char* const* source;
    const double* scale;
    int64_t count, shift;
};

struct RowsJob {
    Runs runs;
    int64_t first, last, dim;  // runs [first, last)
    TableArg weights;          // update: the table. fill: the destination
    const UpdateArg* update;   // null for fill
    int64_t* rows;             // fill: null, or where the row number of each run goes
    int64_t by_row;            // fill: write gradient of row r at r (dense) instead of at its run number
    int64_t stream;            // fill: as in ForwardJob
    char* squares;             // null, or for rowwise AdaGrad in two passes a number of sums' type for each run: without update the sum of
                               // its squares goes there, with one the mean of them (over all columns, wherever they are) is read there
    char* scratch;
};

struct SparseJob {
    const SparseArg* arg;
    const UpdateArg* update;
    int64_t first, last;
    char* scratch;
};

// <gradient[bag], row> for every id of a block of bags; gradient and out have the table's dtype.
struct DotJob {
    const TableInfo* table;
    const LookupInfo* lookup;
    const LookupArg* arg;
    TableArg weights;
    const char* gradient;
    int64_t gradient_stride, first_bag, last_bag;
    char* out;
    char* scratch;
};

struct ProbeJob {
    char* rows;
    const int64_t* index;
    int64_t first, last, row_bytes, ahead;
    char* out;  // gather: null (sum only) or [count, row_bytes]
};

// One table of entry points per instruction set, indexed by Dtype. Those that read ids return nonzero on an id out of range.
struct Kernels {
    int (*forward[5])(const ForwardJob*);
    void (*rows[4])(const RowsJob*);
    void (*sparse[4])(const SparseJob*);
    int (*dots[4])(const DotJob*);
    float (*probe_gather)(const ProbeJob*);
    void (*probe_rmw)(const ProbeJob*);
};

enum : int64_t {
    SCRATCH_ROWS = 2,  // rows of sums (8 bytes a number) in a job's scratch
    WINDOW = 512,      // ids or keys turned into addresses at a time
    MOST_AHEAD = 32,   // rows asked for before their use
};
}  // namespace tw

extern "C" {
extern const tw::Kernels tw_kernels_baseline;
extern const tw::Kernels tw_kernels_avx2;
extern const tw::Kernels tw_kernels_avx512;
}
