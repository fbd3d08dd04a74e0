"""Table-batched lookups on a GPU: the launches of the Triton kernels, with the signatures and meanings of ``reference.py``.

One forward is one launch. One backward or update is: keys of all reads (one launch), a stable sort, the pieces of equal keys
(two launches and a small cumulative sum), then sums and optimizer fused (two launches). Small tables are summed by products instead
(``gpu_small.py``), unless a sparse gradient is asked for. Sums run in float32 in an order fixed by the ids alone and nothing is
added atomically, so equal inputs give equal bits.

Nothing here waits for the GPU, with one exception: ``sparse_gradients`` must know how many distinct rows there are. Ids are
checked by the kernel: see ``id_status.py``. Tables of another dtype than float32, float16 and bfloat16, or wider than
``MAX_DIM``, go to ``reference.py``, which waits.

Pointers are read from the tensors at every call and never kept.
"""

# Triton types what a kernel takes as constexpr; and which entries of a list are None follows from another list.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from . import checks, gpu_small, reference
from .checks import OptionalTensors, leading_shape
from .gpu_backward import Finish, group_by_launch, reduce_runs
from .gpu_launch import TYPES, Lookups, alignment, most_registers, on_device, one_type, send, triton_type
from .gpu_sort import Sorted, sort_ahead, sort_reads
from .gpu_sort import join_captured as join_captured
from .id_status import IdStatus, check_ids
from .spec import GroupSpec
from .triton_backward import RowEntry, update_kernel
from .triton_common import MAX_DIM, LookupEntry, tile_rows
from .triton_forward import forward_kernel, weight_grads_kernel
from .updates import TableUpdate


def takes(tables: Sequence[Tensor]) -> bool:
    """Are these tables that the kernels can read and write?"""
    return all(t.dtype in TYPES and t.shape[1] <= MAX_DIM and t.stride(1) == 1 for t in tables)


def _or_reference(function):
    """Hand calls that the kernels do not take (float64 tables, very wide rows) to the function's namesake in reference.py."""
    plain = getattr(reference, function.__name__)

    @functools.wraps(function)
    def call(first, *rest):
        tables = first if function.__name__ == "update_from_sparse" else rest[0 if function.__name__ == "forward" else 1]
        coded = function.__name__ == "forward" and all(t.dtype == torch.uint8 and t.shape[1] <= MAX_DIM and t.stride(1) == 1 for t in tables)
        return (function if coded or takes(tables) else plain)(first, *rest)

    return call


def _check_shapes(spec: GroupSpec, tables, indices, offsets, sample_weights) -> None:
    """What can be checked without reading values. Raises ValueError and TypeError as ``checks.check_inputs`` does."""
    for table, tensor in zip(spec.tables, tables, strict=True):
        checks.check_table(table, tensor)
    for lookup, ids, offs, weights in zip(spec.lookups, indices, offsets, sample_weights, strict=True):
        checks.check_shapes(lookup, ids, offs, weights)


def _rows_contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.dim() and t.stride(-1) == 1 else t.contiguous() for t in tensors]


@_or_reference
def forward(spec: GroupSpec, tables, indices, offsets, sample_weights, extras) -> list[Tensor]:
    """Look everything up in one launch: ``[*leading, width]`` per slot, in the tables' dtype; columns nobody writes are zero.

    Raises ValueError and TypeError for shapes and dtypes at once; IndexError for a bad id and ValueError for bad offsets as
    ``id_status.py`` says: with the next forward or at ``check_ids()``. Extras must have the tables' dtype."""
    check_ids(wait=False)
    _check_shapes(spec, tables, indices, offsets, sample_weights)
    device, dtype = tables[0].device, reference.row_dtype(tables[0])
    size = dtype.itemsize
    reads = Lookups(spec, tables, indices, offsets, sample_weights, [True] * len(spec.lookups))
    slots = _slots(spec, tables, indices, offsets, extras)
    steps = 4 if reads.weight_type is None else 2  # ids in flight per bag, as registers allow without spills
    kinds: dict[tuple[int, ...], int] = {}
    entries: list[LookupEntry] = []
    program = 0

    def add(make, bags: int, table: Tensor, dim: int, slot: Tensor, column: int, unroll: int) -> None:
        nonlocal program
        if bags == 0 or dim == 0:
            return
        out = slot.data_ptr() + column * size
        block = triton.next_power_of_2(dim)
        vectors = (
            alignment(table.element_size(), dim, table.stride(-2), addresses=[table.data_ptr()]),
            alignment(size, dim, slot.shape[-1], addresses=[out]),
        )
        if table.dtype == torch.uint8 and vectors[0] < 8:  # loads of single bytes take registers
            unroll = min(unroll, 2)
        kind = kinds.setdefault((tile_rows(block), block, *vectors, unroll), len(kinds))
        entries.append(make(program, kind, out, slot.shape[-1]))
        program += triton.cdiv(bags, tile_rows(block))

    for i, lookup in enumerate(spec.lookups):
        bags = math.prod(leading_shape(lookup, indices[i], offsets[i]))
        make = functools.partial(reads.entry, i, train=False)
        table = tables[lookup.table]
        add(make, bags, table, spec.tables[lookup.table].dim, slots[lookup.slot], lookup.column, 1 if lookup.pooling == "none" else steps)
    flat = [_rows_contiguous([e.detach().reshape(-1, e.shape[-1]).to(dtype)])[0] for e in extras]
    for place, extra in zip(spec.extras, flat, strict=True):
        for column in range(0, place.width, MAX_DIM):
            part = extra[:, column : column + MAX_DIM]
            add(functools.partial(_extra_entry, part), part.shape[0], part, part.shape[1], slots[place.slot], place.column + column, 0)
    status = IdStatus(spec, indices, offsets, device)
    if program:
        with on_device(device):
            forward_kernel[(program,)](
                send(entries, device), status.found, len(entries), status.found.shape[1], tuple(kinds), triton_type(tables[0].dtype), TYPES[dtype],
                **reads.types, WEIGHT_T=reads.weight_type, maxnreg=most_registers("forward", kinds, tables[0].dtype == torch.uint8),
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
    dtype = reference.row_dtype(tables[0])
    return [make((*(held or ((0,), ""))[0], width), dtype=dtype) for make, held, width in zip(new, leading, spec.slots)]


SORT_AHEAD = True  # off: to measure what it brings


def ahead_of_backward(spec: GroupSpec, tables, indices, offsets, kinds: Sequence[str | None]) -> list[Sorted]:
    """Begin, beside the current stream, what the backward of a forward needs of its ids alone; to be kept until the backward. ``kinds``:
    what each table gets there ("sparse", "dense", "in_backward" or None)."""
    if not SORT_AHEAD or not takes(tables):
        return []
    large = [t.shape[0] > gpu_small.ROWS for t in tables]
    wanted = {k: [kind == k and (big or k == "sparse") for kind, big in zip(kinds, large)] for k in dict.fromkeys(kinds) if k}
    made = [sort_ahead(spec, tables, indices, offsets, w, ranked=k == "sparse") for k, w in wanted.items()]
    return [m for m in made if m is not None]


@_or_reference
def sparse_gradients(
    spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, wanted: Sequence[bool]
) -> list[tuple[Tensor, Tensor] | None]:
    """The coalesced gradient of every wanted table: (rows int64 ``[U]`` ascending, values ``[U, dim]``), else None.

    Waits for the GPU once, to learn the numbers of distinct rows. Bad ids contribute nothing (the forward reported them)."""
    runs = sort_reads(spec, slot_grads, tables, indices, offsets, sample_weights, wanted, ranked=True)
    counts: dict[int, int] = {}
    if runs is not None:
        edges = [edge for chunk, chunk_end, _ in runs.segments.values() for edge in (chunk, chunk_end)]
        numbers = runs.sorted.before[1][torch.tensor(edges, device=runs.sources.device)].tolist()
        counts = {
            t: numbers[2 * i + 1] - numbers[2 * i] - 1 for i, t in enumerate(runs.segments)
        }  # less the run that trains nothing
    result: list[tuple[Tensor, Tensor] | None] = []
    for t, (table, want) in enumerate(zip(tables, wanted, strict=True)):
        n = counts.get(t, 0)
        result.append((table.new_empty(n, dtype=torch.int64), table.new_empty(n, table.shape[1])) if want else None)
    if runs is not None and any(counts.values()):
        reduce_runs(runs, [Finish(t, tables[t].shape[0], result[t][1], row_numbers=result[t][0]) for t, n in counts.items() if n])
    return result


@_or_reference
def dense_gradients(
    spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Like :func:`sparse_gradients`, but each a full ``[rows, dim]`` tensor with zeros elsewhere; does not wait for the GPU."""
    result = [
        torch.zeros_like(t, memory_format=torch.contiguous_format) if want else None for t, want in zip(tables, wanted, strict=True)
    ]
    finishes = {t: Finish(t, made.shape[0], made) for t, made in enumerate(result) if made is not None}
    _sum_and_finish(spec, slot_grads, tables, indices, offsets, sample_weights, finishes)
    return result


@_or_reference
@torch.no_grad()
def update(spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, updates: Sequence[TableUpdate | None]) -> None:
    """Backward and optimizer in one: sum each row's gradient over all lookups of its table, then update row and state in place.

    Tables whose entry of ``updates`` is None stay as they are. Does not wait for the GPU; ids are not checked again."""
    finishes = {t: Finish(t, tables[t].shape[0], tables[t], rule) for t, rule in enumerate(updates) if rule is not None}
    _sum_and_finish(spec, slot_grads, tables, indices, offsets, sample_weights, finishes)


@torch.no_grad()
def update_rounded(
    spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, updates: Sequence[TableUpdate | None], seeds: Sequence[int]
) -> None:
    """As :func:`update`, for tables of float16 or bfloat16 that the kernels take (:func:`takes`), rounded stochastically: ``seeds`` has 32 bits for
    each table. Sums, optimizer and state are float32."""
    given = [(t, rule) for t, rule in enumerate(updates) if rule is not None]
    finishes = {t: Finish(t, tables[t].shape[0], tables[t], rule, seed=seeds[t]) for t, rule in given}
    _sum_and_finish(spec, slot_grads, tables, indices, offsets, sample_weights, finishes)


def _sum_and_finish(spec: GroupSpec, slot_grads, tables, indices, offsets, sample_weights, finishes: dict[int, Finish]) -> None:
    """Sum the gradients of the tables of ``finishes`` and finish their rows: small tables by products, the others sorted."""
    slot_grads, _ = one_type(slot_grads, [g is not None for g in slot_grads], torch.float32)
    small = {t: f for t, f in finishes.items() if f.rows <= gpu_small.ROWS}
    if small:
        gpu_small.finish_small(spec, slot_grads, tables, indices, offsets, sample_weights, small)
    wanted = [t in finishes and t not in small for t in range(len(tables))]
    runs = sort_reads(spec, slot_grads, tables, indices, offsets, sample_weights, wanted, ranked=False)
    if runs is not None:
        reduce_runs(runs, [finishes[t] for t in runs.segments])


@_or_reference
@torch.no_grad()
def update_from_sparse(tables, rows: OptionalTensors, values: OptionalTensors, updates: Sequence[TableUpdate | None]) -> None:
    """The optimizer alone: update ``tables[i]`` at the distinct ``rows[i]`` (int64 ``[U]``) from gradients ``values[i]`` (``[U, dim]``).

    Where any of the three is None the table stays as it is. Raises ValueError for values that do not fit their rows. That rows
    are distinct is not checked and rows outside the table are left out: looking at them would wait for the GPU."""
    for i, (table, row, value) in enumerate(zip(tables, rows, values, strict=True)):
        if row is not None and value is not None and value.shape != (row.numel(), table.shape[1]):
            raise ValueError(f"the sparse gradient of table {i} has {row.numel()} rows and values of shape {list(value.shape)}")
    given = [
        r is not None and v is not None and u is not None and r.numel() > 0 for r, v, u in zip(rows, values, updates, strict=True)
    ]
    if not any(given):
        return
    rows, _ = one_type([None if r is None else r.to(torch.int64) for r in rows], given, torch.int64)
    values, grad_type = one_type(values, given, torch.float32)
    finishes = [Finish(i, t.shape[0], t, updates[i], rows[i]) for i, t in enumerate(tables) if given[i]]
    for (rule, target_type, state_type, rounded), group in group_by_launch(finishes).items():
        kinds: dict[tuple[int, ...], int] = {}
        entries = []
        program = 0
        for finish in group:
            value = values[finish.table]
            count, dim = value.shape
            block = triton.next_power_of_2(dim)
            vector = alignment(grad_type.itemsize, dim, addresses=[value.data_ptr()])
            kind = kinds.setdefault((tile_rows(block), block, vector, finish.alignment()), len(kinds))
            given_values = {"values": value.data_ptr(), "values_stride": dim, "given": count}
            entries.append(RowEntry(program, 0, kind, 0, 0, 0, **finish.fields(), **given_values))
            program += triton.cdiv(count, tile_rows(block))
        with on_device(tables[0].device):
            update_kernel[(program,)](
                send(entries, tables[0].device),
                len(entries),
                tuple(kinds),
                rule,
                TYPES[grad_type],
                TYPES[target_type],
                TYPES[state_type],
                rounded,
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
            entries.append(reads.entry(i, program, kind, out, width, train=False))
            program += triton.cdiv(entries[-1].bags, tile_rows(block))
        if program:
            with on_device(tables[0].device):
                weight_grads_kernel[(program,)](
                    send(entries, tables[0].device), len(entries), tuple(kinds), TYPES[tables[0].dtype], TYPES[grad_type],
                    **reads.types, WEIGHT_T=reads.weight_type,
                )  # fmt: skip
    return result
