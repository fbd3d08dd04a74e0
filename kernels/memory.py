"""Where big tables and freed memory lie: huge pages, and a C allocator that keeps what a step frees.

Random rows of a table lie on pages of their own, and with 4 KiB pages most of a lookup's time goes into finding them: the same
lookups and updates took 1.3-1.8x as long without huge pages (26 tables of 51 MB, one Zen 5 core in a virtual machine). Only
where the pages of a table lie changes, not what is in it; a kernel that cannot do it ignores the request.

Linux, ``transparent_hugepage`` set to ``madvise`` or ``always``; ``MADV_COLLAPSE`` (Linux 6.1) moves what is there already, on a
thread of its own, at about a second per gigabyte.

A training step allocates and frees the same hundred megabytes each time. glibc gives the end of its heap back to the system whenever
little of it is in use, and every page of it is then made and zeroed again at the next step: up to 40 of 120 ms (23,000 page faults; FuxiCTR's
BST at batch 2048, one Zen 5 core in a virtual machine). :func:`keep_freed_memory` tells it to keep them.
"""
from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

SMALLEST = 8 << 20  # bytes; smaller tensors stay in the caches of the page tables
_HUGE = 2 << 20
_CHUNK = 64 << 20  # at a time, so that the process's memory map is never locked for long
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 14, 23, 25  # asm-generic/mman-common.h
KEPT = 1 << 30  # bytes of freed memory that the process keeps, at most
_LARGEST = 32 << 20  # bytes; what is larger glibc always maps by itself and gives back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_lock = threading.Lock()
_waiting: list[tuple[torch.UntypedStorage, int, int, bool]] = []  # (memory, first byte, last, whether to take it now)
_runner: threading.Thread | None = None


def use_huge_pages(tensors: Iterable[object]) -> int:
    """Ask for huge pages under the CPU memory of ``tensors`` (other values are passed over) and return at once. Returns how many bytes were asked for."""
    if not sys.platform.startswith("linux"):
        return 0
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_shared():
            storage = tensor.untyped_storage()
            if storage.nbytes() >= SMALLEST:
                storages[storage.data_ptr()] = storage
    _ask((s, -(-s.data_ptr() // _HUGE) * _HUGE, (s.data_ptr() + s.nbytes()) // _HUGE * _HUGE, False) for s in storages.values())
    return sum(storage.nbytes() for storage in storages.values())


def take_ahead(rows: Tensor) -> None:
    """Have the system give the CPU memory of ``rows`` (contiguous, of :func:`promised`) now, on the thread of huge pages, and return at once: a first
    write would wait for it (4 ms for a megabyte of new rows in a virtual machine). What is in it stays. Linux 5.14; elsewhere nothing is done."""
    if sys.platform.startswith("linux") and rows.numel():
        page = mmap.PAGESIZE
        start, end = rows.data_ptr() // page * page, -(-(rows.data_ptr() + rows.nbytes) // page) * page
        _ask([(rows.untyped_storage(), start, end, True)])


def _ask(wanted: Iterable[tuple[torch.UntypedStorage, int, int, bool]]) -> None:
    global _runner
    with _lock:
        _waiting.extend(wanted)
        if _waiting and (_runner is None or not _runner.is_alive()):
            _runner = threading.Thread(target=_run, name="tablewright huge pages", daemon=True)
            _runner.start()


def keep_freed_memory() -> int:
    """Tell the C allocator, for the whole process and from now on, to keep up to :data:`KEPT` bytes that are freed instead of giving them
    back to the system at once. Returns how many, or 0 where it is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        return 0
    return KEPT if mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, KEPT) else 0


def promised(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU whose pages are only promised: memory is taken by what is written, and reading takes none."""
    count = math.prod(shape)
    if not count:
        return torch.zeros(*shape, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # named from Python 3.12 on
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype).view(*shape)


def one_row(shape: torch.Size, dtype: torch.dtype, device: torch.device, requires_grad: bool) -> nn.Parameter:
    """A parameter of zeros that is a single row of memory on any device: it stands for a table while a model is captured, and is not trained."""
    made = nn.Parameter(torch.zeros(1, *shape[1:], dtype=dtype, device=device).expand(shape), requires_grad=requires_grad)
    made._one_row = True  # type: ignore[attr-defined]
    return made


def is_one_row(table: Tensor) -> bool:
    """Whether ``table`` is made by :func:`one_row`."""
    return getattr(table, "_one_row", False)


def wait() -> None:
    """Until all that was asked for has been tried; for measurements."""
    while (runner := _runner) is not None and runner.is_alive():
        runner.join()


def _run() -> None:
    global _runner
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    while True:
        with _lock:
            if not _waiting:
                _runner = None
                return
            storage, start, end, now = _waiting.pop(0)  # held until done, so that the memory stays what it is
        if not now and (end <= start or madvise(start, end - start, _MADV_HUGEPAGE) != 0):
            continue
        for at in range(start, end, _CHUNK):
            madvise(at, min(_CHUNK, end - at), _MADV_POPULATE_WRITE if now else _MADV_COLLAPSE)
        del storage


def _forget_in_child() -> None:
    """A forked child has no runner, and may have inherited a lock that the runner held."""
    global _lock, _runner
    _lock, _runner = threading.Lock(), None
    _waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
