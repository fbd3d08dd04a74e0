"""Table-batched lookups in plain PyTorch: the oracle for every other implementation, and the fallback where none of them runs.

Every function takes the static :class:`GroupSpec` and lists of tensors: ``tables`` one per ``spec.tables``; ``indices``,
``offsets`` and ``sample_weights`` one per ``spec.lookups`` (the last two may hold None); ``extras`` one per ``spec.extras``;
``slot_grads`` one per ``spec.slots``. Meanings are those of ``F.embedding`` and ``F.embedding_bag``. Sums run in float32
(float64 for float64 tables) and are rounded to the table's dtype once, at the end.

Two points where ``F.embedding_bag`` has no single answer are fixed here: with ``include_last_offset``, ids after the last
offset belong to no bag (torch 2.13 forgets them in the sum but counts them in the mean); and ids and offsets may have
different integer dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs.op import reference_decode, row_bytes
from .checks import OptionalTensors, check_inputs, check_sparse, last_id, leading_shape
from .spec import GroupSpec, Lookup
from .updates import TableUpdate


@dataclass
class Reads:
    """One lookup, unrolled: the id at place i reads ``rows[i]`` for bag ``bag[i]``, scaled by ``scale[i]`` (None = 1)."""

    rows: Tensor  # int64 [n]
    bag: Tensor  # int64 [n]
    scale: Tensor | None  # accumulation dtype [n]
    trained: Tensor | None  # bool [n], False where padding_idx stops the gradient; None = all True
    leading: tuple[int, ...]  # shape of the result without its last dimension


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows and gradients of ``dtype`` tables are summed and updated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_dtype(table: Tensor) -> torch.dtype:
    """The dtype of a table's rows as they are read: its own, and float32 of int8 rows (``int8_rows.py``)."""
    return torch.float32 if table.dtype == torch.uint8 else table.dtype


def row_dim(table: Tensor) -> int:
    """How many numbers a row of a table has."""
    return table.shape[1] - row_bytes("int8", 1) + 1 if table.dtype == torch.uint8 else table.shape[1]


def read_rows(table: Tensor, dim: int, rows: Tensor) -> Tensor:
    """``[n, dim]`` of :func:`row_dtype`: the table's ``rows`` (int64 ``[n]``)."""
    found = table.detach()[rows]
    return reference_decode(found, "int8", dim, torch.float32) if table.dtype == torch.uint8 else found


def forward(
    spec: GroupSpec,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    extras: Sequence[Tensor],
) -> list[Tensor]:
    """Look everything up: one tensor ``[*leading, width]`` per slot, in the tables' :func:`row_dtype`; columns nobody writes are zero.

    Raises what :func:`check_inputs` raises, and ValueError for an extra whose shape does not fit its slot.
    """
    check_inputs(spec, tables, indices, offsets, sample_weights)
    dtype = row_dtype(tables[0])
    acc = accumulation_dtype(dtype)
    out: list[Tensor | None] = [None] * len(spec.slots)

    def slot(index: int, leading: tuple[int, ...]) -> Tensor:
        held = out[index]
        if held is None:
            held = out[index] = tables[0].new_zeros((*leading, spec.slots[index]), dtype=dtype)
        return held

    for lookup, ids, offs, weights in zip(spec.lookups, indices, offsets, sample_weights, strict=True):
        table, dim = tables[lookup.table], spec.tables[lookup.table].dim
        reads = unroll(spec, lookup, ids, offs, weights, acc)
        target = slot(lookup.slot, reads.leading).narrow(-1, lookup.column, dim)
        rows = read_rows(table, dim, reads.rows)
        if lookup.pooling == "none":
            target.copy_(rows.view(*reads.leading, dim))
            continue
        rows = rows.to(acc)
        if reads.scale is not None:
            rows = rows * reads.scale[:, None]
        target.copy_(rows.new_zeros(reads.leading[0], dim).index_add_(0, reads.bag, rows))
    for extra, value in zip(spec.extras, extras, strict=True):
        target = slot(extra.slot, tuple(value.shape[:-1]))
        if value.shape != (*target.shape[:-1], extra.width):
            raise ValueError(
                f"a dense tensor of shape {list(value.shape)} cannot be joined to embeddings of leading shape "
                f"{list(target.shape[:-1])} at width {extra.width}"
            )
        target.narrow(-1, extra.column, extra.width).copy_(value.detach())
    return [slot(i, (0,)) for i in range(len(out))]


def sparse_gradients(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    wanted: Sequence[bool],
) -> list[tuple[Tensor, Tensor] | None]:
    """The coalesced gradient of every wanted table: (row numbers int64 ``[U]`` ascending, values ``[U, dim]``), else None.

    Duplicate ids, also across lookups of one table, are summed in a fixed order (on CPU). Ids equal to ``padding_idx`` and
    slots without gradient contribute no rows.
    """
    check_inputs(spec, tables, indices, offsets, sample_weights)
    summed = _summed(spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    return [None if s is None else (s[0], s[1].to(tables[t].dtype)) for t, s in enumerate(summed)]


def dense_gradients(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Like :func:`sparse_gradients`, but each a full ``[rows, dim]`` tensor with zeros elsewhere."""
    sparse = sparse_gradients(spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    return [
        None if s is None else torch.zeros_like(tables[t], memory_format=torch.contiguous_format).index_copy_(0, *s)
        for t, s in enumerate(sparse)
    ]


def sample_weight_gradients(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of every wanted lookup's sample weights, of their shape: ``<grad_out[bag], row>``, 0 for padding."""
    check_inputs(spec, tables, indices, offsets, sample_weights)
    acc = accumulation_dtype(tables[0].dtype)
    result: list[Tensor | None] = []
    for lookup, ids, offs, weights, want in zip(spec.lookups, indices, offsets, sample_weights, wanted, strict=True):
        if not want or weights is None:
            result.append(None)
            continue
        gradient = torch.zeros_like(weights, memory_format=torch.contiguous_format)
        result.append(gradient)
        if slot_grads[lookup.slot] is None:
            continue
        grad = _lookup_gradient(spec, lookup, slot_grads, acc)
        reads = unroll(spec, lookup, ids, offs, None, acc, keep_padding=True)
        left_out = None if lookup.left_out is None else reads.rows == lookup.left_out
        dots = (grad[reads.bag] * read_rows(tables[lookup.table], grad.shape[1], reads.rows).to(acc)).sum(-1)
        if left_out is not None:
            dots = torch.where(left_out, 0, dots)
        gradient.view(-1)[: dots.numel()] = dots.to(weights.dtype)
    return result


@torch.no_grad()
def update(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    updates: Sequence[TableUpdate | None],
) -> None:
    """Backward and optimizer in one: sum each row's gradient over all lookups of its table, then update row and state in
    place. A table whose entry of ``updates`` is None stays as it is. Raises what :func:`check_inputs` raises, before writing."""
    check_inputs(spec, tables, indices, offsets, sample_weights)
    wanted = [u is not None for u in updates]
    summed = _summed(spec, slot_grads, tables, indices, offsets, sample_weights, wanted)
    for table, row_gradient, rule in zip(tables, summed, updates, strict=True):
        if row_gradient is not None and rule is not None:
            _update_rows(table, *row_gradient, rule)


@torch.no_grad()
def update_from_sparse(
    tables: Sequence[Tensor], rows: OptionalTensors, values: OptionalTensors, updates: Sequence[TableUpdate | None]
) -> None:
    """The optimizer alone: update ``tables[i]`` at ``rows[i]`` (int64 ``[U]``, ascending) from gradients ``values[i]``
    (``[U, dim]``). Where any of the three is None the table stays as it is. Raises what :func:`check_sparse` raises."""
    check_sparse(tables, rows, values, updates)
    for table, row, value, rule in zip(tables, rows, values, updates, strict=True):
        if row is not None and value is not None and rule is not None:
            _update_rows(table, row, value.to(accumulation_dtype(table.dtype)), rule)


def unroll(
    spec: GroupSpec,
    lookup: Lookup,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    acc: torch.dtype,
    keep_padding: bool = False,
) -> Reads:
    """Unroll one lookup. Padding ids of a bag are dropped (or kept and marked, with ``keep_padding``)."""
    rows = ids.reshape(-1).to(torch.int64)
    leading = leading_shape(lookup, ids, offsets)
    if offsets is None:
        count = math.prod(leading)
        bag = torch.arange(count, device=ids.device).repeat_interleave(rows.numel() // max(count, 1))
    else:
        rows = rows[: last_id(lookup, rows, offsets)]
        ends = offsets[1:] if lookup.include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([rows.numel()])])
        starts = offsets[: leading[0]]
        bag = torch.arange(leading[0], device=ids.device).repeat_interleave((ends[: leading[0]] - starts).to(torch.int64))
    scale = None if weights is None else weights.detach().reshape(-1)[: rows.numel()].to(acc)
    if lookup.wrap_negative:
        rows = torch.where(rows < 0, rows + spec.tables[lookup.table].rows, rows)
    trained = None if lookup.padding_idx is None else rows != lookup.padding_idx
    if trained is not None and lookup.left_out is not None and not keep_padding:
        rows, bag, scale = rows[trained], bag[trained], None if scale is None else scale[trained]
        trained = None
    if lookup.pooling == "mean":
        counts = torch.bincount(bag, minlength=leading[0])
        scale = counts[bag].to(acc).reciprocal()
    return Reads(rows, bag, scale, trained, leading)


def _lookup_gradient(spec: GroupSpec, lookup: Lookup, slot_grads: OptionalTensors, acc: torch.dtype) -> Tensor:
    """The part of a slot's gradient that belongs to one lookup, ``[bags, dim]`` in the accumulation dtype."""
    grad = slot_grads[lookup.slot]
    assert grad is not None
    dim = spec.tables[lookup.table].dim
    return grad.detach().narrow(-1, lookup.column, dim).reshape(-1, dim).to(acc)


def _summed(
    spec: GroupSpec,
    slot_grads: OptionalTensors,
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    offsets: OptionalTensors,
    sample_weights: OptionalTensors,
    wanted: Sequence[bool],
) -> list[tuple[Tensor, Tensor] | None]:
    """Per wanted table: distinct rows ascending and their gradients, summed in the accumulation dtype and not rounded."""
    acc = accumulation_dtype(tables[0].dtype)
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tables]
    for lookup, ids, offs, weights in zip(spec.lookups, indices, offsets, sample_weights, strict=True):
        if not wanted[lookup.table] or slot_grads[lookup.slot] is None:
            continue
        reads = unroll(spec, lookup, ids, offs, weights, acc)
        values = _lookup_gradient(spec, lookup, slot_grads, acc)[reads.bag]
        if reads.scale is not None:
            values = values * reads.scale[:, None]
        kept = slice(None) if reads.trained is None else reads.trained
        parts[lookup.table].append((reads.rows[kept], values[kept]))
    result: list[tuple[Tensor, Tensor] | None] = []
    for table, found, want in zip(tables, parts, wanted, strict=True):
        if not want:
            result.append(None)
            continue
        rows = torch.cat([table.new_empty(0, dtype=torch.int64), *(r for r, _ in found)])
        distinct, place = torch.unique(rows, return_inverse=True)  # sorted
        values = table.new_zeros((distinct.numel(), table.shape[1]), dtype=acc)
        begin = 0
        for part, value in found:
            values.index_add_(0, place[begin : begin + part.numel()], value)
            begin += part.numel()
        result.append((distinct, values))
    return result


def _update_rows(table: Tensor, rows: Tensor, gradient: Tensor, rule: TableUpdate) -> None:
    """Apply one rule to distinct rows; ``gradient`` is ``[U, dim]`` in the accumulation dtype. Formulas: updates.py."""
    acc = accumulation_dtype(table.dtype)
    weight = table[rows].to(acc)
    state = [s[rows].to(acc) for s in rule.state]
    if rule.maximize:
        gradient = -gradient
    if rule.weight_decay:
        weight *= 1 - rule.lr * rule.weight_decay
    if rule.kind == "sgd":
        weight -= rule.lr * gradient
    elif rule.kind == "adagrad":
        state[0] += gradient * gradient
        weight -= rule.lr * gradient / (state[0].sqrt() + rule.eps)
    elif rule.kind == "rowwise_adagrad":
        state[0] += (gradient * gradient).mean(1)
        weight -= (rule.lr / (state[0].sqrt() + rule.eps))[:, None] * gradient
    elif rule.kind == "adam":
        m, v = state
        m += (1 - rule.beta1) * (gradient - m)
        v += (1 - rule.beta2) * (gradient * gradient - v)
        rate = rule.lr * math.sqrt(1 - rule.beta2**rule.step) / (1 - rule.beta1**rule.step)
        weight -= rate * m / (v.sqrt() + rule.eps)
    else:
        raise ValueError(f"unknown update {rule.kind!r}; known: sgd, adagrad, rowwise_adagrad, adam")
    table[rows] = weight.to(table.dtype)
    for stored, value in zip(rule.state, state, strict=True):
        stored[rows] = value.to(stored.dtype)
