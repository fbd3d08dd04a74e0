"""Interactions on CPU in C++ (native/): same functions and meanings as reference.py, which does the work wherever the library is
missing or the layout is outside of what it covers.

Half precision is widened to float32 first and rounded once at the end. Float32 rows whose dots are wanted in bfloat16 are rounded as they are
read, where the processor multiplies bfloat16 and the pairs are a lower triangle.
"""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..embedding import buffers
from ..native_library import load
from . import reference
from .pairs import check, decode, index_tensors

_LEVELS = ("baseline", "AVX2", "AVX-512")  # of twi_level()
_DOTS, _PRODUCTS, _FM = range(3)  # enum Kind of native/abi.h
_BAD_PAIR, _NO_MEMORY = 1, 2
_CPU = torch.device("cpu")


class _Call(ctypes.Structure):
    """struct Call of native/abi.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "wide", "backward", "threads", "batch", "features", "dim")),
        *((name, ctypes.c_int64) for name in ("x", "x_batch", "x_feature", "y", "y_batch", "y_item", "dx")),
        *((name, ctypes.c_int64) for name in ("pairs", "first", "second", "reduce", "low")),
        ("scale", ctypes.c_double),
    ]


_lib, _why_not = load(Path(__file__).parent, "twi_abi", 2)
if _lib is not None:
    _lib.twi_level.restype, _lib.twi_level.argtypes = ctypes.c_int64, [ctypes.c_int64]
    _lib.twi_low.restype = ctypes.c_int64
    _lib.twi_run.restype, _lib.twi_run.argtypes = ctypes.c_int64, [ctypes.POINTER(_Call)]


def describe() -> str:
    """What does the work, in a few words: for reports and bug reports."""
    return f"pure PyTorch: {_why_not}" if _lib is None else f"native {_LEVELS[_lib.twi_level(-1)]}"


def rounds(x: Tensor, pairs: str, dtype: torch.dtype) -> bool:
    """Do :func:`dots` and :func:`dots_backward` take ``x`` as it is where results and their gradients are ``dtype``?"""
    return x.dtype == torch.float32 and dtype == torch.bfloat16 and pairs == f"{x.shape[1]} lower" and _lib is not None and bool(_lib.twi_low())


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """An uninitialised tensor, from memory that is used again where it is large."""
    return buffers.empty(shape, dtype)


def _plain(x: Tensor) -> bool:
    return _lib is None or x.dtype not in (torch.float32, torch.float64)


def _half(x: Tensor) -> bool:
    return _lib is not None and x.dtype in (torch.float16, torch.bfloat16)


def _rows(x: Tensor) -> Tensor:
    """``x`` with rows that lie in one piece."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _run(kind: int, x: Tensor, y: Tensor, pairs: str = "", dx: Tensor | None = None, reduce: bool = False, scale: float = 1.0) -> None:
    call = _Call(
        kind, x.dtype == torch.float64, dx is not None, torch.get_num_threads(), *x.shape,
        x.data_ptr(), x.stride(0), x.stride(1), y.data_ptr(), y.stride(0), 0 if y.dim() < 2 else y.stride(1),
        0 if dx is None else dx.data_ptr(), reduce=reduce, low=x.dtype != y.dtype, scale=scale,
    )  # fmt: skip
    if kind != _FM:
        first, second = index_tensors(pairs, _CPU)
        call.pairs, call.first, call.second = first.numel(), first.data_ptr(), second.data_ptr()
    result = _lib.twi_run(ctypes.byref(call))
    if result == _NO_MEMORY:
        raise MemoryError("the interaction kernels could not allocate their workspace")
    if result == _BAD_PAIR:
        check(decode(pairs), x.shape[1])
        raise RuntimeError("the C++ interaction kernels refused pairs that the reference accepts")


def dots(x: Tensor, pairs: str, out: Tensor | None = None, beside: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
    """See :func:`reference.dots`. ``out``: where to write, ``[batch, pairs]`` of x's dtype, or one that :func:`rounds`, with any strides.
    ``beside``: tensors to copy, each with where to."""
    for extra, columns in beside:
        columns.copy_(extra)
    if out is not None and out.dtype != x.dtype:
        if out.stride(1) != 1:
            return out.copy_(dots(x, pairs, torch.empty_like(out, memory_format=torch.contiguous_format)))
        _run(_DOTS, _rows(x), out, pairs)
        return out
    if _half(x) or _plain(x):
        made = dots(x.float(), pairs).to(x.dtype) if _half(x) else reference.dots(x, pairs)
        return made if out is None else out.copy_(made)
    y = empty((x.shape[0], len(decode(pairs))), x.dtype) if out is None else out
    _run(_DOTS, _rows(x), y, pairs)
    return y


def _grads_of(kind: int, grad: Tensor, x: Tensor, pairs: str = "", **options) -> Tensor:
    dx = empty(x.shape, x.dtype)
    _run(kind, _rows(x), grad, pairs, dx, **options)
    return dx


def dots_backward(grad: Tensor, x: Tensor, pairs: str) -> Tensor:
    """See :func:`reference.dots_backward`. ``grad``: of x's dtype, or of one that :func:`rounds`."""
    if grad.dtype != x.dtype:
        return _grads_of(_DOTS, grad if grad.stride(1) == 1 else grad.contiguous(), x, pairs)
    if _half(x):
        return dots_backward(grad.float(), x.float(), pairs).to(x.dtype)
    if _plain(x):
        return reference.dots_backward(grad, x, pairs)
    return _grads_of(_DOTS, grad, x, pairs)


def products(x: Tensor, pairs: str) -> Tensor:
    """See :func:`reference.products`."""
    if _plain(x):
        return reference.products(x, pairs)
    y = empty((x.shape[0], len(decode(pairs)), x.shape[2]), x.dtype)
    _run(_PRODUCTS, _rows(x), y, pairs)
    return y


def products_backward(grad: Tensor, x: Tensor, pairs: str) -> Tensor:
    """See :func:`reference.products_backward`."""
    if _half(x):
        return products_backward(grad.float(), x.float(), pairs).to(x.dtype)
    if _plain(x):
        return reference.products_backward(grad, x, pairs)
    return _grads_of(_PRODUCTS, _rows(grad), x, pairs)


def fm(x: Tensor, scale: float, reduce: bool) -> Tensor:
    """See :func:`reference.fm`."""
    if _half(x):
        return fm(x.float(), scale, reduce).to(x.dtype)
    if _plain(x):
        return reference.fm(x, scale, reduce)
    y = empty((x.shape[0],) if reduce else (x.shape[0], x.shape[2]), x.dtype)
    _run(_FM, _rows(x), y, reduce=reduce, scale=scale)
    return y


def fm_backward(grad: Tensor, x: Tensor, scale: float, reduce: bool) -> Tensor:
    """See :func:`reference.fm_backward`."""
    if _half(x):
        return fm_backward(grad.float(), x.float(), scale, reduce).to(x.dtype)
    if _plain(x):
        return reference.fm_backward(grad, x, scale, reduce)
    return _grads_of(_FM, grad, x, reduce=reduce, scale=scale)
