"""The Triton kernels of the interaction ops: one program for a sample, or for a part of one.

Sums are float32, rounded once, at the store, in a fixed order. Matrix products of half-precision inputs take them as they are: products of
two of them are exact in float32. ``WIDE``: inputs are widened to float32 first; then ``PRECISION`` is "ieee".
"""

# Kernel bodies are Triton's language, which pyright reads as Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_side(b, out, out_batch, side, side_batch, side_width, side_column, BLOCK: tl.constexpr):
    """``out[b, side_column:side_column + side_width] = side[b]``; the column may be negative: ``out`` may begin inside its rows."""
    d = tl.arange(0, BLOCK)
    for start in range(0, side_width, BLOCK):
        live = start + d < side_width
        value = tl.load(side + b * side_batch + start + d, mask=live, other=0).to(tl.float32)
        tl.store(out + b * out_batch + side_column + start + d, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def dots_kernel(
    x, x_batch, x_feature, where, out, out_batch, features, dim, side, side_batch, side_width, side_column,
    SIDE: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[b, where[i, j]] = <x[b, i], x[b, j]>`` wherever ``where[i, j]`` is not negative; one program a sample. SIDE: copies ``side``
    beside them."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BF)
    d = tl.arange(0, BD)
    sums = tl.zeros((BF, BF), dtype=tl.float32)
    for start in range(0, dim, BD):
        live = (i < features)[:, None] & (start + d < dim)[None, :]
        tile = tl.load(x + b * x_batch + i[:, None] * x_feature + (start + d)[None, :], mask=live, other=0)
        if WIDE:
            tile = tile.to(tl.float32)
        sums = tl.dot(tile, tl.trans(tile), sums, input_precision=PRECISION)
    square = (i < features)[:, None] & (i < features)[None, :]
    place = tl.load(where + i[:, None] * features + i[None, :], mask=square, other=-1)
    tl.store(out + b * out_batch + place, sums.to(out.dtype.element_ty), mask=place >= 0)
    if SIDE:
        copy_side(b, out, out_batch, side, side_batch, side_width, side_column, 256)


@triton.jit
def dots_backward_kernel(
    grad, grad_batch, grad_pair, x, x_batch, x_feature, where, dx, features, dim,
    BF: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dx = (L + L^T) x`` with ``L[i, j] = grad[where[i, j]]``, 0 where that is negative; one program a sample."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BF)
    d = tl.arange(0, BD)
    square = (i < features)[:, None] & (i < features)[None, :]
    place = tl.load(where + i[:, None] * features + i[None, :], mask=square, other=-1)
    lower = tl.load(grad + b * grad_batch + place * grad_pair, mask=place >= 0, other=0).to(tl.float32)
    both = lower + tl.trans(lower)
    for start in range(0, dim, BD):
        live = (i < features)[:, None] & (start + d < dim)[None, :]
        tile = tl.load(x + b * x_batch + i[:, None] * x_feature + (start + d)[None, :], mask=live, other=0)
        if WIDE:
            tile = tile.to(tl.float32)
        made = tl.dot(both.to(tile.dtype), tile, input_precision=PRECISION)  # one of L[i, j] and L[j, i] is 0
        tl.store(dx + (b * features + i[:, None]) * dim + (start + d)[None, :], made.to(dx.dtype.element_ty), mask=live)


@triton.jit
def products_kernel(x, x_batch, x_feature, first, second, out, pairs, dim, BP: tl.constexpr, BD: tl.constexpr):
    """``out[b, p] = x[b, first[p]] * x[b, second[p]]``; a program takes BP pairs of a sample."""
    b = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    d = tl.arange(0, BD)
    i = tl.load(first + p, mask=p < pairs, other=0)
    j = tl.load(second + p, mask=p < pairs, other=0)
    for start in range(0, dim, BD):
        live = (p < pairs)[:, None] & (start + d < dim)[None, :]
        left = tl.load(x + b * x_batch + i[:, None] * x_feature + (start + d)[None, :], mask=live, other=0).to(tl.float32)
        right = tl.load(x + b * x_batch + j[:, None] * x_feature + (start + d)[None, :], mask=live, other=0).to(tl.float32)
        tl.store(out + (b * pairs + p[:, None]) * dim + (start + d)[None, :], (left * right).to(out.dtype.element_ty), mask=live)


@triton.jit
def products_backward_kernel(
    grad, grad_batch, grad_pair, x, x_batch, x_feature, starts, numbers, partners, dx, features, dim, BD: tl.constexpr
):
    """``dx[b, i]``: the sum of ``grad[b, numbers[k]] * x[b, partners[k]]`` for k in [starts[i], starts[i + 1])."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    d = tl.arange(0, BD)
    first = tl.load(starts + i)
    end = tl.load(starts + i + 1)
    for start in range(0, dim, BD):
        live = start + d < dim
        sums = tl.zeros((BD,), dtype=tl.float32)
        for k in range(first, end):
            g = tl.load(grad + b * grad_batch + tl.load(numbers + k) * grad_pair + start + d, mask=live, other=0).to(tl.float32)
            other = tl.load(x + b * x_batch + tl.load(partners + k) * x_feature + start + d, mask=live, other=0).to(tl.float32)
            sums += g * other
        tl.store(dx + (b * features + i) * dim + start + d, sums.to(dx.dtype.element_ty), mask=live)


@triton.jit
def fm_kernel(x, x_batch, x_feature, out, features, dim, scale, REDUCE: tl.constexpr, BD: tl.constexpr):
    """The sum over i < j of ``x[b, i] * x[b, j]``, by running sums; with REDUCE summed over dim too."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    total = tl.zeros((BD,), dtype=tl.float32)
    for start in range(0, dim, BD):
        live = start + d < dim
        before = tl.zeros((BD,), dtype=tl.float32)
        pairs = tl.zeros((BD,), dtype=tl.float32)
        for f in range(0, features):
            row = tl.load(x + b * x_batch + f * x_feature + start + d, mask=live, other=0).to(tl.float32)
            pairs += before * row
            before += row
        if REDUCE:
            total += pairs
        else:
            tl.store(out + b * dim + start + d, (pairs * scale).to(out.dtype.element_ty), mask=live)
    if REDUCE:
        tl.store(out + b, (tl.sum(total, 0) * scale).to(out.dtype.element_ty))


@triton.jit
def fm_backward_kernel(
    grad, grad_batch, grad_column, x, x_batch, x_feature, dx, features, dim, scale, BD: tl.constexpr
):
    """``dx[b, f] = scale * grad * (sum of x[b] - x[b, f])``; ``grad_column`` 0: one gradient a sample."""
    b = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    for start in range(0, dim, BD):
        live = start + d < dim
        g = tl.load(grad + b * grad_batch + (start + d) * grad_column, mask=live, other=0).to(tl.float32) * scale
        total = tl.zeros((BD,), dtype=tl.float32)
        for f in range(0, features):
            total += tl.load(x + b * x_batch + f * x_feature + start + d, mask=live, other=0).to(tl.float32)
        for f in range(0, features):
            row = tl.load(x + b * x_batch + f * x_feature + start + d, mask=live, other=0).to(tl.float32)
            tl.store(dx + (b * features + f) * dim + start + d, (g * (total - row)).to(dx.dtype.element_ty), mask=live)
