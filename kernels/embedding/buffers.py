"""Large CPU tensors from memory that is used again.

glibc gives blocks over 32 MB back to the kernel when they are freed, so every training step would pay for fresh zeroed pages: for
the gradients and outputs of a table group that costs more than computing them. :func:`empty` hands out tensors over anonymous
memory maps that stay mapped. A map is free again when no storage refers to it any more, which its reference count says; so a
tensor that is still in use anywhere (a kept ``.grad``, a saved activation, a view) is never handed out twice.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; below it the allocator's own free lists do well
KEEP = 1 << 30  # bytes of idle memory kept at most
_HUGE = 2 << 20
_MADV_COLLAPSE = 25  # linux/mman.h; not in Python's mmap

_maps: dict[int, list[mmap.mmap]] = {}  # by size
_lock = threading.Lock()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor, like ``torch.empty(shape, dtype=dtype)``."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype)
    # Rounded up by at most an eighth, so that sizes that vary a little from step to step share their maps.
    step = 1 << max(size.bit_length() - 4, 12)
    size = -(-size // step) * step
    with _lock:
        held = _maps.setdefault(size, [])
        counts = _references(held)
        if _IDLE in counts:
            block = held[counts.index(_IDLE)]
        else:
            _drop_idle(KEEP - size)
            block = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                block.madvise(mmap.MADV_HUGEPAGE)
            _maps.setdefault(size, []).append(block)
        return torch.frombuffer(block, dtype=dtype, count=count).view(tuple(shape))


def _references(held: list[mmap.mmap]) -> list[int]:
    """How many references each map has: some for the list and this function, and one more per live storage over it."""
    return [sys.getrefcount(block) for block in held]


# Counted by the same function, since what a running function holds differs between Python versions.
_IDLE = _references([mmap.mmap(-1, mmap.PAGESIZE)])[0]


def _drop_idle(keep: int) -> None:
    """Unmap idle maps until at most ``keep`` bytes of them are left."""
    idle = sum(size * _references(held).count(_IDLE) for size, held in _maps.items())
    for size in list(_maps):
        held, counts = _maps[size], _references(_maps[size])
        for place in reversed(range(len(held))):
            if idle > keep and counts[place] == _IDLE:
                del held[place]
                idle -= size
        if not held:
            del _maps[size]


def use_huge_pages(tensors: Sequence[Tensor]) -> int:
    """Back the memory of large CPU tensors with 2 MB pages, in place, and return how many bytes now are. Values do not change.

    Random rows of a table of more than a few MB miss the TLB, and the page walk then costs as much as the row. Measured on
    26 tables of 100,000 rows, dim 128: lookups 1.1-1.3 times and updates 1.3-1.5 times as fast. Takes about a second per
    GB (the kernel copies), so it pays once, for tables that are trained for long. Linux 6.1 or newer; elsewhere does nothing.
    """
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    done = 0
    for tensor in tensors:
        if not tensor.is_cpu or not tensor.is_contiguous():
            continue
        begin = -(-tensor.data_ptr() // _HUGE) * _HUGE
        length = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // _HUGE * _HUGE - begin
        if length > 0 and madvise(begin, length, mmap.MADV_HUGEPAGE) == 0 and madvise(begin, length, _MADV_COLLAPSE) == 0:
            done += length
    return done
