"""Gradients of small tables as products: counts of ids, ``[rows, bags]``, times the slots' gradients, ``[bags, dim]``.

``counts[r, b]`` is how often bag b reads row r (with weights or means: the sum of the factors). Nothing is sorted, the gradient of a bag
is read once however many ids it has, and tensor cores add. ``counts_kernel`` makes the product of one slice of BAGS bags and one block of
rows and columns, and leaves it at a place fixed by the slice; ``finish_kernel`` adds the slices up in their order and finishes the rows that
were read (see ``triton_backward.py``). No float is added atomically: the result depends on the inputs alone.

Where counts are whole and gradients are of half precision, both enter the product as they are: a count is at most SPAN, which both half
types hold, and sums are float32. Else the product is of float32, as three of tf32 ("tf32x3": 2**-21 of each term is lost).
A gradient that is not finite makes NaN of the rows that its bag reads, and of no others: it is kept out of the product (where it
would meet zeros) and marked in a second pass.

Sources: the histogram and product of TorchRec's open Triton kernels for small tables, named in its pull requests; the slices are ours.
"""

# Kernel bodies are Triton's language, which pyright reads as Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import triton
import triton.language as tl

from .triton_backward import DIM_OF, FIRST_CHUNK, KIND_OF, N_VALUES, ROW_FIELDS, ROWS_OF, _finish
from .triton_common import (
    BAGS,
    DIM,
    IDS,
    KIND,
    LOOKUP_FIELDS,
    MEAN,
    OUT,
    OUT_STRIDE,
    PADDING,
    POSITION,
    ROWS,
    WEIGHTS,
    WRAP,
    aligned,
    bag_ranges,
    find_entry,
    read_rows,
)  # fmt: skip

SLICE = tl.constexpr(2048)  # bags whose product one program makes
STEP = tl.constexpr(32)  # bags of one product
SPAN = tl.constexpr(128)  # ids of a bag that are counted before a product
TOGETHER = tl.constexpr(4)  # slices read at a time


@triton.jit
def _add_bags(
    entry, begin, end, row, cols, total, seen, odd, MARK: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr, GRAD_T: tl.constexpr,
    DOT_T: tl.constexpr, ID_T: tl.constexpr, OFFSET_T: tl.constexpr, WEIGHT_T: tl.constexpr, SCALED: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Add the products of bags ``begin`` to ``end`` to ``total`` [R, D], reads to ``seen`` [R], and what is not finite to ``odd`` [STEP, D];
    MARK: make NaN of ``total`` where rows meet what is not finite."""
    ids = tl.load(entry + IDS).to(tl.pointer_type(ID_T))
    rows = tl.load(entry + ROWS)
    wrap = tl.load(entry + WRAP)
    padding = tl.load(entry + PADDING)
    weights = tl.load(entry + WEIGHTS)
    dim = tl.multiple_of(tl.load(entry + DIM), VEC)
    stride = tl.multiple_of(tl.load(entry + OUT_STRIDE), VEC)
    grads = aligned(tl.load(entry + OUT), GRAD_T, VEC)
    for b in range(begin, end, STEP):
        bag = b + tl.arange(0, STEP)
        first, count, _ = bag_ranges(entry, bag, bag < end, OFFSET_T)
        grad = tl.load(
            grads + (bag.to(tl.int64) * stride)[:, None] + cols[None, :], mask=(bag < end)[:, None] & (cols < dim)[None, :], other=0.0
        ).to(tl.float32)
        finite = tl.abs(grad) < float("inf")
        odd = odd | (finite == 0)
        if MARK:
            grad = tl.where(finite, 0.0, 1.0)
        else:
            grad = tl.where(finite, grad, 0.0)
        most = 1 if PLAIN else tl.max(count)
        factor = tl.full([STEP], 1.0, tl.float32)
        if SCALED and not PLAIN and not MARK:  # noqa: SIM102 - `and` would join compile-time with run-time conditions
            if tl.load(entry + MEAN) != 0:
                kept = tl.zeros([STEP], tl.int32)
                for i in range(0, most):
                    each, good = read_rows(ids, rows, wrap, first + i, i < count, ID_T)
                    kept += ((i < count) & good & (each != padding)).to(tl.int32)
                factor = 1.0 / tl.maximum(kept, 1).to(tl.float32)
        for i in range(0, most, SPAN):
            hits = tl.zeros([R, STEP], tl.float32)
            scaled = tl.zeros([R, STEP], tl.float32)
            for u in range(i, tl.minimum(i + SPAN, most)):
                live = u < count
                each, good = read_rows(ids, rows, wrap, first + u, live, ID_T)
                hit = (row[:, None] == each[None, :]) & (live & good & (each != padding))[None, :]
                hits += hit.to(tl.float32)
                if SCALED and not MARK:
                    scale = factor
                    if WEIGHT_T is not None:
                        pointer = weights.to(tl.pointer_type(WEIGHT_T)) + first + u
                        scale *= tl.load(pointer, mask=live & (weights != 0), other=1.0).to(tl.float32)
                    scaled += tl.where(hit, scale[None, :], 0.0)
            if MARK:
                met = tl.dot((hits > 0).to(DOT_T), grad.to(DOT_T), input_precision="tf32")
                total = tl.where(met > 0, float("nan"), total)
            else:
                seen += tl.sum(hits, 1).to(tl.int32)
                counts = hits
                if SCALED:
                    counts = scaled
                total = tl.dot(counts.to(DOT_T), grad.to(DOT_T), total, input_precision="tf32x3")
    return total, seen, odd


@triton.jit
def _counts_tile(
    entry, tile, partials, seen_at, pitch, R: tl.constexpr, D: tl.constexpr, VEC: tl.constexpr, PLAIN: tl.constexpr,
    GRAD_T: tl.constexpr, DOT_T: tl.constexpr, ID_T: tl.constexpr, OFFSET_T: tl.constexpr, WEIGHT_T: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    rows = tl.load(entry + ROWS).to(tl.int32)
    dim = tl.load(entry + DIM).to(tl.int32)
    across = (dim + D - 1) // D
    blocks = (rows + R - 1) // R * across
    part = tile // blocks
    row = tile % blocks // across * R + tl.arange(0, R)
    cols = tile % across * D + tl.arange(0, D)
    begin = part * SLICE
    end = tl.minimum(begin + SLICE, tl.load(entry + BAGS).to(tl.int32))
    total = tl.zeros([R, D], tl.float32)
    seen = tl.zeros([R], tl.int32)
    odd = tl.zeros([STEP, D], tl.int1)
    total, seen, odd = _add_bags(
        entry, begin, end, row, cols, total, seen, odd, False, R, VEC, GRAD_T, DOT_T, ID_T, OFFSET_T, WEIGHT_T, SCALED, PLAIN
    )
    if tl.max(odd.to(tl.int32)) != 0:
        total, seen, odd = _add_bags(
            entry, begin, end, row, cols, total, seen, odd, True, R, VEC, GRAD_T, DOT_T, ID_T, OFFSET_T, WEIGHT_T, SCALED, PLAIN
        )
    place = tl.load(entry + POSITION) + part.to(tl.int64) * rows + row
    tl.store(partials + (place * pitch)[:, None] + cols[None, :], total, mask=(row < rows)[:, None] & (cols < dim)[None, :])
    if tile % across == 0:
        tl.store(seen_at + place, seen, mask=row < rows)


@triton.jit
def counts_kernel(
    entries, partials, seen_at, pitch, COUNT: tl.constexpr, KINDS: tl.constexpr, GRAD_T: tl.constexpr, DOT_T: tl.constexpr,
    ID_T: tl.constexpr, OFFSET_T: tl.constexpr, WEIGHT_T: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid: one program per slice of bags and block of the table, of all lookups. ``entries``: LookupEntry rows, whose ``out`` is the
    lookup's part of its slot's gradient and whose ``position`` is the place of its first slice.

    ``partials``: float32 [places, pitch], ``seen_at``: int32 [places], one place for each slice and row. DOT_T: what products are made of.
    KINDS: (rows and columns of a block, alignment of gradients, whether every bag is one id)."""
    program = tl.program_id(0)
    entry = find_entry(entries, 0, LOOKUP_FIELDS, COUNT, program)
    tile = (program - tl.load(entry)).to(tl.int32)
    kind = tl.load(entry + KIND)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            _counts_tile(
                entry, tile, partials, seen_at, pitch, KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], GRAD_T, DOT_T, ID_T,
                OFFSET_T, WEIGHT_T, SCALED,
            )  # fmt: skip


@triton.jit
def _finish_tile(
    entry, tile, partials, seen_at, pitch, R: tl.constexpr, D: tl.constexpr, VEC: tl.constexpr, RULE: tl.constexpr,
    TARGET_T: tl.constexpr, STATE_T: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    row = (tile * R + tl.arange(0, R)).to(tl.int64)
    cols = tl.arange(0, D)
    rows = tl.load(entry + ROWS_OF)
    mask = (row < rows)[:, None] & (cols < tl.load(entry + DIM_OF))[None, :]
    place = tl.load(entry + FIRST_CHUNK) + row
    slices = tl.load(entry + N_VALUES).to(tl.int32)
    total = tl.zeros([R, D], tl.float32)
    seen = tl.zeros([R], tl.int32)
    for s in range(0, slices, TOGETHER):
        for u in tl.static_range(TOGETHER):
            here = place + (s + u) * rows
            total += tl.load(partials + (here * pitch)[:, None] + cols[None, :], mask=mask & (s + u < slices), other=0.0)
            seen += tl.load(seen_at + here, mask=(row < rows) & (s + u < slices), other=0)
    _finish(entry, row, row, seen > 0, total, cols, VEC, RULE, TARGET_T, STATE_T, ROUNDED)


@triton.jit
def finish_kernel(
    entries, partials, seen_at, pitch, COUNT: tl.constexpr, KINDS: tl.constexpr, RULE: tl.constexpr, TARGET_T: tl.constexpr,
    STATE_T: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Grid: one program per tile of rows. ``entries``: RowEntry rows, whose ``chunk`` is the table's first place and whose ``given`` counts
    its slices. KINDS: (tile rows, tile width, alignment of targets and state)."""
    program = tl.program_id(0)
    entry = find_entry(entries, 0, ROW_FIELDS, COUNT, program)
    tile = (program - tl.load(entry)).to(tl.int32)
    kind = tl.load(entry + KIND_OF)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            _finish_tile(
                entry, tile, partials, seen_at, pitch, KINDS[k][0], KINDS[k][1], KINDS[k][2], RULE, TARGET_T, STATE_T, ROUNDED
            )
