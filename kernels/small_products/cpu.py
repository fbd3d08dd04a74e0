"""Products of small matrices on CPU in C++ (native/), for float32; :func:`serves` says what it takes."""
from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..native_library import load


class _Call(ctypes.Structure):
    """struct Call of native/abi.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("outer", "inner", "m", "n", "k", "threads")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "y")),
        *((name, ctypes.c_int64) for name in ("a_outer", "a_inner", "a_m", "a_k", "b_outer", "b_inner", "b_k", "b_n")),
    ]


WIDEST = 256  # columns of a product
_MOST = 1 << 17  # values of a right-hand matrix: what stays in a processor's second cache

_LEVELS = ("baseline", "AVX2", "AVX-512")  # of twp_level()
_lib, _why_not = load(Path(__file__).parent, "twp_abi", 2)
if _lib is not None:
    _lib.twp_level.restype, _lib.twp_level.argtypes = ctypes.c_int64, [ctypes.c_int64]
    _lib.twp_run.restype, _lib.twp_run.argtypes = ctypes.c_int64, [ctypes.POINTER(_Call)]


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    return f"pure PyTorch: {_why_not}" if _lib is None else f"native {_LEVELS[_lib.twp_level(-1)]}"


def available() -> bool:
    """Is the library there?"""
    return _lib is not None


def serves(a: Tensor, b: Tensor) -> bool:
    """May :func:`product` take them: float32 on CPU, one or two leading dimensions of equal sizes, a narrow result that is not empty?"""
    if not available() or a.dtype != torch.float32 or b.dtype != torch.float32 or not (a.is_cpu and b.is_cpu):
        return False
    if a.is_neg() or b.is_neg():  # the memory holds the numbers with the other sign
        return False
    fits = a.dim() == b.dim() in (3, 4) and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
    return fits and 0 < b.shape[-1] <= WIDEST and b.shape[-2] * b.shape[-1] <= _MOST and a.numel() > 0


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``: ``[*, m, k]``, ``[*, k, n]``, any strides -> ``[*, m, n]``, contiguous and fresh. Raises ``MemoryError``."""
    y = a.new_empty((*a.shape[:-1], b.shape[-1]))
    outer = a.shape[0] if a.dim() == 4 else 1
    strides = [(0,) * (4 - t.dim()) + t.stride() for t in (a, b)]
    call = _Call(
        outer, a.shape[-3], a.shape[-2], b.shape[-1], a.shape[-1], torch.get_num_threads(), a.data_ptr(), b.data_ptr(), y.data_ptr(),
        *strides[0], *strides[1],
    )  # fmt: skip
    if _lib.twp_run(ctypes.byref(call)):  # type: ignore[union-attr]
        raise MemoryError("a product of small matrices could not allocate its workspace")
    return y
