"""A cache of rows on a device over a file or the host's memory: which row is in which slot is known on the host, the slots are tensors of the device.

``fetch(ids)``: the host decides which rows leave; those that training changed are gathered on the device, copied to the host and written to
the backing store; then what is missing is put together there, copied to the device in one transfer, and spread over its slots by one
indexed copy a part. All of it is done on a stream of its own, in whatever thread calls it (a prefetch), and in this order, so that a row
that left is in the store before anyone may read it again. The kernels then see a table of ``slots`` rows.

The same code runs with slots on the CPU, which is how it is tested where there is no GPU. It has not been run on a GPU yet.
"""
from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .cache import Counters, HostRows, Part, RowCache, TierError
from .slot_moves import Arrival, Room, SlotMoves
from .table import TieredTable

_word, _words, _places = ctypes.c_int64, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_void_p)
_MOVE = ctypes.CFUNCTYPE(_word, _word, _words, _word, _words, _places, _places)  # native/cache.h says what it does


@dataclass(frozen=True)
class DeviceCounters(Counters):
    """Besides those of a cache on the host: bytes of rows that went to the device and came back from it, ``late`` lookups whose rows were still on
    their way when the device came to them, and the seconds that it was ``stalled`` by that (both 0 where the slots are on the CPU)."""

    bytes_in: int
    bytes_out: int
    late: int
    stalled: float

    def __str__(self) -> str:
        return (
            f"{self.hits:,} hits and {self.misses:,} misses ({self.hit_rate:.1%} hits); {self.bytes_in / 1e6:,.1f} MB of rows to the device and "
            f"{self.bytes_out / 1e6:,.1f} MB back; {self.late:,} lookups had to wait for rows, {self.stalled:.3f} s in all"
        )


class DeviceCache(RowCache):
    """:class:`RowCache` whose ``memory`` lies on any one device. What it does with errors: a fetch that fails leaves the cache as it was; where rows
    could not be brought to their slots after all (the device failed), every later call raises :class:`TierError`."""

    _on_host = False

    def __init__(
        self, folder: str | Path | HostRows, rows: int, parts: Sequence[Part], slots: int, *, seed: int = 0, policy: str = "lru",
        memory: Sequence[Tensor] | None = None, create: bool = True, generation: int = -1,
    ) -> None:  # fmt: skip
        super().__init__(folder, rows, parts, slots, seed=seed, policy=policy, memory=memory, create=create, generation=generation)
        self._moves = SlotMoves(self.parts)
        self._order = threading.RLock()  # of everything that moves rows
        self._call_back = _MOVE(self._move)
        self._room: Room | None = None
        self._buffers: list[Tensor] = []  # of rows that leave, while the C++ library reads them
        self._error: BaseException | None = None
        self._lost: BaseException | None = None
        self._arrivals: dict[int, Arrival] = {}  # by ticket

    @property
    def about(self) -> str:
        """What makes its rows: how many, what each holds, and what they start from."""
        return f"{self.rows} rows of {list(self._parts)}, seed {self.seed}"

    def fetch(self, ids: Tensor, *, train: bool = True, later: bool = False) -> tuple[Tensor, int]:
        """As in :class:`RowCache`, ``ids`` and slots on the host; the slots may be read on the device after :meth:`join`."""
        ids = ids.to(torch.int64).contiguous()
        slots = torch.empty_like(ids)
        with self._order:
            ticket = self._moving("fetch", ids.data_ptr(), ids.numel(), slots.data_ptr(), None, train, self._call_back, False)
            if self._room is not None:
                room, self._room = self._room, None
                try:
                    self._moves.into(room)
                except BaseException as error:
                    self._lost = error
                    raise
        return slots, ticket

    def on_device(self, slots: Tensor, ticket: int) -> Tensor:
        """``slots`` of a fetch (or what was made of them), on the device."""
        with self._order:
            arrival = self._arrivals[ticket] = self._moves.arriving(slots)
        return arrival.slots

    def join(self, ticket: int) -> None:
        """Make the device's current stream wait until the rows of a fetch are in their slots."""
        if (arrival := self._arrivals.pop(ticket, None)) is not None:
            self._moves.join(arrival)

    def release(self, ticket: int) -> None:
        """As in :class:`RowCache`: what the current stream was given so far is all that read or updated these rows."""
        self._arrivals.pop(ticket, None)
        self._moves.released()
        super().release(ticket)

    def prepare(self) -> int:
        """As in :class:`RowCache`; with :class:`HostRows`, all rows are there afterwards."""
        with self._order:
            self._moves.released()
            self._moving("prepare", None, self._call_back)
            return super().counters().generation + 1

    def read(self, ids: Tensor, part: int = 0) -> Tensor:
        """As in :class:`RowCache`, on the host."""
        ids = ids.to(torch.int64).contiguous()
        with self._order:
            slots = self._slots_of(ids, change=False)
            here = slots >= 0
            if not bool(here.any()):
                return super().read(ids, part)
            out = torch.empty(ids.numel(), self._parts[part].width)
            out[~here] = super().read(ids[~here], part)
            self._moves.released()
            out[here] = self._moves.out(slots[here], [part])[0]
            return out

    def write(self, ids: Tensor, values: Tensor, part: int = 0) -> None:
        """As in :class:`RowCache`."""
        ids, values = ids.to(torch.int64).contiguous(), values.to(torch.float32)
        with self._order:
            slots = self._slots_of(ids, change=True)
            here = (slots >= 0).cpu()
            super().write(ids[~here], values.cpu()[~here], part)
            if bool(here.any()):
                self._moves.settle()
                device = self.parts[part].device
                self.parts[part].data[slots[here].to(device)] = values[here.to(values.device)].to(device)

    def forget(self) -> None:
        """Drop what is cached: the rows of :class:`HostRows` were replaced. Raises :class:`TierError` while batches are under way."""
        with self._order:
            self._call("forget")

    def counters(self) -> DeviceCounters:
        """What happened so far."""
        traffic = self._moves.counted()
        return DeviceCounters(**asdict(super().counters()), bytes_in=traffic.bytes_in, bytes_out=traffic.bytes_out, late=traffic.late, stalled=traffic.stalled)

    def _open_handle(self) -> int:
        if self._lost is not None:
            raise TierError(f"rows were lost on their way to {self.parts[0].device} ({self._lost}): go on from the last snapshot")
        return super()._open_handle()

    def _slots_of(self, ids: Tensor, change: bool) -> Tensor:
        slots = torch.empty_like(ids)
        self._call("places", ids.data_ptr(), ids.numel(), slots.data_ptr(), change)
        return slots

    def _moving(self, name: str, *arguments: object) -> int:
        """A call that may come back through :meth:`_move`; what that raised is raised here."""
        self._error = self._room = None
        try:
            return self._call(name, *arguments)
        except TierError:
            self._room = None
            if self._error is not None:
                raise self._error from None
            raise
        finally:
            self._buffers = []

    def _move(self, leaving: int, leaving_slots, coming: int, coming_slots, sources, targets) -> int:
        try:
            if leaving:
                self._buffers = self._moves.out(_copied(leaving_slots, leaving))
                for part, buffer in enumerate(self._buffers):
                    sources[part] = buffer.data_ptr()
            if coming:
                self._room = self._moves.room(_copied(coming_slots, coming))
                for part, rows in enumerate(self._room.rows):
                    targets[part] = rows.data_ptr()
            return 0
        except BaseException as error:  # noqa: B036 - it goes through C++ and is raised by _moving
            self._error = error
            return 1


def _copied(words, count: int) -> Tensor:
    made = torch.empty(count, dtype=torch.int64)
    ctypes.memmove(made.data_ptr(), words, count * 8)
    return made


class DeviceTable(TieredTable):
    """:class:`TieredTable` whose slots are on a device. Ids that are there come to the host, unless they were prefetched.

    ``known``: the batch whose inputs the calling thread runs the model on, so that what was prefetched for it needs no comparison, for which
    the device would have to wait.
    """

    cache: DeviceCache

    def __init__(self, name: str, cache: DeviceCache, memory: list[Tensor], padding: int | None) -> None:
        super().__init__(name, cache, memory, padding)  # type: ignore[arg-type]
        self._thread = threading.local()
        self.compared = 0  # lookups whose ids were compared with what was prefetched, because the batch was not known

    @property
    def known(self) -> int | None:
        """See the class."""
        return getattr(self._thread, "batch", None)

    @known.setter
    def known(self, batch: int | None) -> None:
        self._thread.batch = batch

    def _fetched_for(self, ids: Tensor, ahead: tuple[int, Tensor, Tensor, int, bool]) -> bool:
        if ahead[0] == self.known and ahead[1].shape == ids.shape:
            return True
        self.compared += 1
        return torch.equal(ahead[1], ids.cpu())

    def _fetch(self, ids: Tensor, train: bool, later: bool = False) -> tuple[Tensor, int]:
        slots, ticket = super()._fetch(ids.cpu(), train, later)
        return self.cache.on_device(slots, ticket), ticket

    def prefetch(self, ids: Tensor, batch: int) -> None:
        """As in :class:`TieredTable`; ``ids`` on the host spare the device a wait."""
        super().prefetch(ids.cpu(), batch)

    def _taken(self, ticket: int) -> None:
        self.cache.join(ticket)
