"""The words that the C++ kernels read: specs, calls, gradients and update rules packed as native/abi.h lays them out.

Words that depend on the spec alone are made once per spec. Words with pointers are packed anew at every call: a cached pointer
would outlive ``load_state_dict(assign=True)`` or ``.to()``. Packing refuses with None what the kernels do not cover; the
reference then does the call, or says what is wrong with it.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..codecs.op import row_bytes
from .checks import OptionalTensors
from .spec import GroupSpec
from .updates import KINDS, TableUpdate

CODED = 4  # int8 rows, which are only read
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
POOLINGS = {"none": 0, "sum": 1, "mean": 2}
_UPDATE = struct.Struct("=qqQQ6d")
_NO_UPDATE = _UPDATE.pack(-1, 0, 0, 0, *(0.0,) * 6)


class Plan:
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
        reading = list(words)
        for look, place in zip(spec.lookups, following):
            wrap = spec.tables[look.table].rows if look.wrap_negative else 0
            for padding, out in ((look.padding_idx, words), (look.left_out, reading)):
                out += (
                    look.table,
                    look.slot,
                    look.column,
                    POOLINGS[look.pooling],
                    -1 if padding is None else padding,
                    int(look.include_last_offset),
                    wrap,
                    place,
                )
        for e in spec.extras:
            words += (e.slot, e.column, e.width)
            reading += (e.slot, e.column, e.width)
        self._words = [(ctypes.c_int64 * len(w))(*w) for w in (words, reading)]  # kept alive for the pointers
        # Which rows are trained, for gradients and updates; and which are read, for the forward and the gradients of weights.
        self.pointer, self.reading = map(ctypes.addressof, self._words)
        self.tables = [(t.rows * t.dim, t.dim, t.rows) for t in spec.tables]
        self.lookups = [(k.pooling == "none", k.slot, int(k.include_last_offset), k.pooling == "sum") for k in spec.lookups]
        count = 2 + 2 * len(spec.tables) + 8 * len(spec.lookups) + 2 * len(spec.slots) + 3 * len(spec.extras)
        self.pack = struct.Struct(f"={count}q").pack
        self.pack_tables = struct.Struct(f"={len(spec.tables)}q").pack
        written = [0] * len(spec.slots)
        for look in spec.lookups:
            written[look.slot] += spec.tables[look.table].dim
        for e in spec.extras:
            written[e.slot] += e.width
        self.whole = [w == width for w, width in zip(written, spec.slots)]  # else columns nobody writes must be zero


_plans: dict[int, Plan] = {}


def plan_of(spec: GroupSpec) -> Plan:
    # By identity: hashing a spec of 26 tables takes as long as the whole call. The plan holds its spec, so no id is reused.
    plan = _plans.get(id(spec))
    if plan is None:
        if len(_plans) >= 4096:
            _plans.clear()
        plan = _plans[id(spec)] = Plan(spec)
    return plan


class Call:
    """The words of one call for tables and lookups, and the shapes of its slots. ``keep`` holds contiguous copies alive."""

    __slots__ = ("dtype", "words", "leading", "bags", "keep")

    def __init__(self, dtype: torch.dtype, words: list[int], leading: list, bags: list[int], keep: list[Tensor]) -> None:
        self.dtype, self.words, self.leading, self.bags, self.keep = dtype, words, leading, bags, keep


def describe_call(
    plan: Plan, tables: Sequence[Tensor], indices: Sequence[Tensor], offsets: OptionalTensors, sample_weights: OptionalTensors, reads: bool = False
) -> Call | None:
    """Pack tables and lookups; ``reads``: tables are only read, and may have int8 rows. None where the library cannot take the call; then the reference does it, or says what is wrong."""
    if not tables:
        return None
    stored = dtype = tables[0].dtype
    code, more = DTYPES.get(dtype), 0
    if reads and stored is torch.uint8:
        code, dtype, more = CODED, torch.float32, row_bytes("int8", 1) - 1
    if code is None:
        return None
    keep: list[Tensor] = []
    words = [code, torch.get_num_threads()]
    for table, (size, stride, rows) in zip(tables, plan.tables):
        if table.dtype is not stored or not table.is_cpu:
            return None
        size, stride = size + more * rows, stride + more
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
    return Call(dtype, words, leading, bags, keep)


def with_gradients(plan: Plan, call: Call, slot_grads: OptionalTensors) -> bytes:
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


def sparse_words(
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
        if not (table.is_cpu and row.is_cpu and value.is_cpu) or table.dtype not in DTYPES or table.dim() != 2:
            return None
        if row.dtype is not torch.int64:
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


def rules_of(tables: Sequence[Tensor], updates: Sequence[TableUpdate | None]) -> bytes | None:
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
        if state_dtype is not full and state_dtype is not table.dtype:
            return None
        if kind == "adam":
            lr *= math.sqrt(1 - rule.beta2**rule.step) / (1 - rule.beta1**rule.step)
        pointers = [s.data_ptr() for s in state] + [0, 0]
        packed.append(
            _UPDATE.pack(
                KINDS.index(kind), DTYPES[state_dtype], pointers[0], pointers[1],
                lr, rule.eps, 1 - rule.beta1, 1 - rule.beta2, 1 - rule.lr * rule.weight_decay, -1.0 if rule.maximize else 1.0,
            )
        )  # fmt: skip
    return b"".join(packed)
