"""float32 products on CPU in C++ (native/): AVX-512, one thread, either operand in either layout.

What oneDNN lacks is a product of a transposed left operand, as a weight's gradient is (it is given a copy), and a backward of ReLU
that also adds up the bias's gradient. Measured on an AMD EPYC (Zen 5), torch 2.13, 1024 rows: the weight gradients of DLRM's layers
27 -> 22 ms; forward and input gradients 1 to 3 % below oneDNN's. One thread only: over several oneDNN shares the packing.
"""
from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..native_library import load

LEAST_COLUMNS = 32  # of a result: narrower ones fill no register tile

_lib, _why_not = load(Path(__file__).parent, "twm_abi", 2)
if _lib is not None:
    _word, _pointer = ctypes.c_int64, ctypes.c_void_p
    _lib.twm_ready.restype = _word
    _lib.twm_product.restype = _word
    _lib.twm_product.argtypes = [*[_pointer, _word, _word] * 2, _pointer, _pointer, *[_word] * 4, _pointer, _word, _pointer]
    _lib.twm_masked.restype = None
    _lib.twm_masked.argtypes = [_pointer, _word, _pointer, _pointer, _pointer, _word, _word]
_ready = _lib is not None and bool(_lib.twm_ready())


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    if _lib is None:
        return f"PyTorch's products: {_why_not}"
    return "native AVX-512" if _ready else "PyTorch's products: this processor has no AVX-512"


def available() -> bool:
    """Can :func:`product` and :func:`masked` run here, with the threads that torch has now?"""
    return _ready and torch.get_num_threads() == 1


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, relu: bool = False, out: Tensor | None = None) -> Tensor:
    """``a @ b + bias``, then ReLU if asked (NaN stays NaN): ``[rows, depth]``, ``[depth, cols]``, ``[cols]`` -> ``[rows, cols]``
    contiguous, float32; ``out``, if given, which is so. No size may be 0. Transposed operands cost no copy. Raises
    ``RuntimeError`` for shapes that do not fit and ``MemoryError``."""
    return _product(a, b, bias, relu, None, out)[0]


def masked_product(a: Tensor, b: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`masked` of :func:`product` (``a``, ``b``) and ``out`` ``[rows, cols]``, whose columns lie side by side, in one pass. Raises as they do."""
    if out.shape != (a.shape[0], b.shape[1]) or out.stride(1) != 1:
        raise RuntimeError(f"the mask is {list(out.shape)} with strides {out.stride()}; it must be [{a.shape[0]}, {b.shape[1]}], its columns side by side")
    made, sums = _product(a, b, None, False, out)
    assert sums is not None
    return made, sums


def _product(a: Tensor, b: Tensor, bias: Tensor | None, relu: bool, kept: Tensor | None, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    (a, a_stride, a_turned), (b, b_stride, b_turned) = laid_out(a), laid_out(b)
    (rows, depth), cols = a.shape, b.shape[1]
    if b.shape[0] != depth or (bias is not None and bias.shape != (cols,)):
        biased = "" if bias is None else f" + {list(bias.shape)}"
        raise RuntimeError(f"shapes cannot be multiplied: [{rows}, {depth}] x {list(b.shape)}{biased}")
    bias = None if bias is None else bias.contiguous()
    out = a.new_empty(rows, cols) if out is None else out
    sums = None if kept is None else a.new_empty(cols)
    failed = _lib.twm_product(
        a.data_ptr(), a_stride, a_turned, b.data_ptr(), b_stride, b_turned, None if bias is None else bias.data_ptr(), out.data_ptr(),
        rows, cols, depth, relu, *((None, 0, None) if kept is None else (kept.data_ptr(), kept.stride(0), sums.data_ptr())),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to pack a product of [{rows}, {depth}] and [{depth}, {cols}]")
    return out, sums


def masked(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ReLU's input and the sum of its columns: ``grad`` where ``out`` ``[rows, cols]``, contiguous, is not 0 or less, else 0."""
    grad, stride, turned = laid_out(grad)
    if turned:
        grad, stride = grad.contiguous(), grad.shape[1]
    made, sums = torch.empty_like(out), out.new_empty(out.shape[1])
    _lib.twm_masked(grad.data_ptr(), stride, out.data_ptr(), made.data_ptr(), sums.data_ptr(), *out.shape)
    return made, sums


def laid_out(matrix: Tensor) -> tuple[Tensor, int, bool]:
    """(the matrix or a copy, the stride of what does not lie side by side, whether that is the columns): what the library reads."""
    rows, cols = matrix.stride()
    if cols == 1:
        return matrix, rows, False
    if rows == 1:
        return matrix, cols, True
    return matrix.contiguous(), matrix.shape[1], False
