"""Interactions on a GPU: the launches of the Triton kernels, with the signatures and meanings of ``reference.py``.

float64, more than ``MOST_FEATURES`` features and pairs that repeat go to ``reference.py``. Nothing here waits for the GPU but the
first call with new pairs, which sends them there.
"""
from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..embedding.gpu_launch import TYPES, on_device
from . import reference
from .pairs import check, decode, index_tensors
from .triton_kernels import (
    dots_backward_kernel,
    dots_kernel,
    fm_backward_kernel,
    fm_kernel,
    products_backward_kernel,
    products_kernel,
)  # fmt: skip

MOST_FEATURES = 128  # their square of sums stays in registers
_COMPILER_BEFORE_3_7 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def rounds(x: Tensor, pairs: str, dtype: torch.dtype) -> bool:
    """Never: see :func:`cpu.rounds`."""
    return False


@functools.cache
def where(pairs: str, features: int, device: torch.device) -> Tensor:
    """int32 ``[features, features]``: the number of the pair (i, j) at ``[max, min]``, -1 where there is none."""
    where = torch.full((features, features), -1, dtype=torch.int32)
    for p, (i, j) in enumerate(zip(decode(pairs).first, decode(pairs).second)):
        where[max(i, j), min(i, j)] = p
    return where.to(device)


@functools.cache
def _incident(pairs: str, features: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each feature the numbers of its pairs and its partners in them, as int32 (starts, numbers, partners)."""
    lists: list[list[tuple[int, int]]] = [[] for _ in range(features)]
    for p, (i, j) in enumerate(zip(decode(pairs).first, decode(pairs).second)):
        lists[i].append((p, j))
        lists[j].append((p, i))
    starts = torch.tensor([0, *(len(entries) for entries in lists)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    flat = torch.tensor([e for entries in lists for e in entries], dtype=torch.int32).view(-1, 2)
    return starts.to(device), flat[:, 0].contiguous().to(device), flat[:, 1].contiguous().to(device)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def square_options(features: int, dim: int, dtype: torch.dtype, wide: bool = False) -> dict:
    """Tile sizes, precision and warps of the kernels that hold a square of features; ``wide``: products in float32 at any rate."""
    rows = max(16, triton.next_power_of_2(features))
    wide = wide or dtype == torch.float32
    widest, warps = {16: (32, 2), 32: (32, 4), 64: (16, 8), 128: (16, 16)}[rows]  # so that nothing is spilled on sm_90
    if not wide:
        widest = 128 if rows <= 32 else 64
    columns = min(widest, max(16, triton.next_power_of_2(dim)))
    if columns == 128 and _COMPILER_BEFORE_3_7:
        warps = 8  # with 4, measured on 3.7, the assembler that triton 3.6 brings spills
    precision = "ieee" if dtype == torch.float32 else "tf32"
    stages = 1 if columns >= dim else 3  # a loop of one step has nothing to load ahead
    return {"BF": rows, "BD": columns, "WIDE": wide, "PRECISION": precision, "num_warps": warps, "num_stages": stages}


def must_widen(x: Tensor, pairs: str, backward: bool = False) -> bool:
    """Where half-precision products would not do: in Triton's interpreter, which cannot multiply bfloat16, and in a backward with pairs (i, i),
    whose gradient counts twice and might overflow."""
    doubled = backward and any(i == j for i, j in zip(decode(pairs).first, decode(pairs).second))
    return doubled or (x.dtype == torch.bfloat16 and x.device.type == "cpu")


def _by_square(x: Tensor, pairs: str) -> bool:
    return x.dtype in TYPES and x.shape[1] <= MOST_FEATURES and decode(pairs).distinct and x.numel() > 0


def copy_options(beside: Sequence[tuple[Tensor, Tensor]], out: Tensor) -> tuple[tuple, dict]:
    """(arguments for the kernels' ``side``, its constants): the first of ``beside`` is copied by the kernel, the others here."""
    mine = beside[:1] if beside and beside[0][0].stride(-1) == 1 and beside[0][0].dtype == out.dtype else ()
    for extra, columns in beside[len(mine) :]:
        columns.copy_(extra)
    if not mine:
        return (out, 0, 0, 0), {"SIDE": False}
    extra, columns = mine[0]
    return (extra, extra.stride(0), extra.shape[1], columns.storage_offset() - out.storage_offset()), {"SIDE": True}


def dots(x: Tensor, pairs: str, out: Tensor | None = None, beside: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
    """See :func:`reference.dots`. ``out``: where to write, ``[batch, pairs]`` of x's dtype with rows in one piece. ``beside``: tensors to
    copy, each with where to, in the rows of ``out``'s storage."""
    if not _by_square(x, pairs):
        for extra, columns in beside:
            columns.copy_(extra)
        made = reference.dots(x, pairs)
        return made if out is None else out.copy_(made)
    check(decode(pairs), x.shape[1])
    x = _rows(x)
    batch, features, dim = x.shape
    y = empty((batch, len(decode(pairs))), x.dtype, x.device) if out is None else out
    side, copies = copy_options(beside, y)
    with on_device(x.device):
        dots_kernel[(batch,)](
            x, x.stride(0), x.stride(1), where(pairs, features, x.device), y, y.stride(0), features, dim, *side, **copies,
            **square_options(features, dim, x.dtype, must_widen(x, pairs)),
        )  # fmt: skip
    return y


def dots_backward(grad: Tensor, x: Tensor, pairs: str) -> Tensor:
    """See :func:`reference.dots_backward`."""
    if not _by_square(x, pairs):
        return reference.dots_backward(grad, x, pairs)
    x = _rows(x)
    batch, features, dim = x.shape
    dx = empty(x.shape, x.dtype, x.device)
    with on_device(x.device):
        dots_backward_kernel[(batch,)](
            grad, grad.stride(0), grad.stride(1), x, x.stride(0), x.stride(1), where(pairs, features, x.device), dx, features, dim,
            **square_options(features, dim, x.dtype, must_widen(x, pairs, backward=True) or grad.dtype != x.dtype),
        )  # fmt: skip
    return dx


def column_options(dim: int) -> dict:
    """Tile size and warps of the kernels that sweep over columns."""
    columns = min(256, triton.next_power_of_2(dim))
    return {"BD": columns, "num_warps": 1 if columns <= 64 else 2}


def products(x: Tensor, pairs: str) -> Tensor:
    """See :func:`reference.products`."""
    if x.dtype not in TYPES or x.numel() == 0:
        return reference.products(x, pairs)
    check(decode(pairs), x.shape[1])
    x = _rows(x)
    batch, _, dim = x.shape
    count = len(decode(pairs))
    y = empty((batch, count, dim), x.dtype, x.device)
    columns = min(128, triton.next_power_of_2(dim))
    rows = max(1, 1024 // columns)
    with on_device(x.device):
        products_kernel[(batch, triton.cdiv(count, rows))](
            x, x.stride(0), x.stride(1), *index_tensors(pairs, x.device), y, count, dim, BP=rows, BD=columns
        )
    return y


def products_backward(grad: Tensor, x: Tensor, pairs: str) -> Tensor:
    """See :func:`reference.products_backward`."""
    if x.dtype not in TYPES or x.numel() == 0:
        return reference.products_backward(grad, x, pairs)
    x, grad = _rows(x), _rows(grad)
    batch, features, dim = x.shape
    dx = empty(x.shape, x.dtype, x.device)
    with on_device(x.device):
        products_backward_kernel[(batch, features)](
            grad, grad.stride(0), grad.stride(1), x, x.stride(0), x.stride(1), *_incident(pairs, features, x.device), dx,
            features, dim, **column_options(dim),
        )  # fmt: skip
    return dx


def fm(x: Tensor, scale: float, reduce: bool) -> Tensor:
    """See :func:`reference.fm`."""
    if x.dtype not in TYPES or x.numel() == 0:
        return reference.fm(x, scale, reduce)
    x = _rows(x)
    batch, features, dim = x.shape
    y = empty((batch,) if reduce else (batch, dim), x.dtype, x.device)
    with on_device(x.device):
        fm_kernel[(batch,)](x, x.stride(0), x.stride(1), y, features, dim, scale, REDUCE=reduce, **column_options(dim))
    return y


def fm_backward(grad: Tensor, x: Tensor, scale: float, reduce: bool) -> Tensor:
    """See :func:`reference.fm_backward`."""
    if x.dtype not in TYPES or x.numel() == 0:
        return reference.fm_backward(grad, x, scale, reduce)
    x = _rows(x)
    batch, features, dim = x.shape
    dx = empty(x.shape, x.dtype, x.device)
    with on_device(x.device):
        fm_backward_kernel[(batch,)](
            grad, grad.stride(0), 0 if reduce else grad.stride(1), x, x.stride(0), x.stride(1), dx, features, dim, scale,
            **column_options(dim),
        )  # fmt: skip
    return dx
