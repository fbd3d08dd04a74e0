"""Rows of a table that is larger than memory: a set-associative cache of them in memory, all of them in a file.

The cache *is* a table for the kernels: ``cache.parts[0]`` holds weights and the other parts the state of their optimizer, one slot for each
row that is present. A batch's ids become slots with :meth:`RowCache.fetch` (what is missing is read, or made from ``(seed, row)`` if it
was never written; what leaves is written back), and the kernels for tables in memory do the rest, so that training is the same bit for
bit. Slots of a batch stay until :meth:`RowCache.release`. :meth:`RowCache.snapshot` makes all of it durable at once; after a crash the
folder opens as of the last snapshot (native/store.h says how).
"""
from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from ..memory import promised
from ..native_library import declare, load

WAYS = 16  # slots in a set
STARTS = ("constant", "uniform", "normal")
POLICIES = ("lru", "lfu")

_lib, _why_not = load(Path(__file__).parent, "twt_abi", 3)
if _lib is not None:
    _word, _pointer, _real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    _signatures = {
        "open": (_pointer, [ctypes.c_char_p, _word, _word, *[_pointer] * 4, ctypes.c_uint64, _word, _word, _word, _word]),
        "open_memory": (_pointer, [_pointer, _pointer, _word, _word, *[_pointer] * 4, ctypes.c_uint64, _word, _word]),
        "close": (None, [_pointer]),
        "error": (ctypes.c_char_p, []),
        "fetch": (_word, [_pointer, _pointer, _word, _pointer, _pointer, _word, _pointer, _word]),
        "complete": (_word, [_pointer, _word, _pointer]),
        "prepare": (_word, [_pointer, _pointer, _pointer]),
        "finish": (_word, [_pointer]),
        "places": (_word, [_pointer, _pointer, _word, _pointer, _word]),
        "forget": (_word, [_pointer]),
        "peek": (_word, [_pointer, _pointer, _word, _word, _pointer, _pointer]),
        "poke": (_word, [_pointer, _pointer, _word, _word, _pointer, _pointer]),
        "start": (None, [_word, _word, _real, _real, _word, ctypes.c_uint64, _pointer, _word, _pointer]),
    }
    declare(_lib, "twt_", _signatures)
    _brief = ctypes.PyDLL(_lib._name, handle=_lib._handle)  # short calls, in which no other thread gets Python's lock: the training one would wait for it
    declare(_brief, "twt_", {"release": (_word, [_pointer, _word]), "ready": (_word, [_pointer, _word]), "counters": (None, [_pointer, _pointer])})


class TierError(RuntimeError):
    """A store that cannot be opened, read or written, or a cache that is too small for the batches under way."""


def available() -> str:
    """"" where the library is there, else why it is not."""
    return _why_not


@dataclass(frozen=True)
class Part:
    """What a row holds: ``width`` float32 numbers (a table's dim, or one number for a rowwise state). ``start``: "constant" (``a``),
    "uniform" (from ``a`` to ``b``, 24 bits) or "normal" (mean ``a``, deviation ``b``; the sum of twelve uniforms, Irwin-Hall)."""

    width: int
    start: str = "constant"
    a: float = 0.0
    b: float = 0.0

    def rows(self, number: int, seed: int, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The starting values ``[n, width]`` of this part (the ``number``-th) in ``rows`` ``[n]`` int64, written into ``out`` (contiguous float32)
        where it is given."""
        out = torch.empty(rows.numel(), self.width) if out is None else out
        _lib.twt_start(self.width * 4, STARTS.index(self.start), self.a, self.b, number, seed, rows.contiguous().data_ptr(), rows.numel(), out.data_ptr())
        return out


@dataclass(frozen=True)
class Counters:
    """Since the cache was opened: distinct rows of batches that were ``hits`` or ``misses``; of the misses, ``made`` from the seed or ``read``
    from the store; ``written``: rows written back because they left. ``present``: rows in the cache; ``journal``: rows written since the last
    snapshot; ``stored``: rows of the snapshot that training changed; ``generation``: its number; ``batches``: under way."""

    hits: int
    misses: int
    made: int
    read: int
    written: int
    present: int
    journal: int
    stored: int
    generation: int
    batches: int

    @property
    def hit_rate(self) -> float:
        """Hits of all distinct rows of batches."""
        return self.hits / max(1, self.hits + self.misses)


class HostRows:
    """Memory for all ``rows`` of a table: ``records`` ``[rows, width]`` float32, the parts of a row side by side, taken from the system as rows
    are written (in huge pages where Linux has them: 2 MB for the first of neighbours); ``written``: one bit for each row that ever was, ``[(rows + 7) // 8]`` uint8. Rows that were not start from ``(seed, row)``."""

    def __init__(self, rows: int, parts: Sequence[Part]) -> None:
        self.records = promised((rows, sum(p.width for p in parts)), torch.float32)
        self.written = torch.zeros((rows + 7) // 8, dtype=torch.uint8)


class RowCache:
    """``slots`` rows of a table of ``rows`` in memory, all in ``folder`` (made if it is not there). ``generation``: the newest snapshot that
    counts, where it is one of several tables'; one that was prepared and is newer is dropped.

    ``parts``: what each row holds; ``parts[0]`` are the weights. ``memory``: tensors ``[slots, width]`` float32 on CPU, one for each part, to
    use; made here by default. ``policy``: "lru" or "lfu" decides which row leaves. Raises :class:`TierError` for a folder that holds another
    table, is damaged, truncated, or in use by another process, and ``ValueError`` for arguments that cannot be.

    In place of a folder there may be :class:`HostRows`: memory that holds all rows, and no file.

    Calls are safe from several threads; the values of slots are the caller's to protect while their batch is under way.
    """

    _on_host: ClassVar[bool] = True  # whether the slots are memory that the C++ library can address

    def __init__(
        self, folder: str | Path | HostRows, rows: int, parts: Sequence[Part], slots: int, *, seed: int = 0, policy: str = "lru",
        memory: Sequence[Tensor] | None = None, create: bool = True, generation: int = -1,
    ) -> None:  # fmt: skip
        if _lib is None:
            raise TierError(f"tables in tiers need the C++ library: {_why_not}")
        if rows < 1 or slots < WAYS or policy not in POLICIES or any(p.start not in STARTS or p.width < 1 for p in parts):
            raise ValueError(f"rows >= 1, slots >= {WAYS}, a policy of {POLICIES} and starts of {STARTS}; they are {rows}, {slots}, {policy!r}, {parts}")
        self.rows, self.slots, self.seed = rows, slots // WAYS * WAYS, seed
        self._parts = tuple(parts)
        self.parts = [torch.empty(self.slots, p.width) for p in parts] if memory is None else list(memory)
        for tensor, part in zip(self.parts, parts):
            fits = tuple(tensor.shape) == (self.slots, part.width) and tensor.dtype == torch.float32 and tensor.is_contiguous()
            if not fits or (self._on_host and not tensor.is_cpu):
                raise ValueError(f"memory for a part is a contiguous float32 {'CPU ' * self._on_host}tensor of {(self.slots, part.width)}; it is {tensor.dtype} {tuple(tensor.shape)}")
        numbers = [
            numpy.array([p.width * 4 for p in parts]), numpy.array([STARTS.index(p.start) for p in parts]),
            numpy.array([p.a for p in parts], dtype=float), numpy.array([p.b for p in parts], dtype=float),
        ]  # fmt: skip
        described = len(parts), *(n.ctypes.data for n in numbers), seed % 2**64, self.slots, policy == "lfu"
        if isinstance(folder, HostRows):
            self._handle = _lib.twt_open_memory(folder.records.data_ptr(), folder.written.data_ptr(), rows, *described)
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._handle = _lib.twt_open(str(folder).encode(), rows, *described, create, generation)
        if not self._handle:
            raise TierError(_lib.twt_error().decode())
        self.host_rows = folder if isinstance(folder, HostRows) else None
        self._owner, self._folder = os.getpid(), "" if isinstance(folder, HostRows) else str(folder)

    @property
    def _arrays(self) -> ctypes.Array:
        """Where the parts are now: read at every call, since tensors may be moved."""
        return (ctypes.c_void_p * len(self.parts))(*(p.data_ptr() for p in self.parts))

    def fetch(self, ids: Tensor, *, train: bool = True, later: bool = False) -> tuple[Tensor, int]:
        """The slots of ``ids`` (int64, any shape), of that shape, and a ticket for :meth:`release`. ``train``: what is fetched will be changed.
        ``later``: rows may be read or changed there only after :meth:`complete`, so that nobody waits for the disk before that.

        Raises :class:`TierError` for an id out of range, for a cache too small (the cache then is as it was before), and for a store that
        cannot be read.
        """
        ids = ids.to(torch.int64).contiguous()
        slots = torch.empty_like(ids)
        ticket = self._call("fetch", ids.data_ptr(), ids.numel(), slots.data_ptr(), self._arrays, train, None, later)
        return slots, ticket

    def complete(self, ticket: int) -> None:
        """Have the rows of a fetch for ``later`` in their slots. Raises :class:`TierError` where they could not be read; the ticket is to be
        released then, too."""
        if not _brief.twt_ready(self._open_handle(), ticket):
            self._call("complete", ticket, self._arrays)

    def release(self, ticket: int) -> None:
        """The batch of ``ticket`` is done: its rows may leave."""
        if _brief.twt_release(self._open_handle(), ticket) < 0:
            raise TierError(_lib.twt_error().decode())

    def snapshot(self) -> int:
        """Everything as it is now becomes what opens after a crash, or nothing does; returns the snapshot's number."""
        self.prepare()
        self.finish()
        return self.counters().generation

    def prepare(self) -> int:
        """The first half of a snapshot of several tables: it is complete, but opens only where ``generation`` says so. Nothing may be
        looked up until :meth:`finish`. Returns the number that it will have."""
        self._call("prepare", self._arrays, None)
        return self.counters().generation + 1

    def finish(self) -> None:
        """The second half: the snapshot that was prepared is the one that opens."""
        self._call("finish")

    def read(self, ids: Tensor, part: int = 0) -> Tensor:
        """A copy ``[n, width]`` of rows as they are now, cached or not; the cache stays as it is."""
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty(ids.numel(), self._parts[part].width)
        self._call("peek", ids.data_ptr(), ids.numel(), part, out.data_ptr(), self._arrays)
        return out

    def write(self, ids: Tensor, values: Tensor, part: int = 0) -> None:
        """Set one part of rows to ``values`` ``[n, width]``."""
        ids, values = ids.to(torch.int64).contiguous(), values.to(torch.float32).contiguous()
        if tuple(values.shape) != (ids.numel(), self._parts[part].width):
            raise ValueError(f"values are {tuple(values.shape)} for {ids.numel()} rows of {self._parts[part].width}")
        self._call("poke", ids.data_ptr(), ids.numel(), part, values.data_ptr(), self._arrays)

    def counters(self) -> Counters:
        """What happened so far."""
        out = (ctypes.c_int64 * 10)()
        _brief.twt_counters(self._open_handle(), out)
        return Counters(*out)

    def close(self) -> None:
        """Let go of the folder. What came after the last snapshot is dropped, as in a crash."""
        if self._handle and self._owner == os.getpid():  # a fork leaves it to the process that opened it
            _lib.twt_close(self._handle)
        self._handle = None

    def _open_handle(self) -> int:
        if not self._handle:
            raise TierError("this cache was closed")
        if self._folder and self._owner != os.getpid():
            raise TierError(
                f"{self._folder} is written by process {self._owner}, and this is a fork of it ({os.getpid()}), which would overwrite its rows: use the "
                "table in one process, and start others that need a model with the method 'spawn', each with a folder of its own"
            )
        return self._handle

    def _call(self, name: str, *arguments: object) -> int:
        result = getattr(_lib, f"twt_{name}")(self._open_handle(), *arguments)
        if result < 0:
            raise TierError(_lib.twt_error().decode())
        return result

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()
