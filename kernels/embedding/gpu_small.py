"""The launches for small tables in a backward: see ``triton_small.py``."""

# Triton types what a kernel takes as constexpr; and which entries of a list are None follows from another list.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
from __future__ import annotations

import torch
import triton
from torch import Tensor

from .gpu_backward import Finish, group_by_launch
from .gpu_launch import TYPES, Lookups, alignment, on_device, one_type, send
from .spec import GroupSpec
from .triton_backward import RowEntry
from .triton_common import LookupEntry, tile_rows
from .triton_small import SLICE, counts_kernel, finish_kernel

ROWS = 512  # of the largest table that is small
BLOCK_ROWS, BLOCK_COLUMNS = (16, 64), (16, 32, 64)  # of one program's product


def finish_small(spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, finishes: dict[int, Finish]) -> None:
    """Sum the gradients of the tables of ``finishes`` (table -> what becomes of its rows) and finish the rows that were read."""
    used = [lookup.table in finishes and slot_grads[lookup.slot] is not None for lookup in spec.lookups]
    if not any(used):
        return
    device = tables[0].device
    reads = Lookups(spec, tables, indices, offsets, sample_weights, used)
    grads, grad_type = one_type(slot_grads, [g is not None for g in slot_grads], torch.float32)
    pitch = -16 * (-max(tables[t].shape[1] for t in finishes) // 16)
    entries: list[LookupEntry] = []
    kinds: dict[tuple[int, ...], int] = {}
    places: dict[int, tuple[int, int]] = {}  # table -> its first place, its slices
    program = place = 0
    for t in finishes:
        first, slices, (rows, dim) = place, 0, tables[t].shape
        down = next((b for b in BLOCK_ROWS if rows <= b), BLOCK_ROWS[-1])
        wide = next((b for b in BLOCK_COLUMNS if dim <= b), BLOCK_COLUMNS[-1])
        for i, lookup in enumerate(spec.lookups):
            if not used[i] or lookup.table != t:
                continue
            grad, width = grads[lookup.slot], spec.slots[lookup.slot]
            out = grad.data_ptr() + lookup.column * grad_type.itemsize
            vector = alignment(grad_type.itemsize, dim, width, addresses=[out])
            kind = kinds.setdefault((down, wide, vector, lookup.pooling == "none"), len(kinds))
            entry = reads.entry(i, program, kind, out, width, train=True, position=place)
            parts = triton.cdiv(entry.bags, SLICE.value)
            if parts:
                entries.append(entry)
            program += parts * triton.cdiv(rows, down) * triton.cdiv(dim, wide)
            place, slices = place + parts * rows, slices + parts
        places[t] = first, slices
    if not program:
        return
    scaled = reads.weight_type is not None or any(u and lookup.pooling == "mean" for u, lookup in zip(used, spec.lookups))
    # The interpreter multiplies the bits of bfloat16 as if they were numbers.
    half = grad_type != torch.float32 and not scaled and device.type == "cuda"
    partials = torch.empty(place * pitch, dtype=torch.float32, device=device)
    seen = torch.empty(place, dtype=torch.int32, device=device)
    with on_device(device):
        counts_kernel[(program,)](
            send(entries, device), partials, seen, pitch, len(entries), tuple(kinds), TYPES[grad_type],
            TYPES[grad_type if half else torch.float32], **reads.types, WEIGHT_T=reads.weight_type, SCALED=scaled,
        )  # fmt: skip
    for launch, group in group_by_launch([f for t, f in finishes.items() if places[t][1]]).items():
        _finish(group, launch, places, partials, seen, pitch)


def _finish(group: list[Finish], launch: tuple, places: dict[int, tuple[int, int]], partials: Tensor, seen: Tensor, pitch: int) -> None:
    rule, target_type, state_type, rounded = launch
    kinds: dict[tuple[int, ...], int] = {}
    entries = []
    program = 0
    for finish in group:
        block = triton.next_power_of_2(finish.target.shape[1])
        kind = kinds.setdefault((tile_rows(block), block, finish.alignment()), len(kinds))
        first, slices = places[finish.table]
        entries.append(RowEntry(program, 0, kind, first, 0, 0, **finish.fields(), given=slices))
        program += triton.cdiv(finish.rows, tile_rows(block))
    with on_device(partials.device):
        finish_kernel[(program,)](
            send(entries, partials.device), partials, seen, pitch, len(entries), tuple(kinds), rule, TYPES[target_type],
            TYPES[state_type], rounded,
        )  # fmt: skip
