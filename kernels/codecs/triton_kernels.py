"""The Triton kernels of the int8 row codec: a program encodes or decodes a tile of rows, each in one pass over memory.

Bit for bit what ``op.py`` describes: divisions are correctly rounded, rounding to integers is to even, and products are rounded before they are
added to (the launches turn the fusing of multiply and add off).
"""

# Kernel bodies are Triton's language, which pyright reads as Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import triton
import triton.language as tl

LEAST_SCALE = tl.constexpr(2.0**-126)
HALFWAY = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it away again rounds to an integer, ties to even


@triton.jit
def _of(number, VEC: tl.constexpr):
    """``number``, of which the host promised that it is a multiple of VEC, so that the compiler knows (it takes no hints on arguments)."""
    return number // VEC * VEC


@triton.jit
def _at(base, rows, stride, VEC: tl.constexpr):
    """Pointers to the beginnings of ``rows`` (int64 [R])."""
    return base + rows * _of(stride, VEC)


@triton.jit
def encode_kernel(
    x, x_row, payload, count, dim, width, X_VEC: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr, D: tl.constexpr
):
    """Rows ``x`` [count, dim] (any floating type, ``x_row`` apart) to ``payload`` uint8 [count, width], width = dim + 8."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col = tl.arange(0, D)
    live = row < count
    inside = live[:, None] & (col < _of(dim, X_VEC))[None, :]
    value = tl.load(_at(x, row, x_row, X_VEC)[:, None] + col[None, :], mask=inside, other=0.0).to(tl.float32)
    least = tl.min(tl.where(inside, value, float("inf")), 1)
    largest = tl.max(tl.where(inside, value, float("-inf")), 1)
    extent = largest - least
    bad = (tl.max((inside & (value != value)).to(tl.int32), 1) != 0) | ((extent < float("inf")) == 0)
    scale = tl.maximum(tl.div_rn(extent, extent * 0 + 255.0), LEAST_SCALE)
    offset = least + 0.0
    inverse = tl.div_rn(scale * 0 + 1.0, scale)
    code = ((value - offset[:, None]) * inverse[:, None] + HALFWAY) - HALFWAY
    code = tl.where(bad[:, None], 0.0, code).to(tl.uint8)
    out = _at(payload, row, width, VEC)
    tl.store(out[:, None] + col[None, :], code, mask=live[:, None] & (col < _of(dim, VEC))[None, :])
    nan = float("nan")
    byte = tl.arange(0, 8)
    word = tl.where(
        (byte < 4)[None, :], tl.where(bad, nan, scale).to(tl.int32, bitcast=True)[:, None], tl.where(bad, nan, offset).to(tl.int32, bitcast=True)[:, None]
    )  # fmt: skip
    tl.store(out[:, None] + dim + byte[None, :], (word >> ((byte % 4) * 8)[None, :]).to(tl.uint8), mask=live[:, None] & (byte >= 0)[None, :])


@triton.jit
def decode_kernel(
    payload, payload_row, out, count, dim, VEC: tl.constexpr, OUT_VEC: tl.constexpr, R: tl.constexpr, D: tl.constexpr
):
    """The inverse: ``out`` [count, dim] of any floating type."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col = tl.arange(0, D)
    live = row < count
    source = _at(payload, row, payload_row, VEC)
    code = tl.load(source[:, None] + col[None, :], mask=live[:, None] & (col < _of(dim, VEC))[None, :], other=0)
    byte = tl.arange(0, 4)
    tail = source[:, None] + dim + byte[None, :]
    held = live[:, None] & (byte >= 0)[None, :]
    shift = (byte * 8)[None, :]
    scale = tl.sum(tl.load(tail, mask=held, other=0).to(tl.int32) << shift, 1).to(tl.float32, bitcast=True)
    offset = tl.sum(tl.load(tail + 4, mask=held, other=0).to(tl.int32) << shift, 1).to(tl.float32, bitcast=True)
    made = code.to(tl.float32) * scale[:, None] + offset[:, None]
    inside = live[:, None] & (col < _of(dim, OUT_VEC))[None, :]
    tl.store(_at(out, row, dim, OUT_VEC)[:, None] + col[None, :], made.to(out.dtype.element_ty), mask=inside)
