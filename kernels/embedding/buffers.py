"""Large CPU tensors from memory that is used again.

glibc gives blocks over 32 MB back to the kernel when they are freed, so every training step would pay for fresh zeroed pages: for
the gradients and outputs of a table group that costs more than computing them. :func:`empty` hands out tensors over anonymous
memory maps that stay mapped. A map is free again when no storage refers to it any more, which its reference count says; so a
tensor that is still in use anywhere (a kept ``.grad``, a saved activation, a view) is never handed out twice.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; below it the allocator's own free lists do well
KEEP = 1 << 30  # bytes of idle memory kept at most

# Python's default is shared with forked children, who would write into the parent's tensors.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}

_maps: dict[int, list[mmap.mmap]] = {}  # by size
_lock = threading.Lock()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous CPU tensor, like ``torch.empty(shape, dtype=dtype)``."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the default device is
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
            block = mmap.mmap(-1, size, **_PRIVATE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                block.madvise(mmap.MADV_HUGEPAGE)
            _maps.setdefault(size, []).append(block)
        # resize_, not view: autograd forbids writing in place to a custom function's result that is a view
        return torch.frombuffer(block, dtype=dtype, count=count).resize_(tuple(shape))


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


def _forget_in_child() -> None:
    """A forked child may have inherited a held lock."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
