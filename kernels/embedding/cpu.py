"""Table-batched lookups on CPU in C++ (native/): same functions and meanings as reference.py, which does the work wherever the
library is missing or a call is outside of what it covers (other devices, unusual dtypes or layouts).

The C side gets plain 64-bit words: those that only depend on the spec are made once, those with pointers are packed anew at
every call, since a cached pointer would outlive ``load_state_dict(assign=True)`` or ``.to()``. The library loads after torch, so
both share one OpenMP runtime and ``torch.set_num_threads`` holds for both. It trusts no id or offset: where it refuses,
``reference.check_inputs`` finds the words, and nothing has been written.
"""
from __future__ import annotations

import ctypes
import importlib.machinery
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import buffers, reference
from .reference import OptionalTensors
from .spec import GroupSpec
from .updates import KINDS, TableUpdate

_ABI = 2  # tw_abi() of native/driver.cpp
_LEVELS = ("baseline", "AVX2", "AVX-512")  # of tw_level()
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_POOLINGS = {"none": 0, "sum": 1, "mean": 2}
_OK, _BAD_INPUT, _UNSUPPORTED, _NO_MEMORY = range(4)
_UPDATE = struct.Struct("=qqQQ6d")
_NO_UPDATE = _UPDATE.pack(-1, 0, 0, 0, *(0.0,) * 6)


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not."""
    here = Path(__file__).parent
    found = [here / f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES if (here / f"_native{suffix}").exists()]
    if not found:
        return None, f"the C++ kernels were not built (no _native library in {here}); `pip install` the package where a C++ compiler is"
    try:
        lib = ctypes.CDLL(str(found[0]))
        abi = lib.tw_abi()
    except (OSError, AttributeError) as error:
        return None, f"the C++ kernels did not load: {error}"
    if abi != _ABI:
        return None, f"{found[0]} was built from other sources (interface {abi}, wanted {_ABI}); install the package again"
    word, pointer, text = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("tw_level", word, [word]),
        ("tw_forward", word, [pointer, text]),
        ("tw_update", word, [pointer, text, text, text]),
        ("tw_update_from_sparse", word, [word, word, word, text, text]),
        ("tw_gradients_begin", word, [pointer, text, text, pointer, pointer]),
        ("tw_gradients_fill", word, [pointer, text, pointer, text, text, word]),
        ("tw_gradients_drop", None, [pointer]),
        ("tw_sample_weight_gradients", word, [pointer, text, text]),
        ("tw_probe", None, [word, pointer, pointer, word, word, word, pointer, word]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib, ""


_lib, _why_not = _load()


def available() -> bool:
    """Whether the C++ kernels are there."""
    return _lib is not None


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    if _lib is None:
        return f"pure PyTorch: {_why_not}"
    return f"native {_LEVELS[_lib.tw_level(-1)]}"


class _Plan:
    """What the C side needs to know of one spec, and what Python needs to know to pack a call."""

    def __init__(self, spec: GroupSpec) -> None:
        self.spec = spec
        words = [len(spec.tables), len(spec.lookups), len(spec.slots), len(spec.extras)]
        first, following = [-1] * len(spec.tables), [-1] * len(spec.lookups)  # the lookups of each table, as linked lists in order
        for place in reversed(range(len(spec.lookups))):
            table = spec.lookups[place].table
            first[table], following[place] = place, first[table]
        for t, place in zip(spec.tables, first):
            words += (t.rows, t.dim, place)
        for l, place in zip(spec.lookups, following):
            padding = -1 if l.padding_idx is None else l.padding_idx
            wrap = spec.tables[l.table].rows if l.wrap_negative else 0
            words += (l.table, l.slot, l.column, _POOLINGS[l.pooling], padding, int(l.include_last_offset), wrap, place)
        for e in spec.extras:
            words += (e.slot, e.column, e.width)
        self._words = (ctypes.c_int64 * len(words))(*words)  # kept alive for `pointer`
        self.pointer = ctypes.addressof(self._words)
        self.tables = [(t.rows * t.dim, t.dim, t.rows) for t in spec.tables]
        self.lookups = [(l.pooling == "none", l.slot, int(l.include_last_offset), l.pooling == "sum") for l in spec.lookups]
        self.pack = struct.Struct(f"={2 + 2 * len(spec.tables) + 8 * len(spec.lookups) + 2 * len(spec.slots) + 3 * len(spec.extras)}q").pack
        self.pack_tables = struct.Struct(f"={len(spec.tables)}q").pack
        written = [0] * len(spec.slots)
        for l in spec.lookups:
            written[l.slot] += spec.tables[l.table].dim
        for e in spec.extras:
            written[e.slot] += e.width
        self.whole = [w == width for w, width in zip(written, spec.slots)]  # else columns nobody writes must be zero


_plans: dict[int, _Plan] = {}


def _plan(spec: GroupSpec) -> _Plan:
    # By identity: hashing a spec of 26 tables takes as long as the whole call. The plan holds its spec, so no id is reused.
    plan = _plans.get(id(spec))
    if plan is None:
        if len(_plans) >= 4096:
            _plans.clear()
        plan = _plans[id(spec)] = _Plan(spec)
    return plan


class _Call:
    """The words of one call for tables and lookups, and the shapes of its slots. ``keep`` holds contiguous copies alive."""

    __slots__ = ("dtype", "words", "leading", "bags", "keep")

    def __init__(self, dtype: torch.dtype, words: list[int], leading: list, bags: list[int], keep: list[Tensor]) -> None:
        self.dtype, self.words, self.leading, self.bags, self.keep = dtype, words, leading, bags, keep


def _describe_call(
    plan: _Plan, tables: Sequence[Tensor], indices: Sequence[Tensor], offsets: OptionalTensors, sample_weights: OptionalTensors
) -> _Call | None:
    """Pack tables and lookups. None where the library cannot take the call; then the reference does it, or says what is wrong."""
    if _lib is None or not tables:
        return None
    dtype = tables[0].dtype
    code = _DTYPES.get(dtype)
    if code is None:
        return None
    keep: list[Tensor] = []
    words = [code, torch.get_num_threads()]
    for table, (size, stride, rows) in zip(tables, plan.tables):
        if table.dtype is not dtype or not table.is_cpu:
            return None
        if table.numel() != size or table.size(0) != rows:
            return None
        if not table.is_contiguous():
            if table.dim() != 2 or (stride > 1 and table.stride(1) != 1):
                return None
            stride = table.stride(0)
        words += (table.data_ptr(), stride)
    slots = len(plan.whole)
    leading: list = [None] * slots
    bags = [0] * slots
    for (single, slot, include_last, weightable), ids, offs, weights in zip(plan.lookups, indices, offsets, sample_weights):
        id_dtype = ids.dtype
        width = 8 if id_dtype is torch.int64 else 4 if id_dtype is torch.int32 else 0
        if not width or not ids.is_cpu:
            return None
        if not ids.is_contiguous():
            ids = ids.contiguous()
            keep.append(ids)
        count, length, start, start_width, weight = ids.numel(), 1, 0, 0, 0
        shape = ids.shape
        if single:
            if offs is not None or weights is not None:
                return None
            here = count
        elif offs is None:
            if len(shape) != 2:
                return None
            here, length = shape
            shape = shape[:1]
        else:
            start_width = 8 if offs.dtype is torch.int64 else 4 if offs.dtype is torch.int32 else 0
            if not start_width or not offs.is_cpu or offs.dim() != 1 or len(shape) != 1:
                return None
            if not offs.is_contiguous():
                offs = offs.contiguous()
                keep.append(offs)
            here = offs.numel() - include_last
            if here < 0:
                return None
            start, shape = offs.data_ptr(), (here,)
            if not here:
                start = 0  # no bag: nothing is read
                length = 0
        if weights is not None:
            if not weightable or not weights.is_cpu or weights.shape != ids.shape:
                return None
            if weights.dtype is not dtype or not weights.is_contiguous():
                weights = weights.detach().to(dtype).contiguous()
                keep.append(weights)
            weight = weights.data_ptr()
        if leading[slot] is None:
            leading[slot], bags[slot] = shape, here
        elif leading[slot] != shape:
            return None
        words += (ids.data_ptr(), count, width, start, start_width, here, length, weight)
    return _Call(dtype, words, leading, bags, keep)


def _with_gradients(plan: _Plan, call: _Call, slot_grads: OptionalTensors) -> bytes:
    """The finished words of a backward call. Raises ValueError for a gradient that does not fit its slot."""
    words = call.words
    for grad, leading, bags, width in zip(slot_grads, call.leading, call.bags, plan.spec.slots):
        if grad is None or leading is None:
            words += (0, 0)
            continue
        if grad.numel() != bags * width or grad.shape[-1] != width:
            raise ValueError(f"a gradient of shape {list(grad.shape)} does not fit an output of shape {[*leading, width]}")
        if grad.dtype is not call.dtype:
            grad = grad.to(call.dtype)
            call.keep.append(grad)
        stride = width
        if not grad.is_contiguous():
            if grad.dim() == 2 and grad.stride(1) == 1:
                stride = grad.stride(0)
            else:
                grad = grad.contiguous()
                call.keep.append(grad)
        words += (grad.data_ptr() if bags else 0, stride)
    return plan.pack(*words, *(0,) * (3 * len(plan.spec.extras)))


def _refused(result: int, spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], offsets: OptionalTensors, weights: OptionalTensors) -> bool:
    """Raise what went wrong; True where only the reference can do this call."""
    if result == _UNSUPPORTED:
        return True
    if result == _NO_MEMORY:
        raise MemoryError("the embedding kernels could not allocate their workspace")
    reference.check_inputs(spec, tables, indices, offsets, weights)
    raise RuntimeError("the C++ embedding kernels refused inputs that the reference accepts; were they changed by another thread?")


def forward(
    spec: GroupSpec,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    extras: Sequence[Tensor],
) -> list[Tensor]:
    """See :func:`reference.forward`."""
    plan = _plan(spec)
    call = _describe_call(plan, tables, indices, offsets, sample_weights)
    if call is None:
        return reference.forward(spec, tables, indices, offsets, sample_weights, extras)
    words, dtype, extra_words = call.words, call.dtype, []
    for extra, value in zip(spec.extras, extras):
        shape = value.shape
        if call.leading[extra.slot] is None:
            call.leading[extra.slot], call.bags[extra.slot] = shape[:-1], shape[:-1].numel()
        if shape[-1] != extra.width or shape[:-1] != call.leading[extra.slot] or not value.is_cpu:
            return reference.forward(spec, tables, indices, offsets, sample_weights, extras)
        stride = extra.width
        if value.dtype is not dtype or not value.is_contiguous():
            if value.dtype is dtype and value.dim() == 2 and value.stride(1) == 1:
                stride = value.stride(0)
            else:
                value = value.detach().to(dtype).contiguous()
                call.keep.append(value)
        extra_words += (value.data_ptr(), stride, call.bags[extra.slot])
    out = []
    for whole, leading, width in zip(plan.whole, call.leading, spec.slots):
        shape = (0, width) if leading is None else (*leading, width)
        slot = buffers.empty(shape, dtype) if whole else torch.zeros(shape, dtype=dtype)
        out.append(slot)
        words += (slot.data_ptr(), width)
    result = _lib.tw_forward(plan.pointer, plan.pack(*words, *extra_words))  # type: ignore[union-attr]
    if result and _refused(result, spec, tables, indices, offsets, sample_weights):
        return reference.forward(spec, tables, indices, offsets, sample_weights, extras)
    return out


def sparse_gradients(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    wanted: Sequence[bool],
) -> list[tuple[Tensor, Tensor] | None]:
    """See :func:`reference.sparse_gradients`. The result is the same bits for any number of threads."""
    gradients = _gradients(spec, slot_grads, tables, indices, offsets, sample_weights, wanted, dense=False)
    if gradients is None:
        return reference.sparse_gradients(spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    return gradients


def dense_gradients(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """See :func:`reference.dense_gradients`."""
    gradients = _gradients(spec, slot_grads, tables, indices, offsets, sample_weights, wanted, dense=True)
    if gradients is None:
        return reference.dense_gradients(spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    return [None if pair is None else pair[1] for pair in gradients]


def _gradients(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    wanted: Sequence[bool],
    dense: bool,
) -> list | None:
    """(rows, values) per wanted table, where ``dense`` values are full-size and rows empty; None: ask the reference."""
    plan = _plan(spec)
    call = _describe_call(plan, tables, indices, offsets, sample_weights)
    if call is None or _lib is None:
        return None
    words = _with_gradients(plan, call, slot_grads)
    counts = (ctypes.c_int64 * len(tables))()
    handle = ctypes.c_void_p()
    result = _lib.tw_gradients_begin(plan.pointer, words, plan.pack_tables(*wanted), ctypes.addressof(counts), ctypes.addressof(handle))
    if result and _refused(result, spec, tables, indices, offsets, sample_weights):
        return None
    try:
        gradients: list[tuple[Tensor, Tensor] | None] = []
        row_pointers, value_pointers = [0] * len(tables), [0] * len(tables)
        for t, (want, table, count) in enumerate(zip(wanted, spec.tables, counts)):
            if not want:
                gradients.append(None)
                continue
            rows = torch.empty(0 if dense else count, dtype=torch.int64)
            values = torch.zeros((table.rows, table.dim), dtype=call.dtype) if dense else buffers.empty((count, table.dim), call.dtype)
            gradients.append((rows, values))
            row_pointers[t] = 0 if dense else rows.data_ptr()
            value_pointers[t] = values.data_ptr()
    except BaseException:
        _lib.tw_gradients_drop(handle)
        raise
    _lib.tw_gradients_fill(plan.pointer, words, handle, plan.pack_tables(*row_pointers), plan.pack_tables(*value_pointers), int(dense))
    return gradients


def sample_weight_gradients(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """See :func:`reference.sample_weight_gradients`."""
    plan = _plan(spec)
    call = _describe_call(plan, tables, indices, offsets, sample_weights)
    if call is None or _lib is None:
        return reference.sample_weight_gradients(spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    words = _with_gradients(plan, call, slot_grads)
    out = [
        torch.zeros_like(weights, dtype=call.dtype, memory_format=torch.contiguous_format) if want and weights is not None else None
        for weights, want in zip(sample_weights, wanted)
    ]
    pointers = struct.pack(f"={len(out)}q", *(0 if o is None else o.data_ptr() for o in out))
    result = _lib.tw_sample_weight_gradients(plan.pointer, words, pointers)
    if result and _refused(result, spec, tables, indices, offsets, sample_weights):
        return reference.sample_weight_gradients(spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    return [None if o is None or w is None else o.to(w.dtype) for o, w in zip(out, sample_weights)]


def update(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    updates: Sequence[TableUpdate | None],
) -> None:
    """See :func:`reference.update`. No gradient is ever stored; the result is the same bits for any number of threads."""
    plan = _plan(spec)
    call = _describe_call(plan, tables, indices, offsets, sample_weights)
    rules = _rules(tables, updates)
    if call is None or rules is None or _lib is None:
        return reference.update(spec, slot_grads, tables, indices, offsets, sample_weights, updates)
    words = _with_gradients(plan, call, slot_grads)
    result = _lib.tw_update(plan.pointer, words, plan.pack_tables(*[u is not None for u in updates]), rules)
    if result and _refused(result, spec, tables, indices, offsets, sample_weights):
        reference.update(spec, slot_grads, tables, indices, offsets, sample_weights, updates)


def update_from_sparse(
    tables: Sequence[Tensor], rows: OptionalTensors, values: OptionalTensors, updates: Sequence[TableUpdate | None]
) -> None:
    """See :func:`reference.update_from_sparse`."""
    packed = _sparse_words(tables, rows, values, updates)
    if packed is None or _lib is None:
        return reference.update_from_sparse(tables, rows, values, updates)
    words, used, keep = packed
    rules = _rules([tables[t] for t in used], [updates[t] for t in used])
    if rules is None:
        return reference.update_from_sparse(tables, rows, values, updates)
    if not used:
        return
    code = _DTYPES[tables[used[0]].dtype]
    result = _lib.tw_update_from_sparse(code, torch.get_num_threads(), len(used), struct.pack(f"={len(words)}q", *words), rules)
    del keep
    if result == _NO_MEMORY:
        raise MemoryError("the embedding kernels could not allocate their workspace")
    if result:
        reference.check_sparse(tables, rows, values, updates)
        raise RuntimeError("the C++ embedding kernels refused gradients that the reference accepts")


def _sparse_words(
    tables: Sequence[Tensor], rows: OptionalTensors, values: OptionalTensors, updates: Sequence[TableUpdate | None]
) -> tuple[list[int], list[int], list[Tensor]] | None:
    """The SparseArgs of all tables that take part, their places, and what must stay alive; None: ask the reference."""
    words: list[int] = []
    used: list[int] = []
    keep: list[Tensor] = []
    for t, (table, row, value, rule) in enumerate(zip(tables, rows, values, updates)):
        if row is None or value is None or rule is None:
            continue
        if used and table.dtype is not tables[used[0]].dtype:
            return None
        if table.dtype not in _DTYPES or not (table.is_cpu and row.is_cpu and value.is_cpu) or row.dtype is not torch.int64 or table.dim() != 2:
            return None
        height, dim = table.shape
        if value.shape != (row.numel(), dim):
            return None
        stride = dim
        if not table.is_contiguous():
            if dim > 1 and table.stride(1) != 1:
                return None
            stride = table.stride(0)
        if not row.is_contiguous() or not value.is_contiguous() or value.dtype is not table.dtype:
            row, value = row.contiguous(), value.to(table.dtype).contiguous()
            keep += (row, value)
        used.append(t)
        words += (row.data_ptr(), value.data_ptr(), dim, row.numel(), dim, height, table.data_ptr(), stride)
    return words, used, keep


def _rules(tables: Sequence[Tensor], updates: Sequence[TableUpdate | None]) -> bytes | None:
    """The UpdateArgs of all tables; None where some state is not laid out as the library needs it."""
    packed = []
    for table, rule in zip(tables, updates):
        if rule is None:
            packed.append(_NO_UPDATE)
            continue
        kind, lr = rule.kind, rule.lr
        state = rule.state
        if kind not in KINDS or len(state) != (0, 1, 1, 2)[KINDS.index(kind)]:
            return None
        size = table.size(0) if kind == "rowwise_adagrad" else table.numel()
        state_dtype = state[0].dtype if state else table.dtype
        full = torch.float64 if table.dtype is torch.float64 else torch.float32
        for s in state:
            if s.dtype is not state_dtype or not s.is_cpu or not s.is_contiguous() or s.numel() != size:
                return None
        if state_dtype is not full and state_dtype not in (table.dtype, torch.float32):
            return None
        if kind == "adam":
            lr *= math.sqrt(1 - rule.beta2**rule.step) / (1 - rule.beta1**rule.step)
        pointers = [s.data_ptr() for s in state] + [0, 0]
        packed.append(
            _UPDATE.pack(
                KINDS.index(kind), _DTYPES[state_dtype], pointers[0], pointers[1],
                lr, rule.eps, 1 - rule.beta1, 1 - rule.beta2, 1 - rule.lr * rule.weight_decay, -1.0 if rule.maximize else 1.0,
            )
        )  # fmt: skip
    return b"".join(packed)
