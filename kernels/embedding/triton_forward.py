"""The forward kernel: all lookups of a group, and its dense extras, written straight into the slots by one launch.

A program sums a tile of bags: row r of the tile is a bag, and each step adds one more row of the table to every bag. So many
independent rows are in flight per step, loads are 16 bytes wide, nothing is exchanged between threads, and a plain embedding
is the case of bags of one. A long bag would leave the rest of the tile idle: it gets the tile for itself afterwards, row r
summing every ROWS-th of its ids.

Sources: fbgemm_gpu's table-batched forward and cuEmbed for keeping several rows in flight; the tiling is ours.
"""

# Kernel bodies are Triton's language, which pyright reads as Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    BAGS,
    DIM,
    IDS,
    KIND,
    LONG,
    LOOKUP_FIELDS,
    MEAN,
    NOTHING,
    NUMBER,
    OUT,
    OUT_STRIDE,
    PADDING,
    ROWS,
    STRIDE,
    TABLE,
    WEIGHTS,
    WRAP,
    aligned,
    bag_ranges,
    find_entry,
    read_rows,
)  # fmt: skip


@triton.jit
def _scale_and_offset(tail, use, VEC: tl.constexpr):
    """The float32 numbers (each [R]) at and behind bytes ``tail`` (uint8 pointers [R]), 0 where not ``use``; VEC: their alignment."""
    if VEC % 4 == 0:
        words = tail.to(tl.pointer_type(tl.float32))
        return tl.load(words, mask=use, other=0.0), tl.load(words + 1, mask=use, other=0.0)
    byte = tl.arange(0, 4)
    held = use[:, None] & (byte >= 0)[None, :]
    shift = (byte * 8)[None, :]
    places = tail[:, None] + byte[None, :]
    scale = tl.sum(tl.load(places, mask=held, other=0).to(tl.int32) << shift, 1).to(tl.float32, bitcast=True)
    offset = tl.sum(tl.load(places + 4, mask=held, other=0).to(tl.int32) << shift, 1).to(tl.float32, bitcast=True)
    return scale, offset


@triton.jit
def _sum_rows(
    entry, first, count, step, cols, R: tl.constexpr, D: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr,
    TABLE_T: tl.constexpr, ID_T: tl.constexpr, WEIGHT_T: tl.constexpr,
):  # fmt: skip
    """Per tile row r, the sum of the table rows whose ids are at ``first[r] + i * step`` for ``i < count[r]``.

    Returns (float32 [R, D], how many rows went into it int32 [R], the first position with a bad id int32 [R])."""
    ids = tl.load(entry + IDS).to(tl.pointer_type(ID_T))
    table = aligned(tl.load(entry + TABLE), TABLE_T, VEC)
    stride = tl.multiple_of(tl.load(entry + STRIDE), VEC)
    dim = tl.multiple_of(tl.load(entry + DIM), VEC)
    rows = tl.load(entry + ROWS)
    wrap = tl.load(entry + WRAP)
    padding = tl.load(entry + PADDING)
    weights = tl.load(entry + WEIGHTS)
    total = tl.zeros([R, D], tl.float32)
    kept = tl.zeros([R], tl.int32)
    bad_at = tl.full([R], NOTHING, tl.int32)
    steps = tl.max(count) if UNROLL > 1 else 1
    for i in range(0, steps, UNROLL):
        for u in tl.static_range(UNROLL):
            live = i + u < count
            at = first + (i + u) * step
            row, good = read_rows(ids, rows, wrap, at, live, ID_T)
            bad_at = tl.minimum(bad_at, tl.where(live & (good == 0), at, NOTHING))
            use = live & good & (row != padding)
            place = table + row.to(tl.int64) * stride
            value = tl.load(place[:, None] + cols[None, :], mask=use[:, None] & (cols < dim)[None, :], other=0).to(tl.float32)
            if TABLE_T == tl.uint8:
                scale, offset = _scale_and_offset(place + dim, use, VEC)
                value = value * scale[:, None] + offset[:, None]
            if WEIGHT_T is not None:
                pointer = weights.to(tl.pointer_type(WEIGHT_T)) + at
                value *= tl.load(pointer, mask=use & (weights != 0), other=1.0).to(tl.float32)[:, None]
            total += value
            kept += use.to(tl.int32)
    return total, kept, bad_at


@triton.jit
def _report(place, position):
    """Lower the number at ``place`` to the smallest of ``position``: integer and commutative, so the schedule does not show."""
    smallest = tl.min(position)
    if smallest != NOTHING:
        tl.atomic_min(place, smallest, sem="relaxed")


@triton.jit
def _forward_tile(
    entry, tile, found, N_LOOKUPS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, TABLE_VEC: tl.constexpr, OUT_VEC: tl.constexpr,
    UNROLL: tl.constexpr, TABLE_T: tl.constexpr, OUT_T: tl.constexpr, ID_T: tl.constexpr, OFFSET_T: tl.constexpr, WEIGHT_T: tl.constexpr,
):  # fmt: skip
    """Write bags ``tile * R`` to ``tile * R + R`` of one lookup; UNROLL 0: copy these rows of a dense extra."""
    number = tl.load(entry + NUMBER)
    bags = tl.load(entry + BAGS)
    lane = tl.arange(0, R)
    cols = tl.arange(0, D)
    bag = tile * R + lane
    live = bag < bags
    if UNROLL == 0:
        source = aligned(tl.load(entry + TABLE), OUT_T, TABLE_VEC)
        stride = tl.multiple_of(tl.load(entry + STRIDE), TABLE_VEC)
        width = tl.multiple_of(tl.load(entry + DIM), TABLE_VEC)
        total = tl.load(
            source + (bag.to(tl.int64) * stride)[:, None] + cols[None, :], mask=live[:, None] & (cols < width)[None, :], other=0.0
        ).to(tl.float32)
    else:
        first, count, wrong = bag_ranges(entry, bag, live, OFFSET_T)
        _report(found + N_LOOKUPS + number, tl.where(wrong, bag, NOTHING))
        alone = (count > LONG) & (UNROLL > 1)
        total, kept, bad_at = _sum_rows(
            entry, first, tl.where(alone, 0, count), 1, cols, R, D, TABLE_VEC, UNROLL, TABLE_T, ID_T, WEIGHT_T
        )
        _report(found + number, bad_at)
        live = live & (alone == 0)
        if UNROLL > 1:  # noqa: SIM102 - `and` would join a compile-time with a run-time condition
            if tl.load(entry + MEAN) != 0:
                total = total / tl.maximum(kept, 1).to(tl.float32)[:, None]
    out = aligned(tl.load(entry + OUT), OUT_T, OUT_VEC)
    out_stride = tl.multiple_of(tl.load(entry + OUT_STRIDE), OUT_VEC)
    dim = tl.multiple_of(tl.load(entry + DIM), OUT_VEC)
    tl.store(
        out + (bag.to(tl.int64) * out_stride)[:, None] + cols[None, :],
        total.to(OUT_T),
        mask=live[:, None] & (cols < dim)[None, :],
    )
    if UNROLL > 1:  # noqa: SIM102
        if tl.max(count) > LONG:
            for r in range(R):
                n = tl.sum(tl.where(lane == r, count, 0))
                if n > LONG:
                    begin = tl.sum(tl.where(lane == r, first, 0))
                    parts, kept, bad_at = _sum_rows(
                        entry, begin + lane, (n - lane + R - 1) // R, R, cols, R, D, TABLE_VEC, UNROLL, TABLE_T, ID_T, WEIGHT_T
                    )
                    _report(found + number, bad_at)
                    row = tl.sum(parts, 0)
                    if tl.load(entry + MEAN) != 0:
                        row = row / tl.maximum(tl.sum(kept), 1).to(tl.float32)
                    tl.store(out + (tile * R + r).to(tl.int64) * out_stride + cols, row.to(OUT_T), mask=cols < dim)


@triton.jit
def forward_kernel(
    entries, found, COUNT: tl.constexpr, N_LOOKUPS: tl.constexpr, KINDS: tl.constexpr, TABLE_T: tl.constexpr, OUT_T: tl.constexpr,
    ID_T: tl.constexpr, OFFSET_T: tl.constexpr, WEIGHT_T: tl.constexpr,
):  # fmt: skip
    """Grid: one program per tile of bags. Slots and extras are OUT_T: TABLE_T, or float32 over int8 rows (uint8). ``entries``: int64 [COUNT, LOOKUP_FIELDS]. ``found``: int32 [2, N_LOOKUPS], lowered to
    the first position with a bad id (row 0) and the first bag with bad offsets (row 1) of each lookup.

    KINDS: (tile rows, tile width, alignment of table and slot in elements, ids read per step: 0 extra, 1 plain, more: bags)."""
    program = tl.program_id(0)
    entry = find_entry(entries, 0, LOOKUP_FIELDS, COUNT, program)
    tile = (program - tl.load(entry)).to(tl.int32)
    kind = tl.load(entry + KIND)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            _forward_tile(
                entry, tile, found, N_LOOKUPS, KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4],
                TABLE_T, OUT_T, ID_T, OFFSET_T, WEIGHT_T,
            )  # fmt: skip


@triton.jit
def _weight_grads_tile(
    entry, tile, R: tl.constexpr, D: tl.constexpr, TABLE_VEC: tl.constexpr, GRAD_VEC: tl.constexpr, UNROLL: tl.constexpr,
    TABLE_T: tl.constexpr, GRAD_T: tl.constexpr, ID_T: tl.constexpr, OFFSET_T: tl.constexpr, WEIGHT_T: tl.constexpr,
):  # fmt: skip
    """The sample weight gradients of bags ``tile * R`` to ``tile * R + R`` of one lookup."""
    cols = tl.arange(0, D)
    bag = tile * R + tl.arange(0, R)
    live_bag = bag < tl.load(entry + BAGS)
    first, count, _ = bag_ranges(entry, bag, live_bag, OFFSET_T)
    ids = tl.load(entry + IDS).to(tl.pointer_type(ID_T))
    rows = tl.load(entry + ROWS)
    wrap = tl.load(entry + WRAP)
    padding = tl.load(entry + PADDING)
    result = tl.load(entry + WEIGHTS).to(tl.pointer_type(WEIGHT_T))
    table = aligned(tl.load(entry + TABLE), TABLE_T, TABLE_VEC)
    stride = tl.multiple_of(tl.load(entry + STRIDE), TABLE_VEC)
    dim = tl.multiple_of(tl.load(entry + DIM), TABLE_VEC)
    grads = aligned(tl.load(entry + OUT), GRAD_T, GRAD_VEC)
    grad_stride = tl.multiple_of(tl.load(entry + OUT_STRIDE), GRAD_VEC)
    width = tl.multiple_of(tl.load(entry + DIM), GRAD_VEC)
    grad = tl.load(
        grads + (bag.to(tl.int64) * grad_stride)[:, None] + cols[None, :],
        mask=live_bag[:, None] & (cols < width)[None, :],
        other=0.0,
    ).to(tl.float32)
    for i in range(0, tl.max(count), UNROLL):
        for u in tl.static_range(UNROLL):
            live = i + u < count
            at = first + i + u
            row, good = read_rows(ids, rows, wrap, at, live, ID_T)
            use = live & good & (row != padding)
            value = tl.load(
                table + (row.to(tl.int64) * stride)[:, None] + cols[None, :], mask=use[:, None] & (cols < dim)[None, :], other=0.0
            ).to(tl.float32)
            tl.store(result + at, tl.sum(value * grad, 1).to(WEIGHT_T), mask=use)


@triton.jit
def weight_grads_kernel(
    entries, COUNT: tl.constexpr, KINDS: tl.constexpr, TABLE_T: tl.constexpr, GRAD_T: tl.constexpr, ID_T: tl.constexpr,
    OFFSET_T: tl.constexpr, WEIGHT_T: tl.constexpr,
):  # fmt: skip
    """Grid: one program per tile of bags. Writes the product of each id's row with its bag's gradient (``out`` of the entry) at
    the id's position in ``weights`` of the entry, which is zero before and stays so for padding and bad ids."""
    program = tl.program_id(0)
    entry = find_entry(entries, 0, LOOKUP_FIELDS, COUNT, program)
    tile = (program - tl.load(entry)).to(tl.int32)
    kind = tl.load(entry + KIND)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            _weight_grads_tile(
                entry, tile, KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4], TABLE_T, GRAD_T, ID_T,
                OFFSET_T, WEIGHT_T,
            )  # fmt: skip
