"""A hash map from 64-bit ids to the slots of a table: admission by frequency, eviction, growth.

An id gets a slot in the call in which it has been seen ``admit_after`` times since it had none (every occurrence counts, but no two calls
give different answers within themselves: the whole call is counted first). Where all ``capacity`` slots are taken another id leaves:

=====  ============================================================================================================
lru    the one whose last call is longest ago; among equals the one that came first in that call
lfu    the one that fewest calls looked up (tables read twice in a step make two) since it was admitted; among equals as ``lru``
age    the one that was admitted longest ago
=====  ============================================================================================================

Slots of a call stay until :meth:`IdMap.release`. What is not admitted is remembered with its count: of the latest ``capacity`` different
ids at least; older ones are forgotten, and counted as such. The map takes about 80 bytes for each id that has a slot.
"""
from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from ..native_library import declare, load

POLICIES = ("lru", "lfu", "age")
LARGEST = 2**31 - 2  # slots

_lib, _why_not = load(Path(__file__).parent, "twd_abi", 3)
if _lib is not None:
    _word, _pointer = ctypes.c_int64, ctypes.c_void_p
    _signatures = {
        "open": (_pointer, [_word, _word, _word]),
        "close": (None, [_pointer]),
        "error": (ctypes.c_char_p, []),
        "fetch": (_word, [_pointer, _pointer, _word, _word, _word, _word, *[_pointer] * 4]),
        "release": (_word, [_pointer, _word]),
        "counters": (None, [_pointer, _pointer]),
        "list": (_word, [*[_pointer] * 4, _word]),
        "waiting": (_word, [*[_pointer] * 4, _word]),
        "load": (_word, [_pointer, _pointer, _pointer, _word, _pointer, _pointer, _pointer, _word]),
    }
    declare(_lib, "twd_", _signatures)


class IdMapError(RuntimeError):
    """A map that has no room for the ids under way, or that cannot take what is loaded into it."""


def available() -> str:
    """"" where the library is there, else why it is not."""
    return _why_not


@dataclass(frozen=True)
class Counters:
    """Since the map was made. ``rows``: ids that have a slot now; ``waiting``: ids that were seen and not admitted yet. Of training calls:
    ``lookups`` (ids looked up, every occurrence), ``defaults`` of them read the default row; likewise ``evaluated`` and ``unknown``, of
    calls that admit nothing. ``admitted``, ``evicted``: ids that got a slot, that lost theirs; ``forgotten``: ids that waited and whose
    counts were dropped. ``batches``: calls whose slots are held."""

    rows: int
    waiting: int
    lookups: int
    defaults: int
    evaluated: int
    unknown: int
    admitted: int
    evicted: int
    forgotten: int
    batches: int


class IdMap:
    """``slots``: the most ids that have one at a time, below 2**31 - 1. Raises :class:`IdMapError` without the library and ``ValueError`` for
    arguments that cannot be. Calls are safe from several threads."""

    def __init__(self, slots: int, admit_after: int = 1, policy: str = "lru") -> None:
        if _lib is None:
            raise IdMapError(f"dynamic ids need the C++ library: {_why_not}")
        if not 1 <= slots <= LARGEST or admit_after < 1 or policy not in POLICIES:
            raise ValueError(f"slots from 1 to {LARGEST}, admit_after >= 1 and a policy of {POLICIES}; they are {slots}, {admit_after}, {policy!r}")
        self.slots = slots
        self._handle = _lib.twd_open(slots, admit_after, POLICIES.index(policy))
        if not self._handle:
            raise IdMapError(_lib.twd_error().decode())

    def fetch(self, ids: Tensor, *, admit: bool = True, leave_out: int | None = None) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """``(slots, fresh ids, fresh slots, ticket, how many of ids have no slot)``. ``slots``: int64 of the shape of ``ids`` (int64, any shape); ``self.slots`` for the id
        ``leave_out``, ``self.slots + 1`` for ids that have none. ``fresh``: what was admitted by this call, ``[k]`` int64 each: their slots
        held nothing, or another id's row. ``admit=False`` changes and counts nothing but what it looked up.

        Raises :class:`IdMapError` where more ids would be admitted than there are slots that nobody holds; the map is then as it was."""
        ids = ids.to("cpu", torch.int64).contiguous()
        slots = torch.empty_like(ids)
        fresh = torch.empty(2, ids.numel() if admit else 0, dtype=torch.int64)
        counted = (ctypes.c_int64 * 2)()
        ticket = self._call(
            "fetch", ids.data_ptr(), ids.numel(), admit, leave_out is not None, leave_out or 0, slots.data_ptr(),
            fresh.data_ptr(), fresh.data_ptr() + 8 * fresh.shape[1], ctypes.addressof(counted),
        )  # fmt: skip
        return slots, fresh[0, : counted[0]], fresh[1, : counted[0]], ticket, counted[1]

    def release(self, ticket: int) -> None:
        """The call of ``ticket`` is done: its slots may be given to other ids."""
        self._call("release", ticket)

    def items(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(ids, slots, uses)``, int64 ``[n]`` each, in the order in which ids would leave; ``uses``: in how many calls each was looked up."""
        out = self._listed("list")
        return out[0], out[1], out[2]

    def waiting(self) -> Tensor:
        """``[m, 3]`` int64 of the ids that wait: id, how often it was seen, and 1 if it is of the older half. In ascending order of ids."""
        out = self._listed("waiting")
        return out[:, torch.argsort(out[0])].t().contiguous()

    def _listed(self, name: str) -> Tensor:
        """Three columns of what there is; what another thread adds meanwhile is left out."""
        out = torch.empty(3, self._call(name, None, None, None, 0), dtype=torch.int64)
        return out[:, : self._call(name, *(row.data_ptr() for row in out), out.shape[1])]

    def load(self, ids: Tensor, uses: Tensor, waiting: Tensor) -> None:
        """Hold exactly ``ids`` (``[n]``, ``ids[i]`` in slot ``i``, in the order in which they leave) and ``waiting`` from now on; tickets of
        earlier calls are void. Raises :class:`IdMapError`, and nothing changes, for more ids than slots and for an id that is there twice."""
        ids, uses = (t.detach().to("cpu", torch.int64).contiguous() for t in (ids, uses))
        columns = waiting.detach().to("cpu", torch.int64).t().contiguous()
        self._call("load", ids.data_ptr(), uses.data_ptr(), ids.numel(), *(row.data_ptr() for row in columns), columns.shape[1])

    def counters(self) -> Counters:
        """What happened so far."""
        out = numpy.zeros(10, dtype=numpy.int64)
        _lib.twd_counters(self._handle, out.ctypes.data)
        return Counters(*map(int, out))

    def _call(self, name: str, *arguments: object) -> int:
        result = getattr(_lib, f"twd_{name}")(self._handle, *arguments)
        if result < 0:
            raise IdMapError(_lib.twd_error().decode())
        return result

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _lib.twd_close(self._handle)
            self._handle = None
