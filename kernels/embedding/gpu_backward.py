"""The launches of a backward after the sort (``gpu_sort.py``): sum the runs and finish their rows.

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

from .gpu_launch import TYPES, alignment, most_registers, on_device, send
from .gpu_sort import CHUNK_SIZE, Runs
from .triton_backward import RowEntry, reduce_kernel, spanning_kernel
from .triton_common import tile_rows
from .updates import KINDS, TableUpdate


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
    found, device = runs.sorted, runs.sources.device
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
                sent, found.keys, found.order, runs.sources, runs.scales, found.before, found.starts, found.ranks, partials, runs.chunks,
                pitch, *facts, TYPES[runs.grad_type], *types, runs.scaled, ranked, rounded, maxnreg=most_registers("reduce", kinds),
            )  # fmt: skip
            spanning_kernel[(chunk_program,)](
                sent, found.keys, found.before, found.ranks, partials, runs.chunks, pitch, *facts, *types, ranked, rounded,
                maxnreg=most_registers("spanning", kinds),
            )  # fmt: skip
