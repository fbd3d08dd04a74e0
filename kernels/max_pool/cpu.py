"""The maximum over the rows of a bag on CPU in C++ (native/): same functions and meanings as plain.py, for float32 and float64.

Measured on an AMD EPYC (Zen 5), torch 2.13, one thread: see op.py.
"""
from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..native_library import load
from .plain import KINDS, MODES, How


class _Call(ctypes.Structure):
    """struct Call of native/max_pool.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "mode", "wide", "threads", "bags", "length", "dim", "rows", "stride", "padding")),
        *((name, ctypes.c_void_p) for name in ("weight", "ids", "starts", "mask")),
        ("fill", ctypes.c_double), ("out", ctypes.c_void_p), ("chosen", ctypes.c_void_p),
    ]  # fmt: skip


_NO_MEMORY = "the gradient of a maximum could not allocate its workspace"
_lib, _why_not = load(Path(__file__).parent, "twm_abi", 1)
if _lib is not None:
    _word, _pointer = ctypes.c_int64, ctypes.c_void_p
    _lib.twm_forward.restype, _lib.twm_forward.argtypes = _word, [ctypes.POINTER(_Call)]
    _lib.twm_unique.restype, _lib.twm_unique.argtypes = _word, [_pointer, _word, _word, _word, _pointer, _pointer]
    _lib.twm_backward.restype, _lib.twm_backward.argtypes = _word, [ctypes.POINTER(_Call), _pointer, _pointer, _pointer]


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    return "native" if _lib is not None else f"pure PyTorch: {_why_not}"


def serves(weight: Tensor) -> bool:
    """Can the C++ kernels read this table?"""
    plain = weight.is_cpu and weight.dtype in (torch.float32, torch.float64) and weight.stride(1) == 1 and weight.shape[1] > 0
    return _lib is not None and plain


def _call(weight: Tensor, ids: Tensor, starts: Tensor | None, mask: Tensor | None, out: Tensor, chosen: Tensor, how: How) -> _Call:
    return _Call(
        KINDS.index(how.kind), MODES.index(how.mode), weight.dtype == torch.float64, torch.get_num_threads(), *out.shape[:1],
        0 if starts is not None else ids.shape[1], weight.shape[1], weight.shape[0], weight.stride(0), how.padding_idx,
        weight.data_ptr(), ids.data_ptr(), None if starts is None else starts.data_ptr(), None if mask is None else mask.data_ptr(),
        how.fill, out.data_ptr(), chosen.data_ptr(),
    )  # fmt: skip


def forward(weight: Tensor, ids: Tensor, starts: Tensor | None, mask: Tensor | None, how: How) -> tuple[Tensor, Tensor]:
    """See ``plain.forward``; the second result is int32. ``ids`` and ``starts`` are contiguous int64, ``mask`` contiguous.

    Raises IndexError for an id outside of the table."""
    bags = len(ids) if starts is None else len(starts) - 1
    out = weight.new_empty(bags, weight.shape[1])
    chosen = torch.empty(out.shape, dtype=torch.int32)
    bad = _lib.twm_forward(ctypes.byref(_call(weight, ids, starts, mask, out, chosen, how)))  # type: ignore[union-attr]
    if bad >= 0:
        raise IndexError(f"id {int(ids.view(-1)[bad])} is out of range for a table of {weight.shape[0]} rows")
    return out, chosen


def slots(weight: Tensor, ids: Tensor, how: How) -> tuple[Tensor | None, Tensor]:
    """See ``plain.slots``; the second result is int32."""
    flat = ids.view(-1)
    if how.grad == "dense":
        return None, torch.where(flat == how.padding_idx, -1, flat).int()
    rows, number = torch.empty_like(flat), torch.empty(flat.shape, dtype=torch.int32)
    count = _lib.twm_unique(  # type: ignore[union-attr]
        flat.data_ptr(), flat.numel(), weight.shape[0], how.padding_idx, rows.data_ptr(), number.data_ptr()
    )
    if count < 0:
        raise MemoryError(_NO_MEMORY)
    return rows[:count].clone(), number


def backward(grad: Tensor, weight: Tensor, ids, starts, mask, out: Tensor, chosen: Tensor, how: How, rows, numbers: Tensor) -> Tensor:
    """See ``plain.backward``."""
    made = grad.new_zeros(weight.shape[0] if rows is None else len(rows), weight.shape[1])
    call = _call(weight, ids, starts, mask, out, chosen, how)
    grad = grad.contiguous()
    if not _lib.twm_backward(ctypes.byref(call), grad.data_ptr(), numbers.data_ptr(), made.data_ptr()):  # type: ignore[union-attr]
        raise MemoryError(_NO_MEMORY)
    return made
