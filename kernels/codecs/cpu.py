"""The C++ kernels for rowwise int8 and for stochastic rounding; where they were not built, ``op.py`` computes the same in PyTorch.

Measured with 26 x 2048 rows of dim 128, one thread of a Zen 5, ms: encode 1.21 (PyTorch 30, FBGEMM 1.61), decode 0.83 (PyTorch 39, FBGEMM
1.15); copying the floats takes 1.35.
"""
from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..native_library import load

_LEVELS = ("baseline", "AVX2", "AVX-512")  # of twc_level()

_lib, _why_not = load(Path(__file__).parent, "twc_abi", 2)
if _lib is not None:
    _word, _pointer = ctypes.c_int64, ctypes.c_void_p
    _lib.twc_level.restype, _lib.twc_level.argtypes = _word, [_word]
    _lib.twc_encode.restype = _lib.twc_decode.restype = None
    _lib.twc_write_rounded.restype = None
    _lib.twc_write_rounded.argtypes = [_pointer, _pointer, _pointer, _pointer, _word, _word, _word, _word, _word]
    _lib.twc_encode.argtypes = _lib.twc_decode.argtypes = [_pointer, _word, _pointer, _word, _word, _word]


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    return f"pure PyTorch: {_why_not}" if _lib is None else f"native {_LEVELS[_lib.twc_level(-1)]}"


def serves(rows: Tensor) -> bool:
    """Are there C++ kernels for them?"""
    return _lib is not None and rows.is_cpu


def encode(rows: Tensor) -> Tensor:
    """``rows`` ``[n, dim]``, floating, on CPU -> the int8 payload of ``op.py``."""
    rows = rows.float()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    n, dim = rows.shape
    payload = torch.empty(n, dim + 8, dtype=torch.uint8)
    _lib.twc_encode(rows.data_ptr(), rows.stride(0), payload.data_ptr(), n, dim, torch.get_num_threads())
    return payload


def decode(payload: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """An int8 payload -> its rows, ``[n, dim]`` of ``dtype``."""
    if payload.stride(1) != 1:
        payload = payload.contiguous()
    rows = torch.empty(len(payload), dim)
    _lib.twc_decode(payload.data_ptr(), payload.stride(0), rows.data_ptr(), len(payload), dim, torch.get_num_threads())
    return rows.to(dtype)


def write_rounded(table: Tensor, rows: Tensor, values: Tensor, hashes: Tensor) -> bool:
    """``table[rows] = values``, rounded as ``embedding/rounding.py`` says, on CPU. False: nothing was done."""
    fits = _lib is not None and table.is_cpu and table.stride(1) == 1 and values.is_contiguous() and rows.is_contiguous()
    if fits:
        n, dim = values.shape
        pointers = values.data_ptr(), rows.data_ptr(), hashes.data_ptr(), table.data_ptr()
        _lib.twc_write_rounded(*pointers, table.stride(0), n, dim, table.dtype == torch.bfloat16, torch.get_num_threads())
    return fits
