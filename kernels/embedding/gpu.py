"""Table-batched lookups on a GPU: the launches of the Triton kernels, with the signatures and meanings of ``reference.py``.

One forward is one launch. One backward or update is: keys of all reads (one launch), a stable sort, the pieces of equal keys
(two launches and a small cumulative sum), then sums and optimizer fused (two launches). Sums run in float32 in an order fixed
by the ids alone and nothing is added atomically, so equal inputs give equal bits.

Nothing here waits for the GPU, with one exception: ``sparse_gradients`` must know how many distinct rows there are. Ids are
checked by the kernel: see ``id_status.py``. Tables of another dtype than float32, float16 and bfloat16, or wider than
``MAX_DIM``, go to ``reference.py``, which waits.

Pointers are read from the tensors at every call and never kept.
"""
from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import reference
from .gpu_launch import TYPES, Lookups, alignment, on_device, one_type, send
from .id_status import IdStatus, check_ids
from .reference import OptionalTensors, leading_shape
from .spec import GroupSpec
from .triton_backward import RowEntry, reduce_kernel, spanning_kernel, update_kernel
from .triton_common import MAX_DIM, LookupEntry, tile_rows
from .triton_forward import forward_kernel, weight_grads_kernel
from .triton_keys import CHUNK, CHUNKS_PER_PROGRAM, KEY_TILES, count_kernel, keys_kernel, pieces_kernel
from .updates import KINDS, TableUpdate

CHUNK_SIZE = CHUNK.value



def _or_reference(function):
    """Hand calls that the kernels do not take (float64 tables, very wide rows) to the function's namesake in reference.py."""
    plain = getattr(reference, function.__name__)

    @functools.wraps(function)
    def call(first, *rest):
        tables = first if function.__name__ == "update_from_sparse" else rest[0 if function.__name__ == "forward" else 1]
        fits = all(t.dtype in TYPES and t.shape[1] <= MAX_DIM and t.stride(1) == 1 for t in tables)
        return (function if fits else plain)(first, *rest)

    return call


def _check_shapes(spec: GroupSpec, tables, indices, offsets, sample_weights) -> None:
    """What can be checked without reading values. Raises ValueError and TypeError as ``reference.check_inputs`` does."""
    for table, tensor in zip(spec.tables, tables, strict=True):
        if tuple(tensor.shape) != (table.rows, table.dim):
            raise ValueError(f"table {table.name!r} has shape {tuple(tensor.shape)}; its graph was built for {(table.rows, table.dim)}")
    for lookup, ids, offs, weights in zip(spec.lookups, indices, offsets, sample_weights, strict=True):
        reference._check_shapes(lookup, ids, offs, weights)


def _rows_contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.dim() and t.stride(-1) == 1 else t.contiguous() for t in tensors]


@_or_reference
def forward(spec: GroupSpec, tables, indices, offsets, sample_weights, extras) -> list[Tensor]:
    """Look everything up in one launch: ``[*leading, width]`` per slot, in the tables' dtype; columns nobody writes are zero.

    Raises ValueError and TypeError for shapes and dtypes at once; IndexError for a bad id and ValueError for bad offsets as
    ``id_status.py`` says: with the next forward or at ``check_ids()``. Extras must have the tables' dtype."""
    check_ids(wait=False)
    _check_shapes(spec, tables, indices, offsets, sample_weights)
    device, dtype, size = tables[0].device, tables[0].dtype, tables[0].element_size()
    reads = Lookups(spec, tables, indices, offsets, sample_weights, [True] * len(spec.lookups))
    slots = _slots(spec, tables, indices, offsets, extras)
    steps = 4 if reads.weight_type is None else 2  # ids in flight per bag, as registers allow without spills
    kinds: dict[tuple[int, ...], int] = {}
    entries: list[LookupEntry] = []
    program = 0

    def add(make, bags: int, table: Tensor, slot: Tensor, column: int, unroll: int) -> None:
        nonlocal program
        if bags == 0 or table.shape[-1] == 0:
            return
        dim, out = table.shape[-1], slot.data_ptr() + column * size
        block = triton.next_power_of_2(dim)
        vectors = alignment(size, dim, table.stride(-2), addresses=[table.data_ptr()]), alignment(size, dim, slot.shape[-1], addresses=[out])
        kind = kinds.setdefault((tile_rows(block), block, *vectors, unroll), len(kinds))
        entries.append(make(program, kind, out, slot.shape[-1]))
        program += triton.cdiv(bags, tile_rows(block))

    for i, lookup in enumerate(spec.lookups):
        bags = math.prod(leading_shape(lookup, indices[i], offsets[i]))
        make = functools.partial(reads.entry, i, train=False)
        add(make, bags, tables[lookup.table], slots[lookup.slot], lookup.column, 1 if lookup.pooling == "none" else steps)
    flat = [_rows_contiguous([e.detach().reshape(-1, e.shape[-1]).to(dtype)])[0] for e in extras]
    for place, extra in zip(spec.extras, flat, strict=True):
        for column in range(0, place.width, MAX_DIM):
            part = extra[:, column : column + MAX_DIM]
            add(functools.partial(_extra_entry, part), part.shape[0], part, slots[place.slot], place.column + column, 0)
    status = IdStatus(spec, indices, offsets, device)
    if program:
        with on_device(device):
            forward_kernel[(program,)](
                send(entries, device), status.found, len(entries), status.found.shape[1], tuple(kinds), TYPES[dtype],
                **reads.types, WEIGHT_T=reads.weight_type,
            )  # fmt: skip
        status.send()
    return slots


def _extra_entry(rows: Tensor, program: int, kind: int, out: int, out_stride: int) -> LookupEntry:
    nothing = dict.fromkeys(LookupEntry._fields, 0)
    shape = {"bags": rows.shape[0], "rows": rows.shape[0], "dim": rows.shape[1], "stride": rows.stride(0), "table": rows.data_ptr()}
    return LookupEntry(**nothing | shape | {"program": program, "kind": kind, "out": out, "out_stride": out_stride})


def _slots(spec: GroupSpec, tables, indices, offsets, extras) -> list[Tensor]:
    """New output tensors; zero-filled only where some column has no writer."""
    leading: list[tuple[tuple[int, ...], str] | None] = [None] * len(spec.slots)
    written = [0] * len(spec.slots)
    for lookup, ids, offs in zip(spec.lookups, indices, offsets, strict=True):
        shape, held = leading_shape(lookup, ids, offs), leading[lookup.slot]
        if held is not None and held[0] != shape:
            raise ValueError(
                f"lookups {held[1]!r} and {lookup.name!r} write one tensor, but their leading shapes differ: {list(held[0])} and {list(shape)}"
            )
        leading[lookup.slot] = held or (shape, lookup.name)
        written[lookup.slot] += spec.tables[lookup.table].dim
    for place, value in zip(spec.extras, extras, strict=True):
        held = leading[place.slot] or (tuple(value.shape[:-1]), "")
        if tuple(value.shape) != (*held[0], place.width):
            raise ValueError(
                f"a dense tensor of shape {list(value.shape)} cannot be joined to embeddings of leading shape {list(held[0])} "
                f"at width {place.width}"
            )
        leading[place.slot] = held
        written[place.slot] += place.width
    new = [tables[0].new_empty if w == width else tables[0].new_zeros for w, width in zip(written, spec.slots)]
    return [make((*(held or ((0,), ""))[0], width)) for make, held, width in zip(new, leading, spec.slots)]


@dataclass
class _Runs:
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


def _runs(spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, wanted: Sequence[bool], ranked: bool) -> _Runs | None:
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
    return _Runs(keys, order, sources, scales, before, starts, ranks, chunks, segments, aligned, grads, grad_type, scaled)


@dataclass
class _Finish:
    """What becomes of the runs of one table: written as gradients to ``target``, or an update of ``target``, a table."""

    table: int
    rows: int
    target: Tensor  # [*, dim]
    rule: TableUpdate | None = None
    row_numbers: Tensor | None = None

    def launch_key(self) -> tuple:
        """Tables with equal keys share a launch: the rule and the dtypes are compiled in."""
        state = self.rule.state if self.rule else ()
        types = {s.dtype for s in state}
        if len(types) > 1:
            raise ValueError(f"the optimizer state of one table has several dtypes: {sorted(map(str, types))}; give it one")
        return self.rule.kind if self.rule else "write", self.target.dtype, types.pop() if types else torch.float32

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
        return fields | {name: struct.unpack("<i", struct.pack("<f", value))[0] for name, value in floats.items()}


def _groups(finishes: Sequence[_Finish]) -> dict[tuple, list[_Finish]]:
    groups: dict[tuple, list[_Finish]] = {}
    for finish in finishes:
        if finish.rule is not None and finish.rule.kind not in KINDS:
            raise ValueError(f"unknown update {finish.rule.kind!r}; known: {', '.join(KINDS)}")
        groups.setdefault(finish.launch_key(), []).append(finish)
    return groups


def _reduce(runs: _Runs, finishes: Sequence[_Finish]) -> None:
    """Sum the runs and finish them: two launches per rule and dtype, usually two in all."""
    device = runs.keys.device
    pitch = -16 * (-max(f.target.shape[1] for f in finishes) // 16)
    partials = torch.empty(2 * runs.chunks * pitch, dtype=torch.float32, device=device)
    steps = 2 if runs.scaled else 4
    for (rule, target_type, state_type), group in _groups(finishes).items():
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
        types, ranked = (TYPES[target_type], TYPES[state_type]), finish.row_numbers is not None
        with on_device(device):
            reduce_kernel[(program,)](
                sent, runs.keys, runs.order, runs.sources, runs.scales, runs.before, runs.starts, runs.ranks, partials, runs.chunks,
                pitch, *facts, TYPES[runs.grad_type], *types, runs.scaled, ranked,
            )  # fmt: skip
            spanning_kernel[(chunk_program,)](
                sent, runs.keys, runs.before, runs.ranks, partials, runs.chunks, pitch, *facts, *types, ranked
            )


@_or_reference
def sparse_gradients(
    spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, wanted: Sequence[bool]
) -> list[tuple[Tensor, Tensor] | None]:
    """The coalesced gradient of every wanted table: (rows int64 ``[U]`` ascending, values ``[U, dim]``), else None.

    Waits for the GPU once, to learn the numbers of distinct rows. Bad ids contribute nothing (the forward reported them)."""
    runs = _runs(spec, slot_grads, tables, indices, offsets, sample_weights, wanted, ranked=True)
    counts: dict[int, int] = {}
    if runs is not None:
        edges = [edge for chunk, chunk_end, _ in runs.segments.values() for edge in (chunk, chunk_end)]
        numbers = runs.before[1][torch.tensor(edges, device=runs.keys.device)].tolist()
        counts = {t: numbers[2 * i + 1] - numbers[2 * i] - 1 for i, t in enumerate(runs.segments)}  # less the run that trains nothing
    result: list[tuple[Tensor, Tensor] | None] = []
    for t, (table, want) in enumerate(zip(tables, wanted, strict=True)):
        n = counts.get(t, 0)
        result.append((table.new_empty(n, dtype=torch.int64), table.new_empty(n, table.shape[1])) if want else None)
    if runs is not None and any(counts.values()):
        _reduce(runs, [_Finish(t, tables[t].shape[0], result[t][1], row_numbers=result[t][0]) for t, n in counts.items() if n])
    return result


@_or_reference
def dense_gradients(
    spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Like :func:`sparse_gradients`, but each a full ``[rows, dim]`` tensor with zeros elsewhere; does not wait for the GPU."""
    result = [torch.zeros_like(t, memory_format=torch.contiguous_format) if want else None for t, want in zip(tables, wanted, strict=True)]
    runs = _runs(spec, slot_grads, tables, indices, offsets, sample_weights, wanted, ranked=False)
    if runs is not None:
        _reduce(runs, [_Finish(t, tables[t].shape[0], result[t]) for t in runs.segments])
    return result


@_or_reference
@torch.no_grad()
def update(spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, updates: Sequence[TableUpdate | None]) -> None:
    """Backward and optimizer in one: sum each row's gradient over all lookups of its table, then update row and state in place.

    Tables whose entry of ``updates`` is None stay as they are. Does not wait for the GPU; ids are not checked again."""
    runs = _runs(spec, slot_grads, tables, indices, offsets, sample_weights, [u is not None for u in updates], ranked=False)
    if runs is not None:
        _reduce(runs, [_Finish(t, tables[t].shape[0], tables[t], updates[t]) for t in runs.segments])


@_or_reference
@torch.no_grad()
def update_from_sparse(tables, rows: OptionalTensors, values: OptionalTensors, updates: Sequence[TableUpdate | None]) -> None:
    """The optimizer alone: update ``tables[i]`` at the distinct ``rows[i]`` (int64 ``[U]``) from gradients ``values[i]`` (``[U, dim]``).

    Where any of the three is None the table stays as it is. Rows outside the table are left out: checking would wait."""
    given = [r is not None and v is not None and u is not None and r.numel() > 0 for r, v, u in zip(rows, values, updates, strict=True)]
    if not any(given):
        return
    rows, _ = one_type([None if r is None else r.to(torch.int64) for r in rows], given, torch.int64)
    values, grad_type = one_type(values, given, torch.float32)
    finishes = [_Finish(i, t.shape[0], t, updates[i], rows[i]) for i, t in enumerate(tables) if given[i]]
    for (rule, target_type, state_type), group in _groups(finishes).items():
        kinds: dict[tuple[int, ...], int] = {}
        entries = []
        program = 0
        for finish in group:
            value = values[finish.table]
            count, dim = value.shape
            block = triton.next_power_of_2(dim)
            vector = alignment(grad_type.itemsize, dim, addresses=[value.data_ptr()])
            kind = kinds.setdefault((tile_rows(block), block, vector, finish.alignment()), len(kinds))
            given_values = {"values": value.data_ptr(), "values_stride": dim, "count": count}
            entries.append(RowEntry(program, 0, kind, 0, 0, 0, **finish.fields(), **given_values))
            program += triton.cdiv(count, tile_rows(block))
        with on_device(tables[0].device):
            update_kernel[(program,)](
                send(entries, tables[0].device), len(entries), tuple(kinds), rule, TYPES[grad_type], TYPES[target_type], TYPES[state_type]
            )


@_or_reference
def sample_weight_gradients(
    spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of every wanted lookup's sample weights, of their shape: ``<grad_out[bag], row>``, 0 for padding and bad ids."""
    result = [
        torch.zeros_like(w, memory_format=torch.contiguous_format) if want and w is not None else None
        for w, want in zip(sample_weights, wanted, strict=True)
    ]
    used = [r is not None and slot_grads[lookup.slot] is not None for r, lookup in zip(result, spec.lookups)]
    grads, grad_type = one_type(slot_grads, [g is not None for g in slot_grads], torch.float32)
    for weight_type in {r.dtype for r, u in zip(result, used) if u}:
        launched = [u and r.dtype == weight_type for r, u in zip(result, used)]
        reads = Lookups(spec, tables, indices, offsets, result, launched)
        kinds: dict[tuple[int, ...], int] = {}
        entries = []
        program = 0
        for i, lookup in enumerate(spec.lookups):
            if not launched[i]:
                continue
            table, grad, width = tables[lookup.table], grads[lookup.slot], spec.slots[lookup.slot]
            out, dim = grad.data_ptr() + lookup.column * grad_type.itemsize, table.shape[1]
            block = triton.next_power_of_2(dim)
            vectors = (
                alignment(table.element_size(), dim, table.stride(0), addresses=[table.data_ptr()]),
                alignment(grad_type.itemsize, dim, width, addresses=[out]),
            )
            kind = kinds.setdefault((tile_rows(block), block, *vectors, 2), len(kinds))
            entries.append(reads.entry(i, program, kind, out, width, train=True))
            program += triton.cdiv(entries[-1].bags, tile_rows(block))
        if program:
            with on_device(tables[0].device):
                weight_grads_kernel[(program,)](
                    send(entries, tables[0].device), len(entries), tuple(kinds), TYPES[tables[0].dtype], TYPES[grad_type],
                    **reads.types, WEIGHT_T=reads.weight_type,
                )  # fmt: skip
    return result
