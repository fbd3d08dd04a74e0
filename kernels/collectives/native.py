"""The C++ of this folder (native/): steps of tables cut into columns, and routes and merges of lookups that are
asked alike, and means of two ranks' gradients."""
from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..native_library import load

library, _ = load(Path(__file__).parent, "twc_abi", 4)
if library is not None:
    _word, _text, _pointer = ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
    for _function in (library.twc_squares, library.twc_step):
        _function.restype, _function.argtypes = None, [_text, _word, _word, _word]
    library.twc_route.restype = _word
    library.twc_route.argtypes = [_text, _text, _word, _pointer, _word, _word, _text, *[_word] * 3, *[_pointer] * 4]
    library.twc_merge.restype, library.twc_merge.argtypes = None, [_text, _word, _word]
    library.twc_part.restype, library.twc_part.argtypes = None, [_text, _word]
    library.twc_mean.restype, library.twc_mean.argtypes = None, [_pointer, _pointer, _word, _word]


def words(numbers: Sequence[int]) -> bytes:
    """int64 numbers as C++ reads them."""
    return struct.pack(f"={len(numbers)}q", *numbers)


def route(ids: Sequence[Tensor], rows: bytes, lengths: Tensor, used: int, ways: bytes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
    """(header, payload, places) as ``route_ids`` describes them. ``ids``: flat, of one integer dtype, on CPU, contiguous, the first ``used``
    of each in bags of ``lengths`` int64. ``rows``: of each lookup's table; ``ways``: (lookup, first row, rows) of each stream, as :func:`words`.
    ``dtype``: of the payload, int32 or int64. ``None`` where an id is outside its table."""
    assert library is not None
    bags, streams = lengths.numel(), len(ways) // 24
    payload = torch.empty(streams * (bags + used) + 1, dtype=dtype)
    places = torch.empty(streams * bags + 1, dtype=torch.int64)
    header, ends = torch.empty(streams, 3, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
    failed = library.twc_route(
        words([i.data_ptr() for i in ids]), rows, len(ids), lengths.data_ptr(), bags, used, ways, streams, ids[0].dtype == torch.int64,
        dtype == torch.int64, payload.data_ptr(), places.data_ptr(), header.data_ptr(), ends.data_ptr(),
    )  # fmt: skip
    numbers, sent = ends.tolist()
    return None if failed else (header, payload[:numbers], places[:sent])


def merges(*tensors: Tensor) -> bool:
    """Can :func:`merge` and :func:`part` take these (received rows, slots and their indices)?"""
    if library is None or not all(t.is_cpu and t.is_contiguous() for t in tensors):
        return False
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}


class Blocks(NamedTuple):
    """How rows travel, in int64 tensors. For each stream where in the slot its ``columns`` begin, and their ``widths``; ``ends``: after how many
    streams each block of rows that travel side by side ends."""

    columns: Tensor
    widths: Tensor
    ends: Tensor


def _words_of(received: Tensor, slot: Tensor, places: Tensor, header: Tensor, blocks: Blocks, scale: float = 1.0) -> bytes:
    return struct.pack(
        "=9qd", received.data_ptr(), slot.data_ptr(), slot.shape[-1], places.data_ptr(), header.data_ptr(), *(t.data_ptr() for t in blocks),
        blocks.ends.numel(), scale,
    )  # fmt: skip


def merge(received: Tensor, slot: Tensor, places: Tensor, header: Tensor, blocks: Blocks, add: bool) -> None:
    """Write the rows that came, ``header[s, 0]`` of each stream, to the rows ``places`` of ``slot`` at the stream's columns (or ``add`` them)."""
    assert library is not None
    library.twc_merge(_words_of(received, slot, places, header, blocks), add, slot.dtype == torch.float64)


def part(received: Tensor, slot: Tensor, places: Tensor, header: Tensor, blocks: Blocks, scale: float) -> None:
    """The other way: fill ``received`` with ``scale`` times what the slot has in its places."""
    assert library is not None
    library.twc_part(_words_of(received, slot, places, header, blocks, scale), slot.dtype == torch.float64)


def mean(mine: Tensor, theirs: Tensor) -> None:
    """Halves of ``mine + theirs`` in place of ``mine``: flat CPU tensors of one dtype and size. The sum is made first; both ranks get the same bits."""
    if library is not None and mine.dtype in (torch.float32, torch.float64) and mine.is_contiguous() and theirs.is_contiguous():
        library.twc_mean(mine.data_ptr(), theirs.data_ptr(), mine.numel(), mine.dtype == torch.float64)
    else:
        mine.add_(theirs).mul_(0.5)
