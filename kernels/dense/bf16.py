"""bfloat16 products on CPU in C++ (native/bf16*): AVX512-BF16, any number of threads, either operand in either layout and, where it is
a parameter, in float32: it is rounded as it is packed, and a weight's gradient is written in float32, so that nothing is cast apart.
Sums are float32.

A processor without the instructions (or with ``ENABLED`` set to False) leaves such products to oneDNN.
"""
from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..native_library import load
from .native import laid_out

ENABLED = True
LEAST_COLUMNS = 32  # of a result: narrower ones fill no register tile
MOST_DEPTH = 4096  # of a result in bfloat16, whose sums stay in registers; those of a float32 one may be of any length

_lib, _why_not = load(Path(__file__).parent, "twm_abi", 2)
if _lib is not None:
    _word, _pointer = ctypes.c_int64, ctypes.c_void_p
    _lib.twb_ready.restype = _word
    _lib.twb_product.restype = _word
    _lib.twb_product.argtypes = [_pointer, _word, _word, _pointer, _word, _word, *[_pointer] * 4, ctypes.c_float, *[_word] * 6]
    _lib.twb_blocks.restype, _lib.twb_blocks.argtypes = _word, [_word, _word, _word]
_ready = _lib is not None and bool(_lib.twb_ready())


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    if _lib is None:
        return f"PyTorch's products: {_why_not}"
    return "native AVX512-BF16" if _ready else "PyTorch's products: this processor has no AVX512-BF16"


def available() -> bool:
    """Can products run here?"""
    return _ready and ENABLED


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, relu: bool = False, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``a @ b + bias``, then ReLU if asked (NaN stays NaN): ``[rows, depth]``, ``[depth, cols]``, both bfloat16 or float32 (then rounded to
    bfloat16 first), ``[cols]`` of either -> ``[rows, cols]`` contiguous, of ``dtype``, one of the two. No size may be 0, and the depth of a
    bfloat16 result not above :data:`MOST_DEPTH`. Transposed operands cost no copy. Raises ``RuntimeError`` for shapes that do not fit
    and ``MemoryError``."""
    return _product(a, b, bias, relu, dtype)


def relu_product(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`product` with ReLU in bfloat16, and which values it passes, as bits: int32 ``[rows, ceil(cols / 32)]``, column c at bit c % 32 of
    word c // 32."""
    bits = torch.empty(a.shape[0], -(-b.shape[1] // 32), dtype=torch.int32)
    return _product(a, b, bias, True, torch.bfloat16, bits), bits


def masked_product(a: Tensor, b: Tensor, bits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``scale * (a @ b)`` where the bit is set, else 0, in bfloat16; and the sums of its columns, float32."""
    sums = torch.empty(_lib.twb_blocks(*a.shape, torch.get_num_threads()), b.shape[1])
    return _product(a, b, None, False, torch.bfloat16, bits, sums, scale), sums.sum(0)


def _product(a, b, bias, relu, dtype, bits: Tensor | None = None, sums: Tensor | None = None, scale: float = 1.0) -> Tensor:
    (a, a_stride, a_turned), (b, b_stride, b_turned) = laid_out(a), laid_out(b)
    (rows, depth), cols = a.shape, b.shape[1]
    if b.shape[0] != depth or (bias is not None and bias.shape != (cols,)):
        biased = "" if bias is None else f" + {list(bias.shape)}"
        raise RuntimeError(f"shapes cannot be multiplied: [{rows}, {depth}] x {list(b.shape)}{biased}")
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    out = torch.empty(rows, cols, dtype=dtype)
    wide = sum(bit for t, bit in ((a, 1), (b, 2), (out, 4)) if t.dtype == torch.float32)
    bias_at, bits_at, sums_at = (None if t is None else t.data_ptr() for t in (bias, bits, sums))
    failed = _lib.twb_product(
        a.data_ptr(), a_stride, a_turned, b.data_ptr(), b_stride, b_turned, bias_at, out.data_ptr(), bits_at, sums_at, scale,
        rows, cols, depth, relu, wide, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to pack a product of [{rows}, {depth}] and [{depth}, {cols}]")
    return out
