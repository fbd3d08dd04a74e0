"""Table-batched lookups on CPU in C++ (native/): same functions and meanings as reference.py, which does the work wherever the
library is missing or a call is outside of what it covers (other devices, unusual dtypes or layouts).

The library loads after torch, so both share one OpenMP runtime and ``torch.set_num_threads`` holds for both. It trusts no id or
offset: where it refuses, ``checks.check_inputs`` finds the words, and nothing has been written.
"""

from __future__ import annotations

import ctypes
import importlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..native_library import declare, load
from . import buffers, checks, reference
from .checks import OptionalTensors
from .cpu_words import DTYPES, Call, Plan, describe_call, plan_of, rules_of, sparse_words, with_gradients
from .spec import GroupSpec, decode
from .updates import TableUpdate

_ABI = 8  # tw_abi() of native/driver.cpp
_LEVELS = ("baseline", "AVX2", "AVX-512")  # of tw_level()
_PAIRS, _COALESCED, _DENSE = range(3)  # layouts of gradients() in native/python.cpp
_OK, _BAD_INPUT, _UNSUPPORTED, _NO_MEMORY = range(4)  # enum Result of native/call.h


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not."""
    lib, why_not = load(Path(__file__).parent, "tw_abi", _ABI)
    if lib is None:
        return None, why_not
    word, pointer, text = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
    signatures = {
        "level": (word, [word]),
        "forward": (word, [pointer, text]),
        "update": (word, [pointer, text, text, text]),
        "update_from_sparse": (word, [word, word, word, text, text]),
        "gradients_begin": (word, [pointer, text, text, pointer, pointer]),
        "gradients_fill": (word, [pointer, text, pointer, text, text, word, pointer, pointer]),
        "gradients_squares": (None, [pointer, text, pointer, text]),
        "gradients_step": (None, [pointer, text, pointer, text, text]),
        "gradients_drop": (None, [pointer]),
        "sample_weight_gradients": (word, [pointer, text, text]),
        "probe": (None, [word, pointer, pointer, word, word, word, pointer, word]),
    }
    declare(lib, "tw_", signatures)
    return lib, ""


_lib, _why_not = _load()


def _connect() -> Any:
    """The library as a Python module, which packs regular calls itself (native/python.cpp); None where that cannot be."""
    if _lib is None:
        return None
    try:
        module = importlib.import_module("._native", __package__)
        exchange = torch.Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
    except (ImportError, AttributeError):  # built without Python's headers; a torch that does not publish its tensors
        return None
    makers = torch.empty, torch.zeros, buffers.SMALLEST, torch.sparse_coo_tensor
    return module if module.connect(exchange, torch.Tensor, torch.nn.Parameter, *makers, torch.float32) else None


_direct = _connect()


def available() -> bool:
    """Whether the C++ kernels are there."""
    return _lib is not None


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    if _lib is None:
        return f"pure PyTorch: {_why_not}"
    return f"native {_LEVELS[_lib.tw_level(-1)]}"


def _refused(
    result: int,
    spec: GroupSpec,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    weights: OptionalTensors,
) -> bool:
    """Raise what went wrong; True where only the reference can do this call."""
    if result == _UNSUPPORTED:
        return True
    if result == _NO_MEMORY:
        raise MemoryError("the embedding kernels could not allocate their workspace")
    checks.check_inputs(spec, tables, indices, offsets, weights)
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
    plan = plan_of(spec)
    if _direct is not None:
        slots = _direct.forward(
            plan.reading, torch.get_num_threads(), tables, indices, offsets, sample_weights, extras, spec.slots
        )
        if slots is not None:
            return slots
    call = describe_call(plan, tables, indices, offsets, sample_weights, reads=True)
    if call is None or _lib is None:
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
        slot = buffers.empty(shape, dtype) if whole else torch.zeros(shape, dtype=dtype, device="cpu")
        out.append(slot)
        words += (slot.data_ptr(), width)
    result = _lib.tw_forward(plan.reading, plan.pack(*words, *extra_words))
    if result and _refused(result, spec, tables, indices, offsets, sample_weights):
        return reference.forward(spec, tables, indices, offsets, sample_weights, extras)
    return out


_read: dict[str, Plan] = {}  # by text, of specs that :func:`read_at_once` does


def read_at_once(text: str, tables, indices, offsets, sample_weights) -> list[Tensor] | None:
    """The slots of the spec ``text``, which has no extras, on the shortest way; None: ask :func:`forward`."""
    if _direct is None:
        return None
    plan = _read.get(text)
    if plan is None:
        spec = decode(text)
        if spec.unmade or spec.wide:
            return None
        if len(_read) >= 4096:
            _read.clear()
        plan = _read[text] = plan_of(spec)
    return _direct.forward(plan.reading, torch.get_num_threads(), tables, indices, offsets, sample_weights, (), plan.spec.slots)


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
    args = (spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    gradients = _packed_in_c(*args, _PAIRS)
    if gradients is None:
        gradients = _gradients(*args, dense=False)
    return reference.sparse_gradients(*args) if gradients is None else gradients


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
    args = (spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    gradients = _packed_in_c(*args, _DENSE)
    if gradients is not None:
        return gradients
    gradients = _gradients(*args, dense=True)
    if gradients is None:
        return reference.dense_gradients(*args)
    return [None if pair is None else pair[1] for pair in gradients]


def coalesced_gradients(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    wanted: Sequence[bool],
) -> list[Tensor | None] | None:
    """:func:`sparse_gradients` as sparse tensors; None: nothing was done."""
    return _packed_in_c(spec, slot_grads, tables, indices, offsets, sample_weights, wanted, _COALESCED)


def _packed_in_c(spec, slot_grads, tables, indices, offsets, sample_weights, wanted, layout: int) -> list | None:
    if _direct is None:
        return None
    place, threads = plan_of(spec).pointer, torch.get_num_threads()
    return _direct.gradients(place, threads, slot_grads, tables, indices, offsets, sample_weights, spec.slots, wanted, layout)


def count_up(steps: list[Tensor]) -> bool:
    """Add 1 to each of many numbers; False: nothing was done."""
    return _direct is not None and _direct.count_up(steps) is True


class _Sorted:
    """What a call's words point to, and the distinct rows of each table in the order of their numbers: gone with this object."""

    def __init__(self, plan: Plan, call: Call, words: bytes, handle: ctypes.c_void_p, counts: list[int], kept: object) -> None:
        self.plan, self.call, self.words, self.handle, self.counts, self.kept = plan, call, words, handle, counts, kept

    def __del__(self) -> None:
        if _lib is not None:
            _lib.tw_gradients_drop(self.handle)


def _sort(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    wanted: Sequence[bool],
) -> _Sorted | None:
    """The ids of the wanted tables, sorted; None: ask the reference."""
    plan = plan_of(spec)
    call = describe_call(plan, tables, indices, offsets, sample_weights)
    if call is None or _lib is None:
        return None
    words = with_gradients(plan, call, slot_grads)
    counts = (ctypes.c_int64 * len(tables))()
    handle = ctypes.c_void_p()
    flags = plan.pack_tables(*wanted)
    result = _lib.tw_gradients_begin(plan.pointer, words, flags, ctypes.addressof(counts), ctypes.addressof(handle))
    if result and _refused(result, spec, tables, indices, offsets, sample_weights):
        return None
    return _Sorted(plan, call, words, handle, list(counts), (slot_grads, tables, indices, offsets, sample_weights))


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
    begun = _sort(spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    if begun is None or _lib is None:
        return None
    plan, call = begun.plan, begun.call
    gradients: list[tuple[Tensor, Tensor] | None] = []
    row_pointers, value_pointers = [0] * len(tables), [0] * len(tables)
    for t, (want, table, count) in enumerate(zip(wanted, spec.tables, begun.counts)):
        if not want:
            gradients.append(None)
            continue
        rows = torch.empty(0 if dense else count, dtype=torch.int64, device="cpu")
        if dense:
            values = torch.zeros((table.rows, table.dim), dtype=call.dtype, device="cpu")
        else:
            values = buffers.empty((count, table.dim), call.dtype)
        gradients.append((rows, values))
        row_pointers[t] = 0 if dense else rows.data_ptr()
        value_pointers[t] = values.data_ptr()
    pointers = plan.pack_tables(*row_pointers), plan.pack_tables(*value_pointers)
    _lib.tw_gradients_fill(plan.pointer, begun.words, begun.handle, *pointers, int(dense), None, None)
    return gradients


class TwoPasses:
    """Rowwise AdaGrad where other ranks hold other columns of the rows, in two passes over the gradients, which are summed in each: sums
    that were stored would have to come from memory again. ``squares``: for each table with an update the squared sum of each distinct row
    ``[rows touched]``, ascending by row, float32 (float64 for float64 tables); :meth:`step` takes the means over all columns."""

    def __init__(self, begun: _Sorted, updates: Sequence[TableUpdate | None], rules: bytes) -> None:
        self._begun, self._rules, self._kept = begun, rules, updates
        dtype = torch.float64 if begun.call.dtype is torch.float64 else torch.float32
        counts = [0 if u is None else count for u, count in zip(updates, begun.counts)]
        parts = torch.empty(sum(counts), dtype=dtype, device="cpu").split(counts)
        self.squares: list[Tensor | None] = [None if u is None else part for u, part in zip(updates, parts)]
        self._run("tw_gradients_squares", self.squares)

    def _run(self, name: str, each: Sequence[Tensor | None], *more: bytes) -> None:
        begun = self._begun
        pointers = begun.plan.pack_tables(*(0 if one is None else one.data_ptr() for one in each))
        getattr(_lib, name)(begun.plan.pointer, begun.words, begun.handle, *more, pointers)

    def step(self, means: Sequence[Tensor | None]) -> None:
        """Update the tables, once; ``means``: contiguous, of the shapes and dtype of ``squares``."""
        self._run("tw_gradients_step", means, self._rules)


def two_passes(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    updates: Sequence[TableUpdate | None],
) -> TwoPasses | None:
    """The first pass for all tables with an update, which is rowwise AdaGrad; None: nothing was done, ask :func:`sparse_gradients`."""
    rules = rules_of(tables, updates)
    wanted = [u is not None for u in updates]
    begun = None if rules is None else _sort(spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    return None if begun is None or rules is None else TwoPasses(begun, updates, rules)


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
    plan = plan_of(spec)
    call = describe_call(plan, tables, indices, offsets, sample_weights)
    if call is None or _lib is None:
        return reference.sample_weight_gradients(spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    words = with_gradients(plan, call, slot_grads)
    out = [
        torch.zeros_like(weights, dtype=call.dtype, memory_format=torch.contiguous_format) if want and weights is not None else None
        for weights, want in zip(sample_weights, wanted)
    ]
    pointers = struct.pack(f"={len(out)}q", *(0 if o is None else o.data_ptr() for o in out))
    result = _lib.tw_sample_weight_gradients(plan.reading, words, pointers)
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
    plan = plan_of(spec)
    if _direct is not None:
        threads = torch.get_num_threads()
        if _direct.update(plan.pointer, threads, slot_grads, tables, indices, offsets, sample_weights, spec.slots, updates):
            return
    rules = rules_of(tables, updates)
    call = describe_call(plan, tables, indices, offsets, sample_weights)
    if call is None or rules is None or _lib is None:
        return reference.update(spec, slot_grads, tables, indices, offsets, sample_weights, updates)
    words = with_gradients(plan, call, slot_grads)
    result = _lib.tw_update(plan.pointer, words, plan.pack_tables(*[u is not None for u in updates]), rules)
    if result and _refused(result, spec, tables, indices, offsets, sample_weights):
        reference.update(spec, slot_grads, tables, indices, offsets, sample_weights, updates)


def update_from_sparse(
    tables: Sequence[Tensor], rows: OptionalTensors, values: OptionalTensors, updates: Sequence[TableUpdate | None]
) -> None:
    """See :func:`reference.update_from_sparse`."""
    packed = sparse_words(tables, rows, values, updates)
    if packed is None or _lib is None:
        return reference.update_from_sparse(tables, rows, values, updates)
    words, used, keep = packed
    rules = rules_of([tables[t] for t in used], [updates[t] for t in used])
    if rules is None:
        return reference.update_from_sparse(tables, rows, values, updates)
    if not used:
        return
    code = DTYPES[tables[used[0]].dtype]
    result = _lib.tw_update_from_sparse(code, torch.get_num_threads(), len(used), struct.pack(f"={len(words)}q", *words), rules)
    del keep
    if result == _NO_MEMORY:
        raise MemoryError("the embedding kernels could not allocate their workspace")
    if result:
        checks.check_sparse(tables, rows, values, updates)
        raise RuntimeError("the C++ embedding kernels refused gradients that the reference accepts")


def update_from_gradients(tables: list[Tensor], gradients: list[Tensor], updates: list[TableUpdate]) -> bool:
    """:func:`update_from_sparse` for coalesced sparse tensors, without taking them apart; False: nothing was done."""
    return _direct is not None and _direct.update_from_gradients(torch.get_num_threads(), tables, gradients, updates) is True
