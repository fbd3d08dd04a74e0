"""Rows on their way between slots on a device and buffers on the host, on a stream of their own beside what the device computes.

All lines that only a CUDA device needs are here (pinned memory, streams, events). For slots on the CPU the same calls copy in place, at once.

A slot is given to another row only after its batch was released: :meth:`SlotMoves.released` marks how far the device was then, and
what is moved later waits for that. A lookup waits for the event of the copy that brought its rows (:class:`Arrival`).
"""
from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..packed_copy import Place, places_of, unpack


@dataclass
class Room:
    """Where rows that come are put together: ``rows``, a view ``[count, width]`` on the host for each part, in one ``buffer`` with their slots;
    ``copy`` will hold it on the device."""

    buffer: Tensor
    places: list[Place]
    rows: list[Tensor]
    copy: Tensor


@dataclass
class Arrival:
    """The slots of one fetch on the device, which may be read after ``event`` (None: at once)."""

    slots: Tensor
    event: torch.cuda.Event | None


@dataclass
class Traffic:
    """Bytes of rows that went to the device and came back; lookups that had to wait for their rows (``late``), and for how long in all."""

    bytes_in: int = 0
    bytes_out: int = 0
    late: int = 0
    stalled: float = 0.0
    waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)  # before and after, not read yet


class SlotMoves:
    """For the slots of one table: ``parts``, tensors ``[slots, width]`` float32 of one device. Calls but :meth:`released` and :meth:`join` are
    the caller's to put in order."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = [p.data for p in parts]  # rows that come are nothing that autograd must know of: nobody has read their slots since
        self.device = parts[0].device
        self.traffic = Traffic()
        self._cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if self._cuda else None
        self._released: list[torch.cuda.Event] = []
        self._lock = threading.Lock()

    def released(self) -> None:
        """What the current stream was given so far was all that read or wrote some slots."""
        if self._cuda:
            event = torch.cuda.current_stream(self.device).record_event()
            with self._lock:
                self._released.append(event)

    def out(self, slots: Tensor, parts: Sequence[int] | None = None) -> list[Tensor]:
        """Copies on the host ``[n, width]`` of the rows in ``slots`` (int64 ``[n]``, on the host), of all parts or some. They are complete."""
        chosen = [self.parts[p] for p in (range(len(self.parts)) if parts is None else parts)]
        if not slots.numel():
            return [torch.empty(0, p.shape[1]) for p in chosen]
        with self._beside():
            places = self._to_device(slots)
            made = [self._to_host(p.index_select(0, places)) for p in chosen]
        self._finish()
        self.traffic.bytes_out += sum(m.numel() for m in made) * 4
        return made

    def room(self, slots: Tensor) -> Room:
        """Buffers for rows that will come to ``slots`` (int64 ``[n]``, on the host); all memory that :meth:`into` needs is taken here."""
        count = slots.numel()
        places, size = places_of([(torch.Size([count]), torch.int64), *((torch.Size([count, p.shape[1]]), p.dtype) for p in self.parts)])
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        first, *rows = unpack(buffer, places)
        first.copy_(slots)
        with self._beside():
            copy = torch.empty_like(buffer, device=self.device) if self._cuda else buffer
        return Room(buffer, places, rows, copy)

    def into(self, room: Room) -> None:
        """Copy what ``room`` holds to its slots: one transfer, then one indexed copy for each part."""
        with self._beside():
            if self._cuda:
                room.copy.copy_(room.buffer, non_blocking=True)
            slots, *rows = unpack(room.copy, room.places)
            for part, values in zip(self.parts, rows):
                part.index_copy_(0, slots, values)
        self.traffic.bytes_in += sum(r.numel() for r in room.rows) * 4

    def arriving(self, slots: Tensor) -> Arrival:
        """``slots`` (int64, any shape, on the host) on the device, to be read after everything that was moved so far."""
        with self._beside():
            return Arrival(self._to_device(slots), None if self._stream is None else self._stream.record_event())

    def join(self, arrival: Arrival) -> None:
        """Make the current stream wait for ``arrival``."""
        if arrival.event is None:
            return
        current = torch.cuda.current_stream(self.device)
        late = not arrival.event.query()
        before = current.record_event(torch.cuda.Event(enable_timing=True)) if late else None
        current.wait_event(arrival.event)
        arrival.slots.record_stream(current)
        if before is not None:
            after = current.record_event(torch.cuda.Event(enable_timing=True))
            with self._lock:
                self.traffic.waits.append((before, after))

    def settle(self) -> None:
        """Make the current stream wait for everything that was moved so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def counted(self) -> Traffic:
        """What was moved so far. Waits that the device has not come to yet are not counted."""
        with self._lock:
            done = [(before, after) for before, after in self.traffic.waits if after.query()]
            self.traffic.waits = [pair for pair in self.traffic.waits if not any(pair is d for d in done)]
            waited = [before.elapsed_time(after) / 1e3 for before, after in done]
            self.traffic.stalled += sum(waited)
            self.traffic.late += sum(w > 1e-5 for w in waited)  # less is the time of the events themselves
        return self.traffic

    def _beside(self):
        """On the own stream, after all that was released."""
        if self._stream is None:
            return nullcontext()
        with self._lock:
            events, self._released = self._released, []
        for event in events:
            self._stream.wait_event(event)
        return torch.cuda.stream(self._stream)

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _to_device(self, slots: Tensor) -> Tensor:
        return slots.pin_memory().to(self.device, non_blocking=True) if self._cuda else slots

    def _to_host(self, rows: Tensor) -> Tensor:
        return torch.empty_like(rows, device="cpu", pin_memory=True).copy_(rows, non_blocking=True) if self._cuda else rows
