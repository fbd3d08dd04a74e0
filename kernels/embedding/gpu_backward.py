"""The launches of a backward: sort the reads of all tables at once, then sum the runs and finish their rows.

Used by ``gpu.py``; the kernels' own pages, ``triton_keys.py`` and ``triton_backward.py``, say what runs, chunks and pieces are.
"""

# Triton types what a kernel takes as constexpr; and which entries of a list are None follows from another list.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .gpu_launch import TYPES, Lookups, alignment, on_device, one_type, send
from .spec import GroupSpec
from .triton_backward import RowEntry, reduce_kernel, spanning_kernel
from .triton_common import LookupEntry, tile_rows
from .triton_keys import CHUNK, CHUNKS_PER_PROGRAM, KEY_TILES, count_kernel, keys_kernel, pieces_kernel
from .updates import KINDS, TableUpdate

CHUNK_SIZE = CHUNK.value


@dataclass
class Runs:
    """The reads of some tables, sorted: see ``triton_keys.py``. ``segments``: table -> (first chunk, end chunk, key of row 0)."""

    keys: Tensor
    order: Tensor
    sources: Tensor
    scales: Tensor
    before: Tensor
    starts: Tensor
    ranks: Tensor
    chunks: int
    segments: dict[int, tuple[int, int, int]]
    aligned: dict[int, int]  # table -> elements one load of its gradients may take
    grads: list[Tensor | None]  # held while kernels read them by address
    grad_type: torch.dtype
    scaled: bool


def sort_reads(
    spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, wanted: Sequence[bool], ranked: bool
) -> Runs | None:
    """Sort the reads of the wanted tables; None if no wanted table has a gradient."""
    used = [wanted[lookup.table] and slot_grads[lookup.slot] is not None for lookup in spec.lookups]
    if not any(used):
        return None
    device = tables[0].device
    reads = Lookups(spec, tables, indices, offsets, sample_weights, used)
    grads, grad_type = one_type(slot_grads, [g is not None for g in slot_grads], torch.float32)
    size = grad_type.itemsize
    of_table: dict[int, list[int]] = {}
    for i, lookup in enumerate(spec.lookups):
        if used[i]:
            of_table.setdefault(lookup.table, []).append(i)
    entries: list[LookupEntry] = []
    segments: dict[int, tuple[int, int, int]] = {}
    aligned: dict[int, int] = {}
    program = position = key = 0
    for t, lookups in of_table.items():
        begin = position
        read_count = sum(indices[i].numel() for i in lookups)
        end = begin + (read_count // CHUNK_SIZE + 1) * CHUNK_SIZE  # at least one unused read: see triton_keys.py
        addresses = []
        for i in lookups:
            lookup, grad = spec.lookups[i], grads[spec.lookups[i].slot]
            own = indices[i].numel() if i != lookups[-1] else end - position
            addresses.append(grad.data_ptr() + lookup.column * size)
            kind = 0 if lookup.pooling == "none" else 1
            width = spec.slots[lookup.slot]
            entries.append(reads.entry(i, program, kind, addresses[-1], width, train=True, position=position, slots=own, key=key))
            program += max(1, triton.cdiv(entries[-1].bags, KEY_TILES[kind][0]))
            position += own
        segments[t] = (begin // CHUNK_SIZE, end // CHUNK_SIZE, key)
        widths = [spec.slots[spec.lookups[i].slot] for i in lookups]
        aligned[t] = alignment(size, tables[t].shape[1], *widths, addresses=addresses)
        key += tables[t].shape[0] + 1
    if position >= 2**31:
        raise ValueError(f"{position} ids in one step: the kernels count to 2**31; split the batch")
    scaled = reads.weight_type is not None or any(u and lookup.pooling == "mean" for u, lookup in zip(used, spec.lookups))
    chunks = position // CHUNK_SIZE
    keys = torch.empty(position, dtype=torch.int32 if key < 2**31 else torch.int64, device=device)
    sources = torch.empty(position, dtype=torch.int64, device=device)
    scales = torch.empty(position if scaled else 1, dtype=torch.float32, device=device)
    with on_device(device):
        keys_kernel[(program,)](
            send(entries, device), keys, sources, scales, len(entries), TYPES[grad_type], TYPES[keys.dtype], **reads.types,
            WEIGHT_T=reads.weight_type, SCALED=scaled, TILES=KEY_TILES,
        )  # fmt: skip
        keys, order = torch.sort(keys, stable=True)
        counts = torch.zeros(2, chunks + 1, dtype=torch.int32, device=device)
        grid = (triton.cdiv(chunks, CHUNKS_PER_PROGRAM.value),)
        count_kernel[grid](keys, counts, chunks)
        before = torch.cumsum(counts, 1, dtype=torch.int32)
        starts = torch.empty(position, dtype=torch.int32, device=device)
        ranks = torch.empty(position if ranked else 1, dtype=torch.int32, device=device)
        pieces_kernel[grid](keys, before, starts, ranks, chunks, ranked)
    return Runs(keys, order, sources, scales, before, starts, ranks, chunks, segments, aligned, grads, grad_type, scaled)


@dataclass
class Finish:
    """What becomes of the runs of one table: written as gradients to ``target``, or an update of ``target``, a table."""

    table: int
    rows: int
    target: Tensor  # [*, dim]
    rule: TableUpdate | None = None
    row_numbers: Tensor | None = None
    seed: int | None = None  # of stochastic rounding

    def launch_key(self) -> tuple:
        """Tables with equal keys share a launch: the rule and the dtypes are compiled in."""
        state = self.rule.state if self.rule else ()
        types = {s.dtype for s in state}
        if len(types) > 1:
            raise ValueError(f"the optimizer state of one table has several dtypes: {sorted(map(str, types))}; give it one")
        kind = self.rule.kind if self.rule else "write"
        return kind, self.target.dtype, types.pop() if types else torch.float32, self.seed is not None

    def alignment(self) -> int:
        tensors = [self.target, *(s for s in (self.rule.state if self.rule else ()) if s.dim() == 2)]
        return min(alignment(t.element_size(), t.shape[1], t.stride(0), addresses=[t.data_ptr()]) for t in tensors)

    def fields(self) -> dict[str, int]:
        """The numbers of a RowEntry that say what to do with a row."""
        numbers = self.row_numbers
        fields = {
            "rows": self.rows, "dim": self.target.shape[1], "out": self.target.data_ptr(), "out_stride": self.target.stride(0),
            "row_numbers": 0 if numbers is None else numbers.data_ptr(),
        }  # fmt: skip
        rule = self.rule
        if rule is None:
            return fields
        rate = rule.lr
        if rule.kind == "adam":
            rate *= math.sqrt(1 - rule.beta2**rule.step) / (1 - rule.beta1**rule.step)
        floats = {
            "rate": rate, "eps": rule.eps, "take1": 1 - rule.beta1, "take2": 1 - rule.beta2, "decay": 1 - rule.lr * rule.weight_decay,
            "sign": -1.0 if rule.maximize else 1.0,
        }  # fmt: skip
        for i, state in enumerate(rule.state):
            fields |= {f"state{i}": state.data_ptr(), f"state{i}_stride": state.stride(0)}
        fields["seed"] = self.seed or 0
        return fields | {name: struct.unpack("<i", struct.pack("<f", value))[0] for name, value in floats.items()}


def group_by_launch(finishes: Sequence[Finish]) -> dict[tuple, list[Finish]]:
    groups: dict[tuple, list[Finish]] = {}
    for finish in finishes:
        if finish.rule is not None and finish.rule.kind not in KINDS:
            raise ValueError(f"unknown update {finish.rule.kind!r}; known: {', '.join(KINDS)}")
        groups.setdefault(finish.launch_key(), []).append(finish)
    return groups


def reduce_runs(runs: Runs, finishes: Sequence[Finish]) -> None:
    """Sum the runs and finish them: two launches per rule and dtype, usually two in all."""
    device = runs.keys.device
    pitch = -16 * (-max(f.target.shape[1] for f in finishes) // 16)
    partials = torch.empty(2 * runs.chunks * pitch, dtype=torch.float32, device=device)
    steps = 2  # reads in flight per piece: runs are mostly short, and few registers leave room for more programs
    for (rule, target_type, state_type, rounded), group in group_by_launch(finishes).items():
        kinds: dict[tuple[int, ...], int] = {}
        entries = []
        program = chunk_program = 0
        for finish in group:
            chunk, chunk_end, key = runs.segments[finish.table]
            block = triton.next_power_of_2(finish.target.shape[1])
            kind = kinds.setdefault((tile_rows(block), block, runs.aligned[finish.table], finish.alignment(), steps), len(kinds))
            entries.append(RowEntry(program, chunk_program, kind, chunk, chunk_end, key, **finish.fields()))
            most_pieces = min((chunk_end - chunk) * CHUNK_SIZE, finish.rows + 1 + chunk_end - chunk)
            program += triton.cdiv(most_pieces, tile_rows(block))
            chunk_program += chunk_end - chunk
        sent, facts = send(entries, device), (len(entries), tuple(kinds), rule)
        types, ranked = (TYPES[target_type], TYPES[state_type]), group[0].row_numbers is not None
        with on_device(device):
            reduce_kernel[(program,)](
                sent, runs.keys, runs.order, runs.sources, runs.scales, runs.before, runs.starts, runs.ranks, partials, runs.chunks,
                pitch, *facts, TYPES[runs.grad_type], *types, runs.scaled, ranked, rounded,
            )  # fmt: skip
            spanning_kernel[(chunk_program,)](
                sent, runs.keys, runs.before, runs.ranks, partials, runs.chunks, pitch, *facts, *types, ranked, rounded
            )
