"""What the Triton kernels of this package share: the entries that describe the work, and how a program reads ids and bags.

A launch covers many lookups or tables. The host writes one *entry* (a row of int64 numbers: pointers, sizes, switches) for
each and sends them in one small copy; a program finds its entry by its number. Pointers are read from the tensors at every
call, so a table that was replaced or moved is seen.

Entries differ in ``kind``: an index into the launch's KINDS, a tuple of compile-time facts (width of the tile, alignment, ...).
A kernel holds one body for each kind that is present, so a 16-wide table is not read through a 128-wide tile, and a table
whose rows are not 16-byte aligned does not spoil the loads of the others.

Arithmetic is float32: values are widened right after the load and rounded once, at the store.
"""

# Kernel bodies are Triton's language, which pyright reads as Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

ELEMENTS = 1024  # of one tile: 8 for each thread of 4 warps, so that the numbers kept per row of it stay few
MAX_ROWS = 128  # of one tile, for narrow tables
MAX_DIM = 2048  # the widest row that fits one tile
LONG = tl.constexpr(32)  # a bag or run longer than this gets the whole tile for itself
NOTHING = tl.constexpr(2**31 - 1)  # "no bad position found"; one lookup has fewer ids than this


class LookupEntry(NamedTuple):
    """One lookup of a launch. All numbers int64; pointers are addresses, 0 = none; strides count elements."""

    program: int  # the first program of this lookup
    kind: int
    number: int  # of the lookup in its spec
    ids: int
    n_ids: int
    offsets: int
    n_offsets: int
    bag: int  # ids per bag where there are no offsets
    bags: int
    ends: int  # 1: the last offset ends the last bag
    weights: int
    table: int
    rows: int
    dim: int
    stride: int  # of the table
    padding: int  # the row that is left out, -1 = none
    wrap: int  # 1: negative ids count from the end
    mean: int
    out: int  # address of the first element written (forward) or of the gradient read (backward), its column included
    out_stride: int
    position: int = 0  # backward: where this lookup's reads begin among all reads
    slots: int = 0  # backward: how many reads it owns there, padding of the table's segment included
    key: int = 0  # backward: the key of the table's row 0


LOOKUP_FIELDS = tl.constexpr(len(LookupEntry._fields))
_at = {name: tl.constexpr(i) for i, name in enumerate(LookupEntry._fields)}
KIND, NUMBER, IDS, N_IDS, OFFSETS, N_OFFSETS = (_at[f] for f in ("kind", "number", "ids", "n_ids", "offsets", "n_offsets"))
BAG, BAGS, ENDS, WEIGHTS, TABLE, ROWS = (_at[f] for f in ("bag", "bags", "ends", "weights", "table", "rows"))
DIM, STRIDE, PADDING, WRAP, MEAN = (_at[f] for f in ("dim", "stride", "padding", "wrap", "mean"))
OUT, OUT_STRIDE, POSITION, SLOTS, KEY = (_at[f] for f in ("out", "out_stride", "position", "slots", "key"))


def tile_rows(block: int) -> int:
    """How many rows a tile of width ``block`` (a power of two) holds."""
    return max(1, min(MAX_ROWS, ELEMENTS // block))


@triton.jit
def find_entry(entries, COLUMN: tl.constexpr, FIELDS: tl.constexpr, COUNT: tl.constexpr, program):
    """The address of the last entry whose ``COLUMN`` is at most ``program``: a binary search, so launches need no map."""
    low = 0
    high = COUNT
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(entries + middle * FIELDS + COLUMN) <= program:
            low = middle
        else:
            high = middle
    return entries + low * FIELDS


@triton.jit
def aligned(address, T: tl.constexpr, VEC: tl.constexpr):
    """``address`` (int64, scalar or [n]) as pointers to T, of which the host promised alignment to VEC elements."""
    pointer = address.to(tl.pointer_type(T))
    BYTES: tl.constexpr = VEC * T.primitive_bitwidth // 8
    if address.type.is_block():
        return tl.multiple_of(pointer, [BYTES])
    return tl.multiple_of(pointer, BYTES)


@triton.jit
def read_rows(ids, rows, wrap, at, live, ID_T: tl.constexpr):
    """(row numbers int32, whether the id is in its table) at positions ``at``."""
    row = tl.load(ids + at, mask=live, other=0)
    row = tl.where((row < 0) & (wrap != 0), row + rows.to(ID_T), row)
    return row.to(tl.int32), (row >= 0) & (row < rows)


@triton.jit
def bag_ranges(entry, bag, live, OFFSET_T: tl.constexpr):
    """(first position int32, count int32, whether its offsets are wrong) of every bag; wrong ones are cut to the ids."""
    n_ids = tl.load(entry + N_IDS)
    length = tl.load(entry + BAG)
    address = tl.load(entry + OFFSETS)
    first = bag.to(tl.int64) * length
    end = first + length
    wrong = live & False
    if address != 0:
        offsets = address.to(tl.pointer_type(OFFSET_T))
        first = tl.load(offsets + bag, mask=live, other=0).to(tl.int64)
        inside = bag + 1 < tl.load(entry + N_OFFSETS)
        following = tl.load(offsets + bag + 1, mask=live & inside, other=0).to(tl.int64)
        end = tl.where(inside, following, n_ids)
        wrong = live & ((first < 0) | (end < first) | (end > n_ids) | ((bag == 0) & (first != 0)))
    first = tl.minimum(tl.maximum(first, 0), n_ids)
    end = tl.minimum(tl.maximum(end, first), n_ids)
    return first.to(tl.int32), tl.where(live, end - first, 0).to(tl.int32), wrong
