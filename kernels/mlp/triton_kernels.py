"""The Triton kernels of a fused multilayer perceptron.

A layer ends in ``y = relu(z) * (scale where kept, else 0)``; one bit a value says whether its gradient passes: kept, and not made 0 by
ReLU. Bits of a row lie in int32 words, column ``c`` at bit ``c % 32`` of word ``c // 32``, as ``layers.pack`` packs them.

``keep_kernel`` draws dropout's bits before the product: Philox in a product's epilogue takes all 255 registers and spills, reading
one word for 32 values takes next to none. ``finish_kernel`` and ``masked_kernel`` stand behind a BLAS product; ``product_kernel`` is a
product that does their work at its end. Sums have a fixed order.
"""

# Kernel bodies are Triton's language, which pyright reads as Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_kernel(seed, bits, count, layer, threshold, BLOCK: tl.constexpr):
    """Bits that are 1 with probability ``1 - threshold / 65536``: int32 [count], from Philox4x32-10 with the counter
    ``(4 * word + part, layer)`` and the key at ``seed`` (int64), 16 random bits for each."""
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(seed)
    drawn = tl.zeros([BLOCK], tl.uint32)
    zero = drawn.to(tl.int32)
    for part in tl.static_range(4):
        r = tl.philox(key, word * 4 + part, zero + layer, zero, zero)
        for n in tl.static_range(4):
            low = (r[n] & 0xFFFF).to(tl.int32) >= threshold
            high = (r[n] >> 16).to(tl.int32) >= threshold
            drawn |= (low.to(tl.uint32) << (8 * part + 2 * n)) | (high.to(tl.uint32) << (8 * part + 2 * n + 1))
    tl.store(bits + word, drawn.to(tl.int32, bitcast=True), mask=word < count)


@triton.jit
def _finished(z, keep, scale, RELU: tl.constexpr, DROP: tl.constexpr):
    """(dropout(relu(z)), which values pass their gradient on) for float32 ``z``."""
    made = z
    passed = z == z
    if RELU:
        passed = (z <= 0) == 0  # NaN passes
        made = tl.where(passed, z, 0.0)
    else:
        passed = passed | (passed == 0)
    if DROP:
        made = made * tl.where(keep, scale, 0.0)
        passed = passed & keep
    return made, passed


@triton.jit
def _packed(flags):
    """bool [R, W, 32] as int32 words [R, W]."""
    return tl.sum(flags.to(tl.int32) << tl.arange(0, 32)[None, None, :], 2)


@triton.jit
def finish_kernel(
    y, bits, rows, cols, words, scale, RELU: tl.constexpr, DROP: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    """The end of a layer, in place on ``y`` [rows, cols]: ``bits`` [rows, words] holds what is kept before (if DROP), what passes after.
    A program takes R rows and W words of each."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    word = tl.program_id(1) * W + tl.arange(0, W)
    col = (word * 32)[:, None] + tl.arange(0, 32)[None, :]
    live = (row < rows)[:, None] & (word < words)[None, :]
    inside = (row < rows)[:, None, None] & (col < cols)[None, :, :]
    at = y + (row * cols)[:, None, None] + col[None, :, :]
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    keep = z == z
    if DROP:
        kept = tl.load(bits + (row * words)[:, None] + word[None, :], mask=live, other=0)
        keep = ((kept[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1) != 0
    made, passed = _finished(z, keep, scale, RELU, DROP)
    tl.store(at, made.to(y.dtype.element_ty), mask=inside)
    tl.store(bits + (row * words)[:, None] + word[None, :], _packed(passed), mask=live)


@triton.jit
def masked_kernel(
    grad, grad_row, bits, out, sums, rows, cols, words, scale, STEPS: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    """``out = grad * scale`` where the bit is set, else 0, and the sums of its columns over the program's R * STEPS rows: ``sums`` float32
    [row blocks, cols]. ``grad`` has columns in one piece, rows ``grad_row`` apart."""
    word = tl.program_id(1) * W + tl.arange(0, W)
    col = (word * 32)[:, None] + tl.arange(0, 32)[None, :]
    total = tl.zeros([W, 32], tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0).to(tl.int64) * STEPS + step) * R + tl.arange(0, R)
        inside = (row < rows)[:, None, None] & (col < cols)[None, :, :]
        live = (row < rows)[:, None] & (word < words)[None, :]
        g = tl.load(grad + (row * grad_row)[:, None, None] + col[None, :, :], mask=inside, other=0.0).to(tl.float32)
        passes = tl.load(bits + (row * words)[:, None] + word[None, :], mask=live, other=0)
        made = tl.where(((passes[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1) != 0, g * scale, 0.0)
        tl.store(out + (row * cols)[:, None, None] + col[None, :, :], made.to(out.dtype.element_ty), mask=inside)
        total += tl.sum(made, 0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * cols + col, total, mask=col < cols)


@triton.jit
def product_kernel(
    a, b, c, bias, bits, sums, m, n, k, a_row, b_inner, b_col, words, scale,
    BACKWARD: tl.constexpr, RELU: tl.constexpr, DROP: tl.constexpr, BIASED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``c[m, n] = a[m, k] @ b[k, n]``, summed in float32, and what comes after it.

    Forward: ``c = dropout(relu(c + bias))``, masks into ``bits`` (as :func:`finish_kernel`). BACKWARD: ``c = c * scale`` where the bit is
    set, else 0, and column sums of each row block into ``sums`` float32 [row blocks, n].
    EVEN: BK divides k. WIDE: operands are widened to float32 first (the interpreter cannot multiply bfloat16)."""
    program = tl.program_id(0)
    rows, cols = tl.cdiv(m, BM), tl.cdiv(n, BN)
    band = GROUP * cols  # GROUP row blocks at a time, so that operands are read again from the cache
    first = (program // band) * GROUP
    height = min(rows - first, GROUP)
    block_m = first + (program % band) % height
    block_n = (program % band) // height
    row = block_m * BM + tl.arange(0, BM)
    col = block_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    # Rows and columns past the end read others' numbers, which are not stored.
    a_at = a + (row % m).to(tl.int64)[:, None] * a_row + inner[None, :]
    b_at = b + inner[:, None] * b_inner + (col % n)[None, :] * b_col
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, k, BK):
        if EVEN:
            left, right = tl.load(a_at), tl.load(b_at)
        else:
            left = tl.load(a_at, mask=(start + inner < k)[None, :], other=0.0)
            right = tl.load(b_at, mask=(start + inner < k)[:, None], other=0.0)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total)
        a_at += BK
        b_at += BK * b_inner
    row = block_m * BM + tl.arange(0, BM)
    inside = (row < m)[:, None] & (col < n)[None, :]
    at = row.to(tl.int64)[:, None] * n + col[None, :]
    word = block_n * (BN // 32) + tl.arange(0, BN // 32)
    word_at = bits + row.to(tl.int64)[:, None] * words + word[None, :]
    live = (row < m)[:, None] & (word < words)[None, :]
    lanes = tl.arange(0, 32)[None, None, :]
    if BACKWARD:
        passes = tl.load(word_at, mask=live, other=0)
        set_bits = tl.reshape(((passes[:, :, None] >> lanes) & 1).to(tl.int8), [BM, BN])
        total = tl.where((set_bits != 0) & inside, total * scale, 0.0)
        tl.store(sums + block_m.to(tl.int64) * n + col, tl.sum(total, 0), mask=col < n)
        tl.store(c + at, total.to(c.dtype.element_ty), mask=inside)
    else:
        if BIASED:
            total += tl.load(bias + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
        z = total.to(c.dtype.element_ty).to(tl.float32)  # what PyTorch's ReLU would see
        keep = z == z
        if DROP:
            kept = tl.load(word_at, mask=live, other=0)
            keep = tl.reshape(((kept[:, :, None] >> lanes) & 1).to(tl.int8), [BM, BN]) != 0
        made, passed = _finished(z, keep, scale, RELU, DROP)
        tl.store(c + at, made.to(c.dtype.element_ty), mask=inside)
        tl.store(word_at, _packed(tl.reshape(passed.to(tl.int8), [BM, BN // 32, 32])), mask=live)
