"""The sort of a backward: the reads of all its tables at once, in order of the rows they read.

The order depends on ids alone, which the forward knows. So :func:`sort_ahead` sorts on a second stream beside the forward and what comes after
it, and :func:`sort_reads` finds the result there if it has sorted the same ids for the same tables, of which only addresses
and factors of gradients are missing then. What was sorted lives as long as whoever keeps it: a backward that never comes, or comes
for other tables, costs that memory and time and nothing else. While a CUDA graph is recorded the streams join at the end of the forward, so
that forward and backward may be two graphs.

``triton_keys.py`` says what runs, chunks and pieces are.
"""

# Triton types what a kernel takes as constexpr; and which entries of a list are None follows from another list.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..side_stream import Beside, beside
from .gpu_launch import TYPES, Lookups, alignment, capturing, on_device, one_type, send
from .spec import GroupSpec
from .triton_common import LookupEntry
from .triton_keys import CHUNK, CHUNKS_PER_PROGRAM, KEY_TILES, count_kernel, keys_kernel, pieces_kernel

CHUNK_SIZE = CHUNK.value


@dataclass(eq=False)
class Sorted:
    """The keys of the reads of some tables in order, and their pieces: see ``triton_keys.py``. ``order``: where each read was."""

    keys: Tensor
    order: Tensor
    before: Tensor
    starts: Tensor
    ranks: Tensor
    held: list[Tensor | None]  # ids and offsets: while they live, no others are at their addresses
    beside: Beside | None = None  # where it is being made

    def join(self) -> None:
        """Make the current stream wait for it."""
        if self.beside is not None:
            self.beside.join()
            self.beside.handed_over([self.keys, self.order, self.before, self.starts, self.ranks])
            self.beside = None


_ahead: weakref.WeakValueDictionary[tuple, Sorted] = weakref.WeakValueDictionary()  # by what was sorted


@dataclass
class Runs:
    """The reads of some tables, sorted. ``segments``: table -> (first chunk, end chunk, key of row 0)."""

    sorted: Sorted
    sources: Tensor
    scales: Tensor
    chunks: int
    segments: dict[int, tuple[int, int, int]]
    aligned: dict[int, int]  # table -> elements one load of its gradients may take
    grads: list[Tensor | None]  # held while kernels read them by address
    grad_type: torch.dtype
    scaled: bool


class _Layout:
    """Where the reads of each table lie among all reads, and the entries that say so. ``grads`` has None for gradients not known yet."""

    def __init__(self, spec: GroupSpec, reads: Lookups, tables, indices, used: Sequence[bool], grads, size: int) -> None:
        of_table: dict[int, list[int]] = {}
        for i, lookup in enumerate(spec.lookups):
            if used[i]:
                of_table.setdefault(lookup.table, []).append(i)
        self.entries: list[LookupEntry] = []
        self.segments: dict[int, tuple[int, int, int]] = {}
        self.aligned: dict[int, int] = {}
        self.programs = position = key = 0
        for t, lookups in of_table.items():
            begin = position
            read_count = sum(indices[i].numel() for i in lookups)
            end = begin + (read_count // CHUNK_SIZE + 1) * CHUNK_SIZE  # at least one unused read: see triton_keys.py
            addresses = []
            for i in lookups:
                lookup, grad = spec.lookups[i], grads[spec.lookups[i].slot]
                own = indices[i].numel() if i != lookups[-1] else end - position
                addresses.append(0 if grad is None else grad.data_ptr() + lookup.column * size)
                kind = 0 if lookup.pooling == "none" else 1
                place = {"position": position, "slots": own, "key": key}
                entry = reads.entry(i, self.programs, kind, addresses[-1], spec.slots[lookup.slot], train=True, **place)
                self.entries.append(entry)
                self.programs += max(1, triton.cdiv(entry.bags, KEY_TILES[kind][0]))
                position += own
            self.segments[t] = (begin // CHUNK_SIZE, end // CHUNK_SIZE, key)
            widths = [spec.slots[spec.lookups[i].slot] for i in lookups]
            self.aligned[t] = alignment(size, tables[t].shape[1], *widths, addresses=addresses)
            key += tables[t].shape[0] + 1
        if position >= 2**31:
            raise ValueError(f"{position} ids in one step: the kernels count to 2**31; split the batch")
        self.reads, self.key_type = position, torch.int32 if key < 2**31 else torch.int64


def sort_reads(
    spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, wanted: Sequence[bool], ranked: bool
) -> Runs | None:
    """Sort the reads of the wanted tables, or take what was sorted ahead; None if no wanted table has a gradient."""
    used = [wanted[lookup.table] and slot_grads[lookup.slot] is not None for lookup in spec.lookups]
    if not any(used):
        return None
    device = tables[0].device
    reads = Lookups(spec, tables, indices, offsets, sample_weights, used)
    grads, grad_type = one_type(slot_grads, [g is not None for g in slot_grads], torch.float32)
    layout = _Layout(spec, reads, tables, indices, used, grads, grad_type.itemsize)
    scaled = reads.weight_type is not None or any(u and lookup.pooling == "mean" for u, lookup in zip(used, spec.lookups))
    sources = torch.empty(layout.reads, dtype=torch.int64, device=device)
    scales = torch.empty(layout.reads if scaled else 1, dtype=torch.float32, device=device)
    found = _ahead.get(_what(spec, tables, indices, offsets, used, ranked)) if _ahead else None
    keys = None if found else torch.empty(layout.reads, dtype=layout.key_type, device=device)
    with on_device(device):
        keys_kernel[(layout.programs,)](
            send(layout.entries, device), keys, sources, scales, len(layout.entries), TYPES[grad_type], TYPES[layout.key_type],
            **reads.types, WEIGHT_T=reads.weight_type, SCALED=scaled, TILES=KEY_TILES,
        )  # fmt: skip
        if found is None:
            found = _sorted(keys, ranked)
        found.join()
    chunks = layout.reads // CHUNK_SIZE
    return Runs(found, sources, scales, chunks, layout.segments, layout.aligned, grads, grad_type, scaled)


def sort_ahead(spec: GroupSpec, tables, indices, offsets, wanted: Sequence[bool], ranked: bool) -> Sorted | None:
    """Sort for a :func:`sort_reads` with the same arguments and a gradient for every slot, on a second stream. Keep the result until the
    backward, and call :func:`join_captured` after the forward. None if no wanted table is looked up."""
    used = [wanted[lookup.table] for lookup in spec.lookups]
    if not any(used):
        return None
    device = tables[0].device
    what = _what(spec, tables, indices, offsets, used, ranked)
    if what in _ahead:
        return _ahead[what]
    with beside(device) as side:
        reads = Lookups(spec, tables, indices, offsets, [None] * len(spec.lookups), used)
        layout = _Layout(spec, reads, tables, indices, used, [None] * len(spec.slots), 1)
        keys = torch.empty(layout.reads, dtype=layout.key_type, device=device)
        with on_device(device):
            keys_kernel[(layout.programs,)](
                send(layout.entries, device), keys, None, None, len(layout.entries), TYPES[torch.float32], TYPES[layout.key_type],
                **reads.types, WEIGHT_T=None, SCALED=False, TILES=KEY_TILES,
            )  # fmt: skip
            made = _sorted(keys, ranked)
    made.held, made.beside = [*indices, *offsets], side
    side.reads(t for t in made.held if t is not None)
    _ahead[what] = made
    return made


def join_captured(made: Sequence[Sorted]) -> None:
    """Where a CUDA graph is being recorded, join the second stream: a graph may end with the forward."""
    if made and capturing():
        for each in made:
            each.join()


def _what(spec: GroupSpec, tables, indices, offsets, used: Sequence[bool], ranked: bool) -> tuple:
    """All that the sorted keys depend on. A changed tensor of ids has another version, a freed one's address is not used again while what
    was sorted from it lives."""
    numbers: dict[int, int] = {}  # of tables, in the order of their segments
    parts = []
    for lookup, ids, offs, use in zip(spec.lookups, indices, offsets, used):
        if use:
            at = tuple((t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) for t in (ids, offs) if t is not None)
            how = lookup.pooling == "none", lookup.padding_idx, lookup.include_last_offset, lookup.wrap_negative
            parts.append((numbers.setdefault(lookup.table, len(numbers)), tables[lookup.table].shape[0], at, how))
    return ranked, tables[0].device, tuple(parts)


def _sorted(keys: Tensor, ranked: bool) -> Sorted:
    chunks, device = keys.numel() // CHUNK_SIZE, keys.device
    keys, order = torch.sort(keys, stable=True)
    counts = torch.zeros(2, chunks + 1, dtype=torch.int32, device=device)
    grid = (triton.cdiv(chunks, CHUNKS_PER_PROGRAM.value),)
    count_kernel[grid](keys, counts, chunks)
    before = torch.cumsum(counts, 1, dtype=torch.int32)
    starts = torch.empty(keys.numel(), dtype=torch.int32, device=device)
    ranks = torch.empty(keys.numel() if ranked else 1, dtype=torch.int32, device=device)
    pieces_kernel[grid](keys, before, starts, ranks, chunks, ranked)
    return Sorted(keys, order, before, starts, ranks, [])
