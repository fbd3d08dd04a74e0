// The same calls as ctypes makes, without Python between the tensors and the kernels: packing 26 lookups from Python takes as long
// as doing them. Built where Python's headers are; cpu.py asks it first and takes its own path where it answers None.
//
// Tensors are read through the exchange functions that torch publishes with DLPack 1.2 (torch.Tensor.__dlpack_c_exchange_api__),
// so no torch headers are needed. Every pointer is read at every call. Only plain tensors in plain layouts are taken.
#if defined(__has_include)
#if __has_include(<Python.h>)
#define TW_PYTHON
#endif
#endif

#ifdef TW_PYTHON
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <string.h>

#include "abi.h"

extern "C" {
int64_t tw_forward(const int64_t* spec, const int64_t* call);
int64_t tw_gradients_begin(const int64_t* spec, const int64_t* call, const int64_t* wanted, int64_t* counts, void** handle);
int64_t tw_gradients_fill(const int64_t* spec, const int64_t* call, void* handle, int64_t* const* rows, char* const* values,
                          int64_t by_row);
void tw_gradients_drop(void* handle);
int64_t tw_update(const int64_t* spec, const int64_t* call, const int64_t* wanted, const tw::UpdateArg* updates);
int64_t tw_update_from_sparse(int64_t dtype, int64_t threads, int64_t tables, const tw::SparseArg* args,
                              const tw::UpdateArg* updates);
}

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
struct Exchange {  // DLPackExchangeAPI
    uint32_t major, minor;
    const void* previous;
    void* not_used[3];
    int (*view)(void* object, View* out);
};
enum { DL_CPU = 1, DL_INT = 0, DL_FLOAT = 2, DL_BFLOAT = 4 };

// What connect() is given. They live as long as the process.
const Exchange* exchange = nullptr;
PyObject *tensor_type, *parameter_type, *empty, *zeros, *large_empty, *int64_dtype;
int64_t large_from;
PyObject *text_dtype, *text_contiguous, *names_dtype;

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
    // A packed copy of `object`, kept alive here.
    bool packed(PyObject* object, View& v) {
        if (!keep && !(keep = PyList_New(0))) return false;
        PyObject* copy = PyObject_CallMethodNoArgs(object, text_contiguous);
        if (!copy) return false;
        const bool ok = !PyList_Append(keep, copy) && view_of(copy, v);
        Py_DECREF(copy);
        return ok;
    }
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
    if (!view_of(object, v) || dtype_of(v) != dtype || v.dims != 2 || v.shape[0] != info.rows || v.shape[1] != info.dim) return false;
    arg.data = v.data;
    arg.stride = info.dim;
    if (!is_packed(v)) {
        if (info.dim > 1 && v.strides[1] != 1) return false;
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
        if (info.pooling != POOL_SUM || !view_of(weights, w) || dtype_of(w) != dtype || !is_packed(w) || w.dims != v.dims ||
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

bool read_call(const Spec& spec, Words& w, int64_t threads, PyObject* tables, PyObject* indices, PyObject* offsets,
               PyObject* weights) {
    const SpecHead& s = *spec.head;
    PyObject **t = items_of(tables, s.tables), **i = items_of(indices, s.lookups), **o = items_of(offsets, s.lookups),
             **p = items_of(weights, s.lookups);
    View first;
    if (!t || !i || !o || !p || !s.tables || !view_of(t[0], first)) return false;
    w.head->dtype = dtype_of(first);
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

// ---- making tensors ----

PyObject* make(PyObject* maker, PyObject* shape, PyObject* dtype) {
    PyObject* args[] = {shape, dtype};
    return PyObject_Vectorcall(maker, args, 1, names_dtype);
}
PyObject* make_slot(const Leading& l, int64_t width, int64_t element, bool whole, PyObject* dtype) {
    PyObject* shape = PyTuple_New(l.dims + 1);
    if (!shape) return nullptr;
    for (int64_t d = 0; d < l.dims; ++d) PyTuple_SET_ITEM(shape, d, PyLong_FromLongLong(l.shape[d]));
    PyTuple_SET_ITEM(shape, l.dims, PyLong_FromLongLong(width));
    PyObject* maker = !whole ? zeros : l.rows * width * element >= large_from ? large_empty : empty;
    PyObject* slot = make(maker, shape, dtype);
    Py_DECREF(shape);
    return slot;
}
PyObject* make_matrix(int64_t rows, int64_t columns, int64_t bytes, PyObject* dtype) {
    const int64_t shape[] = {rows};
    return make_slot(Leading{shape, 1, rows}, columns, bytes, true, dtype);
}
PyObject* make_rows(int64_t count) { return make_slot(Leading{nullptr, 0, 0}, count, 8, true, int64_dtype); }
int64_t element_of(int64_t dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

// ---- the functions ----

PyObject* none() { Py_RETURN_NONE; }

bool has(Py_ssize_t given, Py_ssize_t wanted) {
    if (given == wanted) return true;
    PyErr_Format(PyExc_TypeError, "%zd arguments, wanted %zd", given, wanted);
    return false;
}

// forward(spec, threads, tables, indices, offsets, weights, extras, widths) -> slots, or None
PyObject* forward(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (!has(n, 8)) return nullptr;
    const Spec spec(static_cast<const int64_t*>(PyLong_AsVoidPtr(a[0])));
    Words w(*spec.head);
    if (!w.arena.data) return PyErr_NoMemory();
    PyObject **e = items_of(a[6], spec.head->extras), **widths = items_of(a[7], spec.head->slots);
    if (!e || !widths || !read_call(spec, w, PyLong_AsLongLong(a[1]), a[2], a[3], a[4], a[5]))
        return PyErr_Occurred() ? nullptr : none();
    const int64_t element = element_of(w.head->dtype);
    for (int64_t k = 0; k < spec.head->extras; ++k) {
        const ExtraInfo& info = spec.extras[k];
        View v;
        if (!view_of(e[k], v) || dtype_of(v) != w.head->dtype || v.dims < 1 || v.shape[v.dims - 1] != info.width) return none();
        w.extras[k].stride = info.width;
        if (!is_packed(v)) {
            if (v.dims != 2 || v.strides[1] != 1) return none();
            w.extras[k].stride = v.strides[0];
        }
        w.extras[k].data = v.data;
        w.extras[k].rows = count_of(v.shape, v.dims - 1);
        if (!join(w.leading[info.slot], v.shape, v.dims - 1, w.extras[k].rows)) return none();
        w.written[info.slot] += info.width;
    }
    PyObject* dtype = PyObject_GetAttr(PySequence_Fast_GET_ITEM(a[2], 0), text_dtype);
    PyObject* out = dtype ? PyList_New(spec.head->slots) : nullptr;
    for (int64_t k = 0; out && k < spec.head->slots; ++k) {
        const int64_t width = PyLong_AsLongLong(widths[k]);
        static const int64_t no_rows[] = {0};
        const Leading& l = w.leading[k].shape ? w.leading[k] : w.leading[k] = Leading{no_rows, 1, 0};
        PyObject* slot = make_slot(l, width, element, w.written[k] == width, dtype);
        View v;
        if (slot) PyList_SET_ITEM(out, k, slot);
        if (!slot || !view_of(slot, v)) Py_CLEAR(out);
        else w.slots[k] = SlotArg{v.data, width};
    }
    Py_XDECREF(dtype);
    if (!out) return PyErr_Occurred() ? nullptr : none();
    int64_t result;
    Py_BEGIN_ALLOW_THREADS
    result = tw_forward(spec.words(), w.words());
    Py_END_ALLOW_THREADS
    if (!result) return out;
    Py_DECREF(out);
    return none();
}

// sparse_gradients(spec, threads, slot_grads, tables, indices, offsets, weights, widths, wanted)
// -> for each wanted table (rows [U], values [U, dim]), else None; or None
PyObject* sparse_gradients(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (!has(n, 9)) return nullptr;
    const Spec spec(static_cast<const int64_t*>(PyLong_AsVoidPtr(a[0])));
    const int64_t tables = spec.head->tables;
    Words w(*spec.head);
    if (!w.arena.data) return PyErr_NoMemory();
    PyObject** wishes = items_of(a[8], tables);
    if (!wishes || !read_call(spec, w, PyLong_AsLongLong(a[1]), a[3], a[4], a[5], a[6]) || !read_gradients(spec, w, a[2], a[7]))
        return PyErr_Occurred() ? nullptr : none();
    int64_t *wanted = w.table_words, *counts = wanted + tables;
    int64_t** rows = reinterpret_cast<int64_t**>(counts + tables);
    char** values = reinterpret_cast<char**>(rows + tables);
    for (int64_t t = 0; t < tables; ++t) wanted[t] = wishes[t] == Py_True;
    void* handle = nullptr;
    int64_t result;
    Py_BEGIN_ALLOW_THREADS
    result = tw_gradients_begin(spec.words(), w.words(), wanted, counts, &handle);
    Py_END_ALLOW_THREADS
    if (result) return none();
    PyObject* dtype = PyObject_GetAttr(PySequence_Fast_GET_ITEM(a[3], 0), text_dtype);
    PyObject* out = dtype ? PyList_New(tables) : nullptr;
    for (int64_t t = 0; out && t < tables; ++t) {
        if (!wanted[t]) {
            PyList_SET_ITEM(out, t, none());
            continue;
        }
        const int64_t dim = spec.tables[t].dim;
        PyObject* r = make_rows(counts[t]);
        PyObject* v = r ? make_matrix(counts[t], dim, element_of(w.head->dtype), dtype) : nullptr;
        View at_rows, at_values;
        const bool ok = v && view_of(r, at_rows) && view_of(v, at_values);
        PyObject* pair = ok ? PyTuple_Pack(2, r, v) : nullptr;
        Py_XDECREF(r);
        Py_XDECREF(v);
        if (!pair) {
            Py_CLEAR(out);
            break;
        }
        PyList_SET_ITEM(out, t, pair);
        rows[t] = reinterpret_cast<int64_t*>(at_rows.data);
        values[t] = at_values.data;
    }
    Py_XDECREF(dtype);
    if (!out) {
        tw_gradients_drop(handle);
        return PyErr_Occurred() ? nullptr : none();
    }
    Py_BEGIN_ALLOW_THREADS
    tw_gradients_fill(spec.words(), w.words(), handle, rows, values, 0);
    Py_END_ALLOW_THREADS
    return out;
}

// update(spec, threads, slot_grads, tables, indices, offsets, weights, widths, wanted, rules) -> True, or None: nothing was done
PyObject* update(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (!has(n, 10)) return nullptr;
    const Spec spec(static_cast<const int64_t*>(PyLong_AsVoidPtr(a[0])));
    const int64_t tables = spec.head->tables;
    Words w(*spec.head);
    if (!w.arena.data) return PyErr_NoMemory();
    PyObject** wishes = items_of(a[8], tables);
    if (!wishes || !read_call(spec, w, PyLong_AsLongLong(a[1]), a[3], a[4], a[5], a[6]) || !read_gradients(spec, w, a[2], a[7]) ||
        !PyBytes_Check(a[9]) || PyBytes_GET_SIZE(a[9]) != tables * int64_t(sizeof(UpdateArg)))
        return PyErr_Occurred() ? nullptr : none();
    for (int64_t t = 0; t < tables; ++t) w.table_words[t] = wishes[t] == Py_True;
    int64_t result;
    Py_BEGIN_ALLOW_THREADS
    result = tw_update(spec.words(), w.words(), w.table_words, reinterpret_cast<const UpdateArg*>(PyBytes_AS_STRING(a[9])));
    Py_END_ALLOW_THREADS
    if (result) return none();
    Py_RETURN_TRUE;
}

// connect(exchange capsule, Tensor, Parameter, empty, zeros, large_empty, large_from, int64) -> whether calls can be taken
PyObject* connect(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (!has(n, 8)) return nullptr;
    const Exchange* given = static_cast<const Exchange*>(PyCapsule_GetPointer(a[0], "dlpack_exchange_api"));
    if (!given) return nullptr;
    if (given->major != 1) Py_RETURN_FALSE;
    text_dtype = PyUnicode_InternFromString("dtype");
    text_contiguous = PyUnicode_InternFromString("contiguous");
    names_dtype = PyTuple_Pack(1, text_dtype);
    large_from = PyLong_AsLongLong(a[6]);
    for (int k = 0; k < 8; ++k) Py_INCREF(a[k]);
    tensor_type = a[1], parameter_type = a[2], empty = a[3], zeros = a[4], large_empty = a[5], int64_dtype = a[7];
    if (PyErr_Occurred()) return nullptr;
    exchange = given;
    Py_RETURN_TRUE;
}

template <class F> PyMethodDef fast(const char* name, F function) {
    return PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}
PyMethodDef methods[] = {fast("connect", connect), fast("forward", forward), fast("sparse_gradients", sparse_gradients),
                         fast("update", update), PyMethodDef{nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
#endif
