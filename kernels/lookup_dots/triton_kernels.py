"""The Triton kernels of ``lookup_dots``: one program a sample looks its rows up and multiplies them; they never reach memory.

Numbers and sums are as in the interaction's own kernels.
"""

# Kernel bodies are Triton's language, which pyright reads as Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..embedding.triton_common import aligned
from ..interaction.triton_kernels import copy_side


class FeatureEntry(NamedTuple):
    """One feature of the interaction. All numbers int64; pointers are addresses; the stride counts elements."""

    ids: int  # 0: a dense tensor, of which sample b reads row b
    number: int  # of the lookup in its spec
    table: int
    rows: int
    stride: int
    wrap: int  # 1: negative ids count from the end


FEATURE_FIELDS = tl.constexpr(len(FeatureEntry._fields))
_at = {name: tl.constexpr(i) for i, name in enumerate(FeatureEntry._fields)}
IDS, NUMBER, TABLE, ROWS, STRIDE, WRAP = (_at[f] for f in FeatureEntry._fields)


@triton.jit
def _rows(entries, b, features, i, VEC: tl.constexpr, TABLE_T: tl.constexpr, ID_T: tl.constexpr):
    """(pointers to the rows of sample ``b`` [BF], which of them may be read, which ids are bad)."""
    live = i < features
    entry = entries + i * FEATURE_FIELDS
    ids = tl.load(entry + IDS, mask=live, other=0)
    rows = tl.load(entry + ROWS, mask=live, other=0)
    looked_up = live & (ids != 0)
    row = tl.load(ids.to(tl.pointer_type(ID_T)) + b, mask=looked_up, other=0).to(tl.int64)
    row = tl.where((row < 0) & (tl.load(entry + WRAP, mask=live, other=0) != 0), row + rows, row)
    row = tl.where(looked_up, row, b)
    good = live & (row >= 0) & (row < rows)
    stride = tl.multiple_of(tl.load(entry + STRIDE, mask=live, other=0), [VEC])
    table = aligned(tl.load(entry + TABLE, mask=live, other=0), TABLE_T, VEC)
    return table + tl.where(good, row, 0) * stride, good, looked_up & (good == 0)


@triton.jit
def lookup_dots_kernel(
    entries, found, where, out, out_batch, features, dim, side, side_batch, side_width, side_column, SIDE: tl.constexpr,
    VEC: tl.constexpr, TABLE_T: tl.constexpr, ID_T: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As ``dots_kernel`` of the interaction, on rows that ``entries`` (int64 [features, FEATURE_FIELDS]) say where to find. ``found``: int32, is
    lowered to the first sample with a bad id of each lookup."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BF)
    d = tl.arange(0, BD)
    rows, good, bad = _rows(entries, b, features, i, VEC, TABLE_T, ID_T)
    if tl.max(bad.to(tl.int32)) != 0:
        number = tl.load(entries + i * FEATURE_FIELDS + NUMBER, mask=bad, other=0)
        tl.atomic_min(found + number, (tl.zeros([BF], tl.int64) + b).to(tl.int32), mask=bad, sem="relaxed")
    sums = tl.zeros((BF, BF), dtype=tl.float32)
    for start in range(0, dim, BD):
        live = good[:, None] & (start + d < dim)[None, :]
        tile = tl.load(rows[:, None] + (start + d)[None, :], mask=live, other=0)
        if WIDE:
            tile = tile.to(tl.float32)
        sums = tl.dot(tile, tl.trans(tile), sums, input_precision=PRECISION)
    square = (i < features)[:, None] & (i < features)[None, :]
    place = tl.load(where + i[:, None] * features + i[None, :], mask=square, other=-1)
    tl.store(out + b * out_batch + place, sums.to(out.dtype.element_ty), mask=place >= 0)
    if SIDE:
        copy_side(b, out, out_batch, side, side_batch, side_width, side_column, 256)


@triton.jit
def lookup_dots_backward_kernel(
    grad, grad_batch, grad_pair, entries, where, dx, features, dim,
    VEC: tl.constexpr, TABLE_T: tl.constexpr, ID_T: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dx = (L + L^T) x`` with ``L[i, j] = grad[where[i, j]]``, 0 where that is negative, on rows that are looked up again."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BF)
    d = tl.arange(0, BD)
    rows, good, _ = _rows(entries, b, features, i, VEC, TABLE_T, ID_T)
    square = (i < features)[:, None] & (i < features)[None, :]
    place = tl.load(where + i[:, None] * features + i[None, :], mask=square, other=-1)
    lower = tl.load(grad + b * grad_batch + place * grad_pair, mask=place >= 0, other=0).to(tl.float32)
    both = lower + tl.trans(lower)
    for start in range(0, dim, BD):
        inside = (start + d < dim)[None, :]
        tile = tl.load(rows[:, None] + (start + d)[None, :], mask=good[:, None] & inside, other=0)
        if WIDE:
            tile = tile.to(tl.float32)
        made = tl.dot(both.to(tile.dtype), tile, input_precision=PRECISION)
        at = dx + (b * features + i[:, None]) * dim + (start + d)[None, :]
        tl.store(at, made.to(dx.dtype.element_ty), mask=(i < features)[:, None] & inside)
