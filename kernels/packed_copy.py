"""The tensors of a batch in one buffer: one copy to the device, and tensors in the copy.

``tensors -> buffer (pinned) -> copy on the device -> tensors of the same dtypes, shapes and values``

A batch of many small tensors costs one transfer instead of one for each, and the transfer goes on beside what the device computes.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 128  # bytes: more than any vector load of a kernel asks for


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in a buffer: from byte ``start`` on, contiguous."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """How many elements."""
        return math.prod(self.shape)


def can_pack(tensor: object) -> bool:
    """Whether this is a plain tensor on the CPU that no gradient goes through."""
    return (
        type(tensor) is Tensor and tensor.is_cpu and tensor.layout == torch.strided and not tensor.requires_grad
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )  # fmt: skip


def places_of(wanted: Iterable[tuple[torch.Size, torch.dtype]]) -> tuple[list[Place], int]:
    """Where tensors of these shapes and dtypes lie in a buffer, and its bytes."""
    places, end = [], 0
    for shape, dtype in wanted:
        place = Place(-(-end // ALIGNMENT) * ALIGNMENT, shape, dtype)
        places.append(place)
        end = place.start + place.count * dtype.itemsize
    return places, end


def pack(tensors: Sequence[Tensor], pin: bool = False) -> tuple[Tensor, list[Place]]:
    """One uint8 tensor ``[bytes]`` with the values of ``tensors`` (each :func:`can_pack`), in pinned memory if asked, and where each is."""
    places, end = places_of((t.shape, t.dtype) for t in tensors)
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
    for tensor, view in zip(tensors, unpack(buffer, places)):
        view.copy_(tensor)
    return buffer, places


def unpack(buffer: Tensor, places: Sequence[Place]) -> list[Tensor]:
    """Tensors in the memory of ``buffer``, contiguous; a write to one is no write to another for autograd."""
    storage = buffer.untyped_storage()
    made = []
    for place in places:
        empty = torch.empty(0, dtype=place.dtype, device=buffer.device)
        first = (buffer.storage_offset() + place.start) // place.dtype.itemsize
        made.append(empty.set_(storage, first, place.shape) if place.count else empty.reshape(place.shape))  # type: ignore[call-overload]
    return made


class Arriving:
    """``tensors`` (each :func:`can_pack`) on their way to ``device``. :attr:`tensors` may be used after :meth:`join`; ``bytes``: of the copy."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        buffer, places = pack(tensors, pin=device.type == "cuda")
        self.bytes = buffer.numel()
        self._event: torch.cuda.Event | None = None
        if stream is None:
            self._copy = buffer.to(device)
        else:
            with torch.cuda.stream(stream):
                self._copy = buffer.to(device, non_blocking=True)
                self._event = stream.record_event()
        self.tensors = unpack(self._copy, places)

    def join(self) -> None:
        """Make the current stream wait for the copy; may be called again, from any thread."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._copy.device)
            current.wait_event(self._event)
            self._copy.record_stream(current)
