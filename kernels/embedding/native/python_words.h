// Tensors and update rules as the kernels want them, read from Python objects. Part of python.cpp.
//
// Tensors are read through the exchange functions that torch publishes with DLPack 1.2 (torch.Tensor.__dlpack_c_exchange_api__),
// so no torch headers are needed. Every pointer is read at every call. Only plain tensors in plain layouts are taken.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "api.h"

namespace {

using namespace tw;

// ---- DLPack 1.x, as far as it is needed ----

struct View {  // DLTensor
    char* data;
    int32_t device, device_id, dims;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t* shape;
    const int64_t* strides;
    uint64_t byte_offset;
};
struct Managed {  // DLManagedTensorVersioned
    uint32_t major, minor;
    void* context;
    void (*deleter)(Managed*);
    uint64_t flags;
    View tensor;
};
struct Exchange {  // DLPackExchangeAPI
    uint32_t major, minor;
    const void* previous;
    void* not_used[2];
    int (*import)(Managed* given, void** object);
    int (*view)(void* object, View* out);
};
enum { MOST_DIMS = 8 };
enum { DL_CPU = 1, DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4 };

// What connect() is given. They live as long as the process.
const Exchange* exchange = nullptr;
PyObject *tensor_type, *parameter_type, *empty, *zeros, *sparse, *float_dtype;
int64_t large_from;
PyObject *text_dtype, *text_contiguous, *names_dtype, *names_coalesced, *text_indices, *text_values, *text_is_coalesced;
enum { KIND, LR, EPS, BETA1, BETA2, WEIGHT_DECAY, STEP, MAXIMIZE, STATE, RULE_FIELDS };
PyObject* rule_fields[RULE_FIELDS];  // the attributes of updates.TableUpdate

bool view_of(PyObject* object, View& v) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != tensor_type && type != parameter_type) return false;
    if (exchange->view(object, &v)) {
        PyErr_Clear();
        return false;
    }
    v.data += v.byte_offset;
    return v.device == DL_CPU && v.lanes == 1;
}
int64_t dtype_of(const View& v) {
    if (v.code == DL_FLOAT) return v.bits == 32 ? F32 : v.bits == 64 ? F64 : v.bits == 16 ? F16 : -1;
    return v.code == DL_BFLOAT && v.bits == 16 ? BF16 : -1;
}
// The dtype of a table that is only read, and of what such a table is read with.
int64_t read_dtype_of(const View& v) { return v.code == DL_UINT && v.bits == 8 ? int64_t(I8) : dtype_of(v); }
int64_t values_of(int64_t dtype) { return dtype == I8 ? int64_t(F32) : dtype; }
int64_t id_bytes(const View& v) { return v.code == DL_INT && (v.bits == 64 || v.bits == 32) ? v.bits / 8 : 0; }
int64_t count_of(const int64_t* shape, int dims) {
    int64_t n = 1;
    for (int d = 0; d < dims; ++d) n *= shape[d];
    return n;
}
bool is_packed(const View& v) {
    int64_t wanted = 1;
    for (int d = v.dims - 1; d >= 0; --d) {
        if (v.shape[d] != 1 && v.strides[d] != wanted) return count_of(v.shape, v.dims) == 0;
        wanted *= v.shape[d];
    }
    return true;
}

// ---- memory and references of one call ----

struct Leading {  // the shape of a slot without its last dimension
    const int64_t* shape;
    int64_t dims, rows;
};

struct Arena {
    char* data;
    size_t used, size;
    PyObject* keep;  // a list of what must stay alive until the kernel returns

    explicit Arena(size_t bytes) : data(static_cast<char*>(calloc(1, bytes))), used(0), size(bytes), keep(nullptr) {}
    ~Arena() {
        free(data);
        Py_XDECREF(keep);
    }
    template <class T> T* take(int64_t n) {
        T* at = reinterpret_cast<T*>(data + used);
        used += size_t(n) * sizeof(T);
        return at;
    }
    // The tensor that `object.method()` returns, kept alive here.
    bool tensor(PyObject* object, PyObject* method, View& v) {
        if (!keep && !(keep = PyList_New(0))) return false;
        PyObject* made = PyObject_CallMethodNoArgs(object, method);
        if (!made) return false;
        const bool ok = !PyList_Append(keep, made) && view_of(made, v);
        Py_DECREF(made);
        return ok;
    }
    bool packed(PyObject* object, View& v) { return tensor(object, text_contiguous, v); }
};

struct Spec {
    const SpecHead* head;
    const TableInfo* tables;
    const LookupInfo* lookups;
    const ExtraInfo* extras;
    explicit Spec(const int64_t* words)
        : head(reinterpret_cast<const SpecHead*>(words)), tables(reinterpret_cast<const TableInfo*>(head + 1)),
          lookups(reinterpret_cast<const LookupInfo*>(tables + head->tables)),
          extras(reinterpret_cast<const ExtraInfo*>(lookups + head->lookups)) {}
    const int64_t* words() const { return reinterpret_cast<const int64_t*>(head); }
};

// The words of a call, in the order of abi.h, and beside them what Python needs of each slot.
struct Words {
    Arena arena;
    CallHead* head;
    TableArg* tables;
    LookupArg* lookups;
    SlotArg* slots;
    ExtraArg* extras;
    Leading* leading;   // per slot
    int64_t* written;   // per slot: columns that somebody writes
    int64_t* table_words;  // 4 per table, for the caller

    explicit Words(const SpecHead& s)
        : arena(sizeof(CallHead) + size_t(s.tables) * (sizeof(TableArg) + 32) + size_t(s.lookups) * sizeof(LookupArg) +
                size_t(s.slots) * (sizeof(SlotArg) + sizeof(Leading) + 8) + size_t(s.extras) * sizeof(ExtraArg)) {
        if (!arena.data) return;
        head = arena.take<CallHead>(1);
        tables = arena.take<TableArg>(s.tables);
        lookups = arena.take<LookupArg>(s.lookups);
        slots = arena.take<SlotArg>(s.slots);
        extras = arena.take<ExtraArg>(s.extras);
        leading = arena.take<Leading>(s.slots);
        written = arena.take<int64_t>(s.slots);
        table_words = arena.take<int64_t>(4 * s.tables);
    }
    const int64_t* words() const { return reinterpret_cast<const int64_t*>(head); }
};

// A list or tuple of exactly n objects, or null.
PyObject** items_of(PyObject* sequence, int64_t n) {
    if (!PyList_CheckExact(sequence) && !PyTuple_CheckExact(sequence)) return nullptr;
    if (PySequence_Fast_GET_SIZE(sequence) != n) return nullptr;
    static PyObject* nothing[1];
    return n ? PySequence_Fast_ITEMS(sequence) : nothing;  // an empty list has no items to point at
}

bool join(Leading& held, const int64_t* shape, int64_t dims, int64_t rows) {
    if (!held.shape) {
        held = Leading{shape, dims, rows};
        return true;
    }
    return held.dims == dims && !memcmp(held.shape, shape, size_t(dims) * sizeof(int64_t));
}

bool read_table(PyObject* object, const TableInfo& info, int64_t dtype, TableArg& arg) {
    View v;
    const int64_t width = dtype == I8 ? info.dim + 8 : info.dim;
    if (!view_of(object, v) || read_dtype_of(v) != dtype || v.dims != 2 || v.shape[0] != info.rows || v.shape[1] != width) return false;
    arg.data = v.data;
    arg.stride = width;
    if (!is_packed(v)) {
        if (width > 1 && v.strides[1] != 1) return false;
        arg.stride = v.strides[0];
    }
    return true;
}

bool read_lookup(const LookupInfo& info, PyObject* ids, PyObject* offsets, PyObject* weights, int64_t dtype, Arena& arena,
                 LookupArg& arg, Leading& leading) {
    View v;
    if (!view_of(ids, v) || !(arg.id_bytes = id_bytes(v))) return false;
    if (!is_packed(v) && !arena.packed(ids, v)) return false;
    arg.ids = v.data;
    arg.id_count = count_of(v.shape, v.dims);
    arg.length = 1;
    if (weights != Py_None) {
        View w;
        if (info.pooling != POOL_SUM || !view_of(weights, w) || dtype_of(w) != values_of(dtype) || !is_packed(w) || w.dims != v.dims ||
            memcmp(w.shape, v.shape, size_t(v.dims) * sizeof(int64_t)))
            return false;
        arg.weights = w.data;
    }
    if (info.pooling == POOL_NONE) {
        if (offsets != Py_None) return false;
        arg.bags = arg.id_count;
        return join(leading, v.shape, v.dims, arg.bags);
    }
    if (offsets == Py_None) {
        if (v.dims != 2) return false;
        arg.bags = v.shape[0];
        arg.length = v.shape[1];
    } else {
        View o;
        if (v.dims != 1 || !view_of(offsets, o) || o.dims != 1 || !(arg.offset_bytes = id_bytes(o))) return false;
        if (!is_packed(o) && !arena.packed(offsets, o)) return false;
        arg.bags = o.shape[0] - info.include_last;
        if (arg.bags < 0) return false;
        arg.offsets = o.data;
        if (!arg.bags) {  // nothing is read
            arg.offsets = nullptr;
            arg.length = 0;
        }
    }
    return join(leading, &arg.bags, 1, arg.bags);
}

// `reads`: the tables are only read.
bool read_call(const Spec& spec, Words& w, int64_t threads, PyObject* tables, PyObject* indices, PyObject* offsets,
               PyObject* weights, bool reads = false) {
    const SpecHead& s = *spec.head;
    PyObject **t = items_of(tables, s.tables), **i = items_of(indices, s.lookups), **o = items_of(offsets, s.lookups),
             **p = items_of(weights, s.lookups);
    View first;
    if (!t || !i || !o || !p || !s.tables || !view_of(t[0], first)) return false;
    w.head->dtype = reads ? read_dtype_of(first) : dtype_of(first);
    w.head->threads = threads;
    if (w.head->dtype < 0) return false;
    for (int64_t k = 0; k < s.tables; ++k)
        if (!read_table(t[k], spec.tables[k], w.head->dtype, w.tables[k])) return false;
    for (int64_t k = 0; k < s.lookups; ++k) {
        const LookupInfo& info = spec.lookups[k];
        w.written[info.slot] += spec.tables[info.table].dim;
        if (!read_lookup(info, i[k], o[k], p[k], w.head->dtype, w.arena, w.lookups[k], w.leading[info.slot])) return false;
    }
    return true;
}

bool read_gradients(const Spec& spec, Words& w, PyObject* gradients, PyObject* widths) {
    PyObject **g = items_of(gradients, spec.head->slots), **n = items_of(widths, spec.head->slots);
    if (!g || !n) return false;
    for (int64_t k = 0; k < spec.head->slots; ++k) {
        const Leading& l = w.leading[k];
        if (g[k] == Py_None || !l.shape) continue;
        const int64_t width = PyLong_AsLongLong(n[k]);
        View v;
        if (!view_of(g[k], v) || dtype_of(v) != w.head->dtype || v.dims != l.dims + 1 || v.shape[l.dims] != width ||
            memcmp(v.shape, l.shape, size_t(l.dims) * sizeof(int64_t)))
            return false;
        w.slots[k].stride = width;
        if (!is_packed(v)) {
            if (v.dims == 2 && v.strides[1] == 1) w.slots[k].stride = v.strides[0];
            else if (!w.arena.packed(g[k], v)) return false;
        }
        if (l.rows) w.slots[k].data = v.data;
    }
    return true;
}

// ---- update rules ----

double number(PyObject* rule, int field) {
    PyObject* value = PyObject_GetAttr(rule, rule_fields[field]);
    if (!value) return 0;
    const double number = PyFloat_AsDouble(value);
    Py_DECREF(value);
    return number;
}
int kind_of(PyObject* rule) {  // and the number of state tensors is {0, 1, 1, 2}[kind]
    PyObject* kind = PyObject_GetAttr(rule, rule_fields[KIND]);
    if (!kind) return -1;
    static const char* const kinds[] = {"sgd", "adagrad", "rowwise_adagrad", "adam"};
    int found = -1;
    for (int k = 0; k < 4; ++k)
        if (PyUnicode_Check(kind) && !PyUnicode_CompareWithASCIIString(kind, kinds[k])) found = k;
    Py_DECREF(kind);
    return found;
}
// As cpu_words.rules_of.
bool read_rule(PyObject* rule, int64_t dtype, int64_t rows, int64_t dim, UpdateArg& u) {
    memset(&u, 0, sizeof u);
    u.kind = UPDATE_NONE;
    if (rule == Py_None) return true;
    const int kind = kind_of(rule);
    PyObject* state = kind < 0 ? nullptr : PyObject_GetAttr(rule, rule_fields[STATE]);
    if (!state) return false;
    const int states = kind == UPDATE_SGD ? 0 : kind == UPDATE_ADAM ? 2 : 1;
    bool ok = PyTuple_CheckExact(state) && PyTuple_GET_SIZE(state) == states;
    const int64_t full = dtype == F64 ? F64 : F32;
    u.state_dtype = dtype;
    for (int k = 0; ok && k < states; ++k) {
        View v;
        ok = view_of(PyTuple_GET_ITEM(state, k), v) && is_packed(v) &&
             count_of(v.shape, v.dims) == (kind == UPDATE_ROWWISE_ADAGRAD ? rows : rows * dim);
        const int64_t held = ok ? dtype_of(v) : -1;
        ok = ok && (held == full || held == dtype || held == F32) && (!k || held == u.state_dtype);
        u.state_dtype = held;
        (k ? u.state1 : u.state0) = v.data;
    }
    Py_DECREF(state);
    if (!ok) return false;
    const double lr = number(rule, LR), beta1 = number(rule, BETA1), beta2 = number(rule, BETA2), step = number(rule, STEP);
    u.kind = kind;
    u.rate = kind == UPDATE_ADAM ? lr * (sqrt(1 - pow(beta2, step)) / (1 - pow(beta1, step))) : lr;
    u.eps = number(rule, EPS);
    u.one_minus_beta1 = 1 - beta1;
    u.one_minus_beta2 = 1 - beta2;
    u.keep = 1 - lr * number(rule, WEIGHT_DECAY);
    u.sign = number(rule, MAXIMIZE) ? -1 : 1;
    return !PyErr_Occurred();
}

}  // namespace
