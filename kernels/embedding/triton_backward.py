"""The backward kernels: sum the gradient of every touched row and store it, or update the row with it at once.

``reduce_kernel`` sums pieces (see ``triton_keys.py``) as the forward sums bags: a tile of pieces, one more read of each per step;
none is so long that it needs the tile for itself.
A piece that is a whole run is finished on the spot. The others leave their sum at a place fixed by their chunk, two per chunk:
the piece that begins with the chunk, and the last one. ``spanning_kernel`` adds these up, run by run, in chunk order, and
finishes those runs. No atomics, so the result depends on the ids alone.

To *finish* a row is to write its gradient (KIND "write") or to update the row and the optimizer's state: see ``updates.py``. ROUNDED: rows
are float16 or bfloat16 and rounded stochastically, by a hash of row, column and seed: see ``rounding.py``.
"""

# Kernel bodies are Triton's language, which pyright reads as Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_common import aligned, find_entry
from .triton_keys import CHUNK


class RowEntry(NamedTuple):
    """One table of a launch. All int64; pointers are addresses, 0 = none; strides count elements; floats as float32 bits."""

    program: int  # the first program of this table in reduce_kernel and update_kernel
    chunk_program: int  # ... in spanning_kernel
    kind: int
    chunk: int  # the first chunk of the table's segment
    chunk_end: int
    key: int  # of row 0
    rows: int
    dim: int
    out: int  # the table, or where gradients are written
    out_stride: int
    row_numbers: int  # sparse gradients: where row numbers are written; update_kernel: where they are read
    values: int = 0  # update_kernel: gradients, one row for each row number
    values_stride: int = 0
    given: int = 0  # update_kernel: how many
    state0: int = 0
    state0_stride: int = 0
    state1: int = 0
    state1_stride: int = 0
    rate: int = 0  # of this step
    eps: int = 0
    take1: int = 0  # 1 - beta1
    take2: int = 0  # 1 - beta2
    decay: int = 0  # factor of the row before the update
    sign: int = 0  # of the gradient
    seed: int = 0  # of stochastic rounding: 32 bits


ROW_FIELDS = tl.constexpr(len(RowEntry._fields))
_at = {name: tl.constexpr(i) for i, name in enumerate(RowEntry._fields)}
CHUNK_PROGRAM, KIND_OF, FIRST_CHUNK, END_CHUNK = (_at[f] for f in ("chunk_program", "kind", "chunk", "chunk_end"))
KEY_OF, ROWS_OF, DIM_OF, TARGET, TARGET_STRIDE = (_at[f] for f in ("key", "rows", "dim", "out", "out_stride"))
ROW_NUMBERS, VALUES, VALUES_STRIDE, N_VALUES = (_at[f] for f in ("row_numbers", "values", "values_stride", "given"))
STATE0, STATE0_STRIDE, STATE1, STATE1_STRIDE = (_at[f] for f in ("state0", "state0_stride", "state1", "state1_stride"))
RATE, EPS, TAKE1, TAKE2, DECAY, SIGN, SEED = (_at[f] for f in ("rate", "eps", "take1", "take2", "decay", "sign", "seed"))


@triton.jit
def _float(entry, FIELD: tl.constexpr):
    return tl.load(entry + FIELD).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _mix(h):
    h ^= h >> 16
    h *= 0x7FEB352D
    h ^= h >> 15
    h *= 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _rounded(value, row, cols, seed, TARGET_T: tl.constexpr):
    """float32 ``value`` [R, D] of rows ``row`` (int64 [R]) and columns ``cols`` [D], rounded stochastically to float16 or bfloat16, as
    int16 bits: see ``rounding.py``."""
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    row_hash = _mix(low * 0x85EBCA77 + high * 0xC2B2AE3D + seed.to(tl.uint32))
    noise = _mix(row_hash[:, None] ^ (cols.to(tl.uint32) * 0x9E3779B1)[None, :])
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    if TARGET_T == tl.bfloat16:
        code = tl.minimum(size + (noise >> 16), 0x7F7FFFFF) >> 16
        odd = tl.where(size > 0x7F800000, 0x7FC0, 0x7F80).to(tl.uint32)
    else:
        steps = tl.minimum(tl.abs(value) * 16777216.0, 65536.0)  # of 2**-24, below the normal numbers
        whole = steps.to(tl.uint32)
        part = ((steps - whole.to(tl.float32)) * 16777216.0).to(tl.uint32)
        small = whole + ((part + (noise >> 8)) >> 24)
        code = tl.minimum(tl.where(size < 0x38800000, small, ((size + (noise >> 19)) >> 13) - 114688), 0x7BFF)
        odd = tl.where(size > 0x7F800000, 0x7E00, 0x7C00).to(tl.uint32)
    code = tl.where(size < 0x7F800000, code, odd) | ((bits >> 16) & 0x8000)
    return code.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _finish(
    entry, row, place, live, grad, cols, VEC: tl.constexpr, RULE: tl.constexpr, TARGET_T: tl.constexpr, STATE_T: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """Finish rows ``row`` (int64 [R], distinct) with gradients ``grad`` (float32 [R, D]); written ones go to ``place`` (int64 [R])."""
    dim = tl.multiple_of(tl.load(entry + DIM_OF), VEC)
    stride = tl.multiple_of(tl.load(entry + TARGET_STRIDE), VEC)
    target = aligned(tl.load(entry + TARGET), TARGET_T, VEC)
    mask = live[:, None] & (cols < dim)[None, :]
    if RULE == "write":
        tl.store(target + (place * stride)[:, None] + cols[None, :], grad.to(TARGET_T), mask=mask)
        numbers = tl.load(entry + ROW_NUMBERS)
        if numbers != 0:
            tl.store(numbers.to(tl.pointer_type(tl.int64)) + place, row, mask=live)
    else:
        weights = target + (row * stride)[:, None] + cols[None, :]
        weight = tl.load(weights, mask=mask, other=0.0).to(tl.float32) * _float(entry, DECAY)
        grad = grad * _float(entry, SIGN)
        rate = _float(entry, RATE)
        if RULE == "sgd":
            weight -= rate * grad
        elif RULE == "rowwise_adagrad":
            sums = tl.load(entry + STATE0).to(tl.pointer_type(STATE_T)) + row * tl.load(entry + STATE0_STRIDE)
            total = tl.load(sums, mask=live, other=0.0).to(tl.float32) + tl.sum(grad * grad, 1) / dim.to(tl.float32)
            tl.store(sums, total.to(STATE_T), mask=live)
            weight -= tl.div_rn(rate + total * 0, tl.sqrt_rn(total) + _float(entry, EPS))[:, None] * grad
        else:
            stride0 = tl.multiple_of(tl.load(entry + STATE0_STRIDE), VEC)
            state0 = aligned(tl.load(entry + STATE0), STATE_T, VEC) + (row * stride0)[:, None] + cols[None, :]
            first = tl.load(state0, mask=mask, other=0.0).to(tl.float32)
            if RULE == "adagrad":
                first += grad * grad
                weight -= tl.div_rn(rate * grad, tl.sqrt_rn(first) + _float(entry, EPS))
            else:
                stride1 = tl.multiple_of(tl.load(entry + STATE1_STRIDE), VEC)
                state1 = aligned(tl.load(entry + STATE1), STATE_T, VEC) + (row * stride1)[:, None] + cols[None, :]
                second = tl.load(state1, mask=mask, other=0.0).to(tl.float32)
                first += _float(entry, TAKE1) * (grad - first)
                second += _float(entry, TAKE2) * (grad * grad - second)
                weight -= tl.div_rn(rate * first, tl.sqrt_rn(second) + _float(entry, EPS))
                tl.store(state1, second.to(STATE_T), mask=mask)
            tl.store(state0, first.to(STATE_T), mask=mask)
        if ROUNDED:
            made = _rounded(weight, row, cols, tl.load(entry + SEED), TARGET_T)
            tl.store(weights.to(tl.pointer_type(tl.int16), bitcast=True), made, mask=mask)
        else:
            tl.store(weights, weight.to(TARGET_T), mask=mask)


@triton.jit
def _reduce_tile(
    entry, tile, keys, order, sources, scales, before, starts, ranks, partials, total_chunks, pitch,
    R: tl.constexpr, D: tl.constexpr, GRAD_VEC: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr, RULE: tl.constexpr,
    GRAD_T: tl.constexpr, TARGET_T: tl.constexpr, STATE_T: tl.constexpr, SCALED: tl.constexpr, RANKED: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """Sum pieces ``tile * R`` to ``tile * R + R`` of one table; finish those that are whole runs."""
    chunk = tl.load(entry + FIRST_CHUNK)
    chunk_end = tl.load(entry + END_CHUNK)
    begin = chunk.to(tl.int32) * CHUNK
    end = chunk_end.to(tl.int32) * CHUNK
    cols = tl.arange(0, D)
    piece = tl.load(before + chunk) + tile * R + tl.arange(0, R)
    pieces_end = tl.load(before + chunk_end)
    live = piece < pieces_end
    first = tl.load(starts + piece, mask=live, other=0)
    after = tl.load(starts + piece + 1, mask=live & (piece + 1 < pieces_end), other=0)
    after = tl.where(piece + 1 < pieces_end, after, end)
    key = tl.load(keys + first, mask=live, other=0)
    row = key.to(tl.int64) - tl.load(entry + KEY_OF)
    live = live & (row < tl.load(entry + ROWS_OF))  # the last key of a table trains nothing
    goes_back = (first > begin) & (tl.load(keys + first - 1, mask=live & (first > begin), other=-1) == key)
    goes_on = (after < end) & (tl.load(keys + after, mask=live & (after < end), other=-1) == key)
    whole = live & (goes_back == 0) & (goes_on == 0)
    place = row
    if RANKED:
        place = (tl.load(ranks + piece, mask=live, other=0) - tl.load(before + total_chunks + 1 + chunk)).to(tl.int64)
    dim = tl.multiple_of(tl.load(entry + DIM_OF), GRAD_VEC)
    count = tl.where(live, after - first, 0)
    total = tl.zeros([R, D], tl.float32)
    for i in range(0, tl.max(count), UNROLL):
        for u in tl.static_range(UNROLL):
            here = i + u < count
            read = tl.load(order + first + (i + u), mask=here, other=0)
            source = aligned(tl.load(sources + read, mask=here, other=0), GRAD_T, GRAD_VEC)
            grad = tl.load(source[:, None] + cols[None, :], mask=here[:, None] & (cols < dim)[None, :], other=0.0).to(tl.float32)
            if SCALED:
                grad *= tl.load(scales + read, mask=here, other=0.0)[:, None]
            total += grad
    partial = partials + (2 * (first // CHUNK) + (first % CHUNK != 0)).to(tl.int64) * pitch
    tl.store(partial[:, None] + cols[None, :], total, mask=(live & (whole == 0))[:, None] & (cols < dim)[None, :])
    _finish(entry, row, place, whole, total, cols, VEC, RULE, TARGET_T, STATE_T, ROUNDED)


@triton.jit(do_not_specialize=["total_chunks"])
def reduce_kernel(
    entries, keys, order, sources, scales, before, starts, ranks, partials, total_chunks, pitch, COUNT: tl.constexpr,
    KINDS: tl.constexpr, RULE: tl.constexpr, GRAD_T: tl.constexpr, TARGET_T: tl.constexpr, STATE_T: tl.constexpr,
    SCALED: tl.constexpr, RANKED: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Grid: one program per tile of pieces, as many as there can be; those without a piece leave at once.

    ``keys``: sorted; ``order``: where each came from (int64); ``sources``, ``scales``: see keys_kernel; ``before``, ``starts``,
    ``ranks``: see pieces_kernel; ``partials``: float32 [2 * total_chunks, pitch].
    KINDS: (tile rows, tile width, alignment of gradients, alignment of targets and state, reads per step)."""
    program = tl.program_id(0)
    entry = find_entry(entries, 0, ROW_FIELDS, COUNT, program)
    tile = (program - tl.load(entry)).to(tl.int32)
    kind = tl.load(entry + KIND_OF)
    pieces = tl.load(before + tl.load(entry + END_CHUNK)) - tl.load(before + tl.load(entry + FIRST_CHUNK))
    for k in tl.static_range(len(KINDS)):
        if (kind == k) & (tile * KINDS[k][0] < pieces):
            _reduce_tile(
                entry, tile, keys, order, sources, scales, before, starts, ranks, partials, total_chunks, pitch, KINDS[k][0],
                KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4], RULE, GRAD_T, TARGET_T, STATE_T, SCALED, RANKED, ROUNDED,
            )  # fmt: skip


@triton.jit
def _finish_run(
    entry, chunk, keys, before, ranks, partials, total_chunks, pitch, R: tl.constexpr, D: tl.constexpr, VEC: tl.constexpr,
    RULE: tl.constexpr, TARGET_T: tl.constexpr, STATE_T: tl.constexpr, RANKED: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Add up and finish the run that begins in ``chunk`` and goes on after it."""
    key = tl.load(keys + (chunk + 1) * CHUNK - 1)
    row = key.to(tl.int64) - tl.load(entry + KEY_OF)
    place = row
    if RANKED:
        last_piece = tl.load(before + chunk + 1) - 1
        place = (tl.load(ranks + last_piece) - tl.load(before + total_chunks + 1 + tl.load(entry + FIRST_CHUNK))).to(tl.int64)
    last = chunk + 1  # the last chunk that begins with this key; keys are sorted
    high = tl.load(entry + END_CHUNK)
    while high - last > 1:
        middle = (last + high) // 2
        if tl.load(keys + middle * CHUNK) == key:
            last = middle
        else:
            high = middle
    dim = tl.multiple_of(tl.load(entry + DIM_OF), VEC)
    cols = tl.arange(0, D)
    total = tl.zeros([R, D], tl.float32)
    for c in range(chunk + 1, last + 1, R):
        of = c + tl.arange(0, R)
        total += tl.load(
            partials + (2 * of * pitch)[:, None] + cols[None, :], mask=(of <= last)[:, None] & (cols < dim)[None, :], other=0.0
        )
    begins_inside = (tl.load(keys + chunk * CHUNK) != key).to(tl.int64)
    grad = tl.load(partials + (2 * chunk + begins_inside) * pitch + cols, mask=cols < dim, other=0.0) + tl.sum(total, 0)
    one = tl.arange(0, 1)
    _finish(entry, row + one, place + one, one == 0, grad[None, :], cols, VEC, RULE, TARGET_T, STATE_T, ROUNDED)


@triton.jit(do_not_specialize=["total_chunks"])
def spanning_kernel(
    entries, keys, before, ranks, partials, total_chunks, pitch, COUNT: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr,
    TARGET_T: tl.constexpr, STATE_T: tl.constexpr, RANKED: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Grid: one program per chunk. Finishes the run that begins in it and goes on in the next, if there is one."""
    program = tl.program_id(0)
    entry = find_entry(entries, CHUNK_PROGRAM, ROW_FIELDS, COUNT, program)
    start = tl.load(entry + FIRST_CHUNK)
    chunk = start + program - tl.load(entry + CHUNK_PROGRAM)
    kind = tl.load(entry + KIND_OF)
    if chunk + 1 < tl.load(entry + END_CHUNK):
        key = tl.load(keys + (chunk + 1) * CHUNK - 1)
        trains = key.to(tl.int64) < tl.load(entry + KEY_OF) + tl.load(entry + ROWS_OF)
        goes_on = tl.load(keys + (chunk + 1) * CHUNK) == key
        inside = tl.load(keys + chunk * CHUNK) != key
        earlier = tl.load(keys + chunk * CHUNK - 1, mask=chunk > start, other=-1) == key
        if trains & goes_on & (inside | (earlier == 0)):
            for k in tl.static_range(len(KINDS)):
                if kind == k:
                    _finish_run(
                        entry, chunk, keys, before, ranks, partials, total_chunks, pitch, (4 if KINDS[k][1] <= 1024 else 2) * KINDS[k][0], KINDS[k][1],
                        KINDS[k][3], RULE, TARGET_T, STATE_T, RANKED, ROUNDED,
                    )  # fmt: skip


@triton.jit
def _update_tile(
    entry, tile, R: tl.constexpr, D: tl.constexpr, GRAD_VEC: tl.constexpr, VEC: tl.constexpr, RULE: tl.constexpr,
    GRAD_T: tl.constexpr, TARGET_T: tl.constexpr, STATE_T: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    at = (tile * R + tl.arange(0, R)).to(tl.int64)
    cols = tl.arange(0, D)
    live = at < tl.load(entry + N_VALUES)
    row = tl.load(tl.load(entry + ROW_NUMBERS).to(tl.pointer_type(tl.int64)) + at, mask=live, other=-1)
    live = (row >= 0) & (row < tl.load(entry + ROWS_OF))
    dim = tl.multiple_of(tl.load(entry + DIM_OF), GRAD_VEC)
    stride = tl.multiple_of(tl.load(entry + VALUES_STRIDE), GRAD_VEC)
    values = aligned(tl.load(entry + VALUES), GRAD_T, GRAD_VEC) + (at * stride)[:, None] + cols[None, :]
    grad = tl.load(values, mask=live[:, None] & (cols < dim)[None, :], other=0.0).to(tl.float32)
    _finish(entry, row, row, live, grad, cols, VEC, RULE, TARGET_T, STATE_T, ROUNDED)


@triton.jit
def update_kernel(
    entries, COUNT: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr, GRAD_T: tl.constexpr, TARGET_T: tl.constexpr,
    STATE_T: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Grid: one program per tile of rows. The optimizer alone, on distinct rows with given gradients; rows outside the table
    are left out. KINDS as in reduce_kernel."""
    program = tl.program_id(0)
    entry = find_entry(entries, 0, ROW_FIELDS, COUNT, program)
    tile = (program - tl.load(entry)).to(tl.int32)
    kind = tl.load(entry + KIND_OF)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            _update_tile(entry, tile, KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], RULE, GRAD_T, TARGET_T, STATE_T, ROUNDED)
