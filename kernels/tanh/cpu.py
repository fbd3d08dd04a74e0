"""tanh of float32 on CPU in C++ (native/), within 3 units in the last place of the exact value.

PyTorch's own goes through MKL, which on AMD processors takes 2.3 ns a value; its sigmoid takes 0.24.
"""
from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..native_library import declare, load

_SIDE_BY_SIDE = torch.ops.aten.is_non_overlapping_and_dense.default

_lib, _why_not = load(Path(__file__).parent, "twh_abi", 1)
if _lib is not None:
    declare(_lib, "twh_", {"tanh": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64])})


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    return "native" if _lib is not None else f"PyTorch's tanh: {_why_not}"


def available() -> bool:
    """Is the library there?"""
    return _lib is not None


def serves(x: Tensor) -> bool:
    """May :func:`tanh` and :func:`tanh_` take ``x``: float32 on CPU, its values side by side in memory, in whatever order?"""
    return _lib is not None and x.is_cpu and x.dtype == torch.float32 and (x.is_contiguous() or _SIDE_BY_SIDE(x))


def tanh(x: Tensor) -> Tensor:
    """tanh of ``x``, as a new tensor of the same strides."""
    out = torch.empty_like(x)
    _run(x, out)
    return out


def tanh_(x: Tensor) -> Tensor:
    """tanh of ``x``, in its place, by PyTorch where :func:`serves` says no. For values that no one else holds: autograd does not see it."""
    if not serves(x):
        return x.tanh_()
    _run(x, x)
    return x


def _run(x: Tensor, out: Tensor) -> None:
    _lib.twh_tanh(x.data_ptr(), out.data_ptr(), x.numel(), torch.get_num_threads())  # type: ignore[union-attr]
