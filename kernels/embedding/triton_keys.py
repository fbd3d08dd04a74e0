"""From reads to runs: every read of a table gets a key, keys are sorted, and equal keys are cut into pieces to be summed.

A *read* is one id of one lookup. Its key is ``key of the table + row``; reads that train nothing (padding, bad ids, ids in no
bag) get the table's last key, ``key of the table + rows``. Each table owns a segment of the reads whose length the host knows:
its reads, at least one unused read, rounded up to whole chunks of CHUNK; unused reads carry the last key as well. Sorting
by key then leaves every table in its own segment, with what trains nothing at the end.

A *run* is all reads of one row. A *piece* is the part of a run inside one chunk: no piece is longer than CHUNK, so the work for
a hot row spreads over the GPU, and a run of several pieces is summed in the order of its chunks, whatever the schedule.
"""

# Kernel bodies are Triton's language, which pyright reads as Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import (
    BAGS,
    ENDS,
    IDS,
    KEY,
    KIND,
    LOOKUP_FIELDS,
    MEAN,
    N_IDS,
    N_OFFSETS,
    OFFSETS,
    OUT,
    OUT_STRIDE,
    PADDING,
    POSITION,
    ROWS,
    SLOTS,
    WEIGHTS,
    WRAP,
    bag_ranges,
    find_entry,
    read_rows,
)  # fmt: skip

CHUNK = tl.constexpr(64)
CHUNKS_PER_PROGRAM = tl.constexpr(16)
FILL = tl.constexpr(1024)
KEY_TILES = ((1024, 1), (64, 16))  # bags x ids of one step, for plain lookups and for bags


@triton.jit
def _keys_tile(
    entry, tile, keys, sources, scales, R: tl.constexpr, SPAN: tl.constexpr, GRAD_T: tl.constexpr, KEY_T: tl.constexpr,
    ID_T: tl.constexpr, OFFSET_T: tl.constexpr, WEIGHT_T: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Keys, sources and scales of the reads of bags ``tile * R`` to ``tile * R + R``."""
    ids = tl.load(entry + IDS).to(tl.pointer_type(ID_T))
    rows = tl.load(entry + ROWS)
    padding = tl.load(entry + PADDING)
    wrap = tl.load(entry + WRAP)
    base = tl.load(entry + KEY)
    position = tl.load(entry + POSITION)
    bag = tile * R + tl.arange(0, R)
    live = bag < tl.load(entry + BAGS)
    first, count, _ = bag_ranges(entry, bag, live, OFFSET_T)
    steps = tl.max(count) if SPAN > 1 else 1
    factor = tl.full([R], 1.0, tl.float32)
    if SCALED and SPAN > 1:  # noqa: SIM102 - `and` would join compile-time with run-time conditions
        if tl.load(entry + MEAN) != 0:
            kept = tl.zeros([R], tl.int32)
            for i in range(0, steps, SPAN):
                place = i + tl.arange(0, SPAN)
                here = place[None, :] < count[:, None]
                row, good = read_rows(ids, rows, wrap, first[:, None] + place[None, :], here, ID_T)
                kept += tl.sum((here & good & (row != padding)).to(tl.int32), 1)
            factor = 1.0 / tl.maximum(kept, 1).to(tl.float32)
    row_bytes = tl.load(entry + OUT_STRIDE) * (GRAD_T.primitive_bitwidth // 8)
    source = tl.load(entry + OUT) + bag.to(tl.int64) * row_bytes
    for i in range(0, steps, SPAN):
        place = i + tl.arange(0, SPAN)
        here = place[None, :] < count[:, None]
        at = first[:, None] + place[None, :]
        row, good = read_rows(ids, rows, wrap, at, here, ID_T)
        if keys is not None:
            key = base + tl.where(good & (row != padding), row.to(tl.int64), rows)
            tl.store(keys + position + at, key.to(KEY_T), mask=here)
        if sources is not None:
            tl.store(sources + position + at, source[:, None] + at * 0, mask=here)
        if SCALED:
            scale = factor[:, None] + at.to(tl.float32) * 0
            if WEIGHT_T is not None:
                weights = tl.load(entry + WEIGHTS)
                scale *= tl.load(weights.to(tl.pointer_type(WEIGHT_T)) + at, mask=here & (weights != 0), other=1.0).to(tl.float32)
            tl.store(scales + position + at, scale, mask=here)


@triton.jit
def _unused(keys, begin, end, key, KEY_T: tl.constexpr):
    for i in range(begin, end, FILL):
        at = i + tl.arange(0, FILL)
        tl.store(keys + at, (key + at * 0).to(KEY_T), mask=at < end)


@triton.jit
def _unused_keys(entry, keys, KEY_T: tl.constexpr, OFFSET_T: tl.constexpr):
    """The keys of ids before the first bag or after the last, and of what rounds the segment up."""
    n_ids = tl.load(entry + N_IDS)
    position = tl.load(entry + POSITION)
    last_key = tl.load(entry + KEY) + tl.load(entry + ROWS)
    address = tl.load(entry + OFFSETS)
    begin = n_ids * 0
    end = n_ids
    if tl.load(entry + BAGS) == 0:
        end = begin
    elif address != 0:
        offsets = address.to(tl.pointer_type(OFFSET_T))
        begin = tl.load(offsets).to(tl.int64)
        if tl.load(entry + ENDS) != 0:
            end = tl.load(offsets + tl.load(entry + N_OFFSETS) - 1).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), n_ids)
    end = tl.minimum(tl.maximum(end, begin), n_ids)
    _unused(keys, position, position + begin, last_key, KEY_T)
    _unused(keys, position + end, position + tl.load(entry + SLOTS), last_key, KEY_T)


@triton.jit
def keys_kernel(
    entries, keys, sources, scales, COUNT: tl.constexpr, GRAD_T: tl.constexpr, KEY_T: tl.constexpr, ID_T: tl.constexpr,
    OFFSET_T: tl.constexpr, WEIGHT_T: tl.constexpr, SCALED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid: one program per tile of bags, at least one per lookup. ``entries``: LookupEntry rows, whose ``out`` is the lookup's
    part of its slot's gradient. Writes, for every read, its key (unless ``keys`` is None), the address of its gradient row (int64; unless
    ``sources`` is None) and, if SCALED, the factor of that gradient (float32: its sample weight, or 1 / bag size for means)."""
    program = tl.program_id(0)
    entry = find_entry(entries, 0, LOOKUP_FIELDS, COUNT, program)
    tile = (program - tl.load(entry)).to(tl.int32)
    kind = tl.load(entry + KIND)
    for k in tl.static_range(len(TILES)):
        if kind == k:
            _keys_tile(
                entry, tile, keys, sources, scales, TILES[k][0], TILES[k][1], GRAD_T, KEY_T, ID_T, OFFSET_T, WEIGHT_T, SCALED
            )
    if keys is not None:  # noqa: SIM102 - `and` would join a compile-time with a run-time condition
        if tile == 0:
            _unused_keys(entry, keys, KEY_T, OFFSET_T)


@triton.jit
def _heads(keys, at, live):
    """Whether a run, and whether a piece, begins at the sorted positions ``at`` (int32 0 or 1)."""
    key = tl.load(keys + at, mask=live, other=-1)
    before = tl.load(keys + at - 1, mask=live & (at > 0), other=-1)
    run = live & (key != before)
    return run.to(tl.int32), (run | (live & (at % CHUNK == 0))).to(tl.int32)


@triton.jit(do_not_specialize=["total"])
def count_kernel(keys, counts, total):
    """Grid: CHUNKS_PER_PROGRAM of the ``total`` chunks each. ``counts`` (int32 [2, total + 1], zero before): pieces and runs that
    begin in chunk c, written at c + 1, so that their cumulative sum is the number of those before each chunk."""
    chunk = tl.program_id(0) * CHUNKS_PER_PROGRAM + tl.arange(0, CHUNKS_PER_PROGRAM)
    live = chunk < total
    at = chunk.to(tl.int64)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    run, piece = _heads(keys, at, live[:, None] & (at >= 0))
    tl.store(counts + chunk + 1, tl.sum(piece, 1), mask=live)
    tl.store(counts + total + 1 + chunk + 1, tl.sum(run, 1), mask=live)


@triton.jit(do_not_specialize=["total"])
def pieces_kernel(keys, before, starts, ranks, total, RANKED: tl.constexpr):
    """Same grid. ``before``: the cumulative sum of ``counts``. Writes where each piece starts (int32) and, if RANKED, the number
    of its run among all runs (int32)."""
    chunk = tl.program_id(0) * CHUNKS_PER_PROGRAM + tl.arange(0, CHUNKS_PER_PROGRAM)
    live = chunk < total
    at = chunk.to(tl.int64)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    run, piece = _heads(keys, at, live[:, None] & (at >= 0))
    number = tl.load(before + chunk, mask=live, other=0)[:, None] + tl.cumsum(piece, 1) - 1
    tl.store(starts + number, at.to(tl.int32), mask=piece != 0)
    if RANKED:
        rank = tl.load(before + total + 1 + chunk, mask=live, other=0)[:, None] + tl.cumsum(run, 1) - 1
        tl.store(ranks + number, rank, mask=piece != 0)
