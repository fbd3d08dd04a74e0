// The same calls as ctypes makes, without Python between the tensors and the kernels: packing 26 lookups from Python takes as long
// as doing them. Built where Python's headers are; cpu.py asks it first and takes its own path where it answers None.
#if defined(__has_include)
#if __has_include(<Python.h>)
#define TW_PYTHON
#endif
#endif

#ifdef TW_PYTHON
#include "python_memory.h"

namespace {

// ---- making tensors ----

PyObject* make(PyObject* maker, PyObject* shape, PyObject* dtype) {
    PyObject* args[] = {shape, dtype};
    return PyObject_Vectorcall(maker, args, 1, names_dtype);
}
const Type INT64 = {DL_INT, 64};
Type type_of(int64_t dtype) {
    dtype = values_of(dtype);
    return Type{uint8_t(dtype == BF16 ? DL_BFLOAT : DL_FLOAT), uint8_t(dtype == F64 ? 64 : dtype == F32 ? 32 : 16)};
}
// `whole`: all of it will be written.
PyObject* make_slot(const Leading& l, int64_t width, Type type, bool whole, PyObject* dtype) {
    if (whole && l.rows * width * (type.bits / 8) >= large_from && l.dims < MOST_DIMS) {
        int64_t shape[MOST_DIMS];
        for (int64_t d = 0; d < l.dims; ++d) shape[d] = l.shape[d];
        shape[l.dims] = width;
        Row one(Row::bytes_of(l.rows * width, type));
        char* data;
        return one.home ? one.take(shape, int(l.dims + 1), type, data) : nullptr;
    }
    PyObject* shape = PyTuple_New(l.dims + 1);
    if (!shape) return nullptr;
    for (int64_t d = 0; d < l.dims; ++d) PyTuple_SET_ITEM(shape, d, PyLong_FromLongLong(l.shape[d]));
    PyTuple_SET_ITEM(shape, l.dims, PyLong_FromLongLong(width));
    PyObject* slot = make(whole ? empty : zeros, shape, dtype);
    Py_DECREF(shape);
    return slot;
}

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
    if (!e || !widths || !read_call(spec, w, PyLong_AsLongLong(a[1]), a[2], a[3], a[4], a[5], true))
        return PyErr_Occurred() ? nullptr : none();
    for (int64_t k = 0; k < spec.head->extras; ++k) {
        const ExtraInfo& info = spec.extras[k];
        View v;
        if (!view_of(e[k], v) || dtype_of(v) != values_of(w.head->dtype) || v.dims < 1 || v.shape[v.dims - 1] != info.width) return none();
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
    PyObject* dtype = w.head->dtype == I8 ? float_dtype : PyObject_GetAttr(PySequence_Fast_GET_ITEM(a[2], 0), text_dtype);
    if (dtype == float_dtype) Py_INCREF(dtype);
    const Type type = type_of(w.head->dtype);
    PyObject* out = dtype ? PyList_New(spec.head->slots) : nullptr;
    for (int64_t k = 0; out && k < spec.head->slots; ++k) {
        const int64_t width = PyLong_AsLongLong(widths[k]);
        static const int64_t no_rows[] = {0};
        const Leading& l = w.leading[k].shape ? w.leading[k] : w.leading[k] = Leading{no_rows, 1, 0};
        PyObject* slot = make_slot(l, width, type, w.written[k] == width, dtype);
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

// What gradients() makes for each wanted table: (rows [U], values [U, dim]), a coalesced sparse tensor of the two, or a dense tensor.
enum { PAIRS = 0, COALESCED = 1, DENSE = 2 };

// The tensor that one table's dense gradient is added up in, and where it lies.
PyObject* make_dense(const TableInfo& table, Type type, PyObject* dtype, char*& values) {
    const int64_t shape[] = {table.rows};
    View at;
    PyObject* made = make_slot(Leading{shape, 1, table.rows}, table.dim, type, false, dtype);
    if (!made || !view_of(made, at)) Py_CLEAR(made);
    else values = at.data;
    return made;
}

// The tensors that one table's sparse gradient is written to, as one object.
PyObject* make_sparse(const TableInfo& table, int64_t count, int64_t layout, Type type, Block* home, int64_t* rows, char* values) {
    const int64_t at_rows[] = {1, count}, at_values[] = {count, table.dim};
    const bool flat = layout == PAIRS;
    PyObject* r = tensor_in(home, reinterpret_cast<char*>(rows), at_rows + flat, 2 - flat, INT64);
    PyObject* v = r ? tensor_in(home, values, at_values, 2, type) : nullptr;
    if (v && !count) {  // torch adds to a gradient without rows in place, for which it must be able to make its memory larger
        PyObject *r_own = PyObject_CallMethod(r, "clone", nullptr), *v_own = r_own ? PyObject_CallMethod(v, "clone", nullptr) : nullptr;
        Py_DECREF(r);
        Py_DECREF(v);
        r = r_own, v = v_own;
    }
    PyObject *made = nullptr, *size = v && layout == COALESCED ? Py_BuildValue("(LL)", (long long)table.rows, (long long)table.dim) : nullptr;
    PyObject* args[] = {r, v, size, Py_True, Py_False};
    if (v && layout == PAIRS) made = PyTuple_Pack(2, r, v);
    else if (size) made = PyObject_Vectorcall(sparse, args, 3, names_coalesced);
    Py_XDECREF(size);
    Py_XDECREF(r);
    Py_XDECREF(v);
    return made;
}

// The gradients of a call, and the lock of Python's that the calling thread lets go of when it has made them: 26 sparse tensors take as
// long as a quarter of their numbers, which the other threads write meanwhile.
struct Gradients {
    const Spec& spec;
    const int64_t *wanted, *counts, layout;
    const Type type;
    Block* home;
    int64_t** rows;
    char** values;
    PyObject *dtype, *out;
    PyThreadState* unlocked;

    void make(int64_t t) {
        PyObject* made = !wanted[t] ? none()
                         : layout == DENSE ? make_dense(spec.tables[t], type, dtype, values[t])
                                           : make_sparse(spec.tables[t], counts[t], layout, type, home, rows[t], values[t]);
        if (made) PyList_SET_ITEM(out, t, made);
        else Py_CLEAR(out);
    }
    void make_all() { for (int64_t t = 0; out && t < spec.head->tables; ++t) make(t); }
    static void begin(void* with) {
        Gradients& g = *static_cast<Gradients*>(with);
        if (g.layout != DENSE) g.make_all();
        g.unlocked = PyEval_SaveThread();
    }
};

// gradients(spec, threads, slot_grads, tables, indices, offsets, weights, widths, wanted, layout)
// -> the gradient of each wanted table, else None; or None
PyObject* gradients(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (!has(n, 10)) return nullptr;
    const Spec spec(static_cast<const int64_t*>(PyLong_AsVoidPtr(a[0])));
    const int64_t tables = spec.head->tables, layout = PyLong_AsLongLong(a[9]);
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
    const Type type = type_of(w.head->dtype);
    size_t bytes = 0;
    for (int64_t t = 0; t < tables; ++t)
        if (wanted[t] && layout != DENSE) bytes += Row::bytes_of(counts[t], INT64) + Row::bytes_of(counts[t] * spec.tables[t].dim, type);
    Row row(bytes);
    PyObject* dtype = row.home ? PyObject_GetAttr(PySequence_Fast_GET_ITEM(a[3], 0), text_dtype) : nullptr;
    Gradients g = {spec, wanted, counts, layout, type, row.home, rows, values, dtype, dtype ? PyList_New(tables) : nullptr, nullptr};
    for (int64_t t = 0; g.out && t < tables && layout != DENSE; ++t) {
        if (!wanted[t]) continue;
        rows[t] = reinterpret_cast<int64_t*>(row.place(counts[t], INT64));
        values[t] = row.place(counts[t] * spec.tables[t].dim, type);
    }
    if (g.out && layout == DENSE) g.make_all();  // their rows are added to zeros
    if (g.out) {
        tw_gradients_fill(spec.words(), w.words(), handle, rows, values, layout == DENSE, Gradients::begin, &g);
        PyEval_RestoreThread(g.unlocked);
    }
    Py_XDECREF(dtype);
    tw_gradients_drop(handle);
    return g.out || PyErr_Occurred() ? g.out : none();
}

// update(spec, threads, slot_grads, tables, indices, offsets, weights, widths, rules) -> True, or None: nothing was done
PyObject* update(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (!has(n, 9)) return nullptr;
    const Spec spec(static_cast<const int64_t*>(PyLong_AsVoidPtr(a[0])));
    const int64_t tables = spec.head->tables;
    Words w(*spec.head);
    Arena more(size_t(tables) * sizeof(UpdateArg) + 1);
    if (!w.arena.data || !more.data) return PyErr_NoMemory();
    UpdateArg* updates = more.take<UpdateArg>(tables);
    PyObject** rules = items_of(a[8], tables);
    if (!rules || !read_call(spec, w, PyLong_AsLongLong(a[1]), a[3], a[4], a[5], a[6]) || !read_gradients(spec, w, a[2], a[7]))
        return PyErr_Occurred() ? nullptr : none();
    for (int64_t t = 0; t < tables; ++t) {
        if (!read_rule(rules[t], w.head->dtype, spec.tables[t].rows, spec.tables[t].dim, updates[t]))
            return PyErr_Occurred() ? nullptr : none();
        w.table_words[t] = rules[t] != Py_None;
    }
    int64_t result;
    Py_BEGIN_ALLOW_THREADS
    result = tw_update(spec.words(), w.words(), w.table_words, updates);
    Py_END_ALLOW_THREADS
    if (result) return none();
    Py_RETURN_TRUE;
}

// update_from_gradients(threads, tables, gradients, rules) -> True, or None: nothing was done. Gradients are coalesced sparse
// tensors; tables have one dtype.
PyObject* update_from_gradients(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (!has(n, 4)) return nullptr;
    const int64_t tables = PyList_CheckExact(a[1]) ? PyList_GET_SIZE(a[1]) : 0;
    PyObject **t = items_of(a[1], tables), **g = items_of(a[2], tables), **rules = items_of(a[3], tables);
    if (!t || !g || !rules || !tables) return none();
    Arena arena(size_t(tables) * (sizeof(SparseArg) + sizeof(UpdateArg)));
    if (!arena.data) return PyErr_NoMemory();
    SparseArg* args = arena.take<SparseArg>(tables);
    UpdateArg* updates = arena.take<UpdateArg>(tables);
    int64_t dtype = -1;
    for (int64_t k = 0; k < tables; ++k) {
        View v, rows, values;
        if (!view_of(t[k], v) || v.dims != 2 || dtype_of(v) < 0 || (k && dtype_of(v) != dtype)) return none();
        dtype = dtype_of(v);
        PyObject* coalesced = PyObject_CallMethodNoArgs(g[k], text_is_coalesced);
        if (!coalesced) return nullptr;
        Py_DECREF(coalesced);
        if (coalesced != Py_True || !arena.tensor(g[k], text_indices, rows) || !arena.tensor(g[k], text_values, values))
            return PyErr_Occurred() ? nullptr : none();
        const bool narrow = !is_packed(v);
        if (id_bytes(rows) != 8 || rows.dims != 2 || rows.shape[0] != 1 || !is_packed(rows) || !is_packed(values) ||
            values.dims != 2 || dtype_of(values) != dtype || values.shape[0] != rows.shape[1] || values.shape[1] != v.shape[1] ||
            (narrow && v.shape[1] > 1 && v.strides[1] != 1) || !read_rule(rules[k], dtype, v.shape[0], v.shape[1], updates[k]))
            return PyErr_Occurred() ? nullptr : none();
        const int64_t dim = v.shape[1];
        args[k] = SparseArg{reinterpret_cast<int64_t*>(rows.data), values.data, dim, rows.shape[1], dim, v.shape[0],
                            TableArg{v.data, narrow ? v.strides[0] : dim}};
    }
    const int64_t threads = PyLong_AsLongLong(a[0]);
    int64_t result;
    Py_BEGIN_ALLOW_THREADS
    result = tw_update_from_sparse(dtype, threads, tables, args, updates);
    Py_END_ALLOW_THREADS
    if (result) return none();
    Py_RETURN_TRUE;
}

// count_up(steps) -> True, each a float32 number one larger; or None: nothing was done
PyObject* count_up(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (!has(n, 1)) return nullptr;
    const int64_t count = PyList_CheckExact(a[0]) ? PyList_GET_SIZE(a[0]) : 0;
    PyObject** steps = items_of(a[0], count);
    Arena arena(size_t(count) * sizeof(float*) + 1);
    if (!arena.data) return PyErr_NoMemory();
    float** at = arena.take<float*>(count);
    for (int64_t k = 0; k < count; ++k) {
        View v;
        if (!steps || !view_of(steps[k], v) || v.dims || dtype_of(v) != F32) return none();
        at[k] = reinterpret_cast<float*>(v.data);
    }
    for (int64_t k = 0; k < count; ++k) *at[k] += 1;
    Py_RETURN_TRUE;
}

// connect(exchange capsule, Tensor, Parameter, empty, zeros, large_from, sparse_coo_tensor, float32)
// -> whether calls can be taken
PyObject* connect(PyObject*, PyObject* const* a, Py_ssize_t n) {
    if (!has(n, 8)) return nullptr;
    const Exchange* given = static_cast<const Exchange*>(PyCapsule_GetPointer(a[0], "dlpack_exchange_api"));
    if (!given) return nullptr;
    if (given->major != 1) Py_RETURN_FALSE;
    text_dtype = PyUnicode_InternFromString("dtype");
    text_contiguous = PyUnicode_InternFromString("contiguous");
    text_indices = PyUnicode_InternFromString("_indices");
    text_values = PyUnicode_InternFromString("_values");
    text_is_coalesced = PyUnicode_InternFromString("is_coalesced");
    names_dtype = PyTuple_Pack(1, text_dtype);
    names_coalesced = Py_BuildValue("(ss)", "is_coalesced", "check_invariants");
    static const char* const fields[] = {"kind", "lr", "eps", "beta1", "beta2", "weight_decay", "step", "maximize", "state"};
    for (int k = 0; k < RULE_FIELDS; ++k) rule_fields[k] = PyUnicode_InternFromString(fields[k]);
    large_from = PyLong_AsLongLong(a[5]);
    for (int k = 0; k < 8; ++k) Py_INCREF(a[k]);
    tensor_type = a[1], parameter_type = a[2], empty = a[3], zeros = a[4], sparse = a[6], float_dtype = a[7];
    if (PyErr_Occurred()) return nullptr;
    exchange = given;
    Py_RETURN_TRUE;
}

template <class F> PyMethodDef fast(const char* name, F function) {
    return PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}
PyMethodDef methods[] = {fast("connect", connect), fast("forward", forward), fast("gradients", gradients),
                         fast("update", update), fast("update_from_gradients", update_from_gradients), fast("count_up", count_up), PyMethodDef{nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    pthread_atfork(nullptr, nullptr, unlock_blocks);  // a forked child may have inherited a held lock
    return PyModule_Create(&module);
}
#endif
