"""What every implementation of the lookups asks of its inputs, and the words where something is wrong."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..codecs.op import row_bytes
from .spec import GroupSpec, Lookup, Table
from .updates import TableUpdate

OptionalTensors = Sequence["Tensor | None"]


def check_inputs(
    spec: GroupSpec, tables: Sequence[Tensor], indices: Sequence[Tensor], offsets: OptionalTensors, sample_weights: OptionalTensors
) -> None:
    """Raise on the first thing that is wrong: lookups in order; for each its types and shapes, its offsets, then its ids.

    IndexError: an id outside its table. ValueError: shapes, offsets that decrease, do not start at 0 or pass the end, or
    lookups of one slot with different leading shapes. TypeError: ids or offsets that are not int32 or int64. Positions in
    messages count in the flattened tensor. Reads values, so it synchronises on a GPU.
    """
    for table, tensor in zip(spec.tables, tables, strict=True):
        check_table(table, tensor)
    for lookup, ids, offs, weights in zip(spec.lookups, indices, offsets, sample_weights, strict=True):
        check_shapes(lookup, ids, offs, weights)
        if offs is not None:
            check_offsets(lookup, spec.tables[lookup.table], ids, offs)
        check_ids(spec, lookup, ids, offs)
    leading: dict[int, tuple[tuple[int, ...], str]] = {}
    for lookup, ids, offs in zip(spec.lookups, indices, offsets, strict=True):
        check_leading(lookup, ids, offs, leading)


def check_table(table: Table, tensor: Tensor) -> None:
    """Raise ValueError for a table of another shape."""
    wanted = table.rows, row_width(table.dim, tensor)
    if tuple(tensor.shape) != wanted:
        raise ValueError(
            f"table {table.name!r} has shape {tuple(tensor.shape)}; its graph was built for {wanted}. "
            "Change tables before optimize(), or call it again on opt.unoptimized()"
        )


def check_leading(lookup: Lookup, ids: Tensor, offsets: Tensor | None, seen: dict[int, tuple[tuple[int, ...], str]]) -> None:
    """Raise ValueError where a lookup does not have the leading shape of the others of its slot, which are in ``seen``."""
    shape = leading_shape(lookup, ids, offsets)
    first, name = seen.setdefault(lookup.slot, (shape, lookup.name))
    if shape != first:
        raise ValueError(
            f"lookups {name!r} and {lookup.name!r} write one tensor, but their leading shapes differ: {list(first)} and {list(shape)}"
        )


def check_shapes(lookup: Lookup, ids: Tensor, offsets: Tensor | None, weights: Tensor | None) -> None:
    """Raise TypeError or ValueError where the tensors of one lookup do not fit it or each other; no value is read."""
    where = f"lookup {lookup.name!r}"
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where} got ids of dtype {ids.dtype}; they must be int32 or int64")
    if offsets is not None:
        if offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{where} got offsets of dtype {offsets.dtype}; they must be int32 or int64")
        if lookup.pooling == "none" or ids.dim() != 1 or offsets.dim() != 1:
            raise ValueError(
                f"{where} (pooling {lookup.pooling}) got ids {list(ids.shape)} and offsets {list(offsets.shape)}; "
                "offsets go with pooling sum or mean and 1-D ids"
            )
        if lookup.include_last_offset and offsets.numel() == 0:
            raise ValueError(f"{where} includes the last offset, so it needs at least one offset; it got none")
    elif lookup.pooling != "none" and ids.dim() != 2:
        raise ValueError(
            f"{where} got ids of shape {list(ids.shape)} and no offsets; pooling {lookup.pooling} needs ids [B, L] or offsets"
        )
    if weights is not None:
        if lookup.pooling != "sum":
            raise ValueError(f"{where} got sample weights with pooling {lookup.pooling}; they go with pooling sum")
        if weights.shape != ids.shape:
            raise ValueError(f"{where} got sample weights of shape {list(weights.shape)} for ids of shape {list(ids.shape)}")


def check_offsets(lookup: Lookup, table: Table, ids: Tensor, offsets: Tensor) -> None:
    """Raise ValueError for offsets that decrease, do not start at 0 or pass the end."""
    where, which = f"offsets of lookup {lookup.name!r}", f" (table {table.name!r})"
    if offsets.numel() == 0:
        return
    if offsets[0] != 0:
        raise ValueError(f"{where} must start at 0; offset 0 is {int(offsets[0])}{which}")
    decreasing = (offsets[1:] < offsets[:-1]).nonzero()
    if len(decreasing):
        p = int(decreasing[0]) + 1
        raise ValueError(f"{where} must not decrease: offset {p} is {int(offsets[p])}, after {int(offsets[p - 1])}{which}")
    if offsets[-1] > ids.numel():
        p = int((offsets > ids.numel()).nonzero()[0])
        raise ValueError(
            f"{where} must lie within the ids: offset {p} is {int(offsets[p])}, but there are {ids.numel()} ids{which}"
        )


def check_ids(spec: GroupSpec, lookup: Lookup, ids: Tensor, offsets: Tensor | None) -> None:
    """Raise IndexError for the first id outside the table."""
    table = spec.tables[lookup.table]
    flat = ids.reshape(-1)
    if offsets is not None:
        flat = flat[: last_id(lookup, flat, offsets)]
    lowest = -table.rows if lookup.wrap_negative else 0
    bad = ((flat < lowest) | (flat >= table.rows)).nonzero()
    if len(bad):
        p = int(bad[0])
        raise IndexError(
            f"id {int(flat[p])} at position {p} of lookup {lookup.name!r} is out of range for table {table.name!r} with "
            f"{table.rows} rows: ids must be in [{lowest}, {table.rows}). Check how the ids are made (hashing, vocabulary "
            "size, padding value), or build the table with more rows"
        )


def check_sparse(
    tables: Sequence[Tensor], rows: OptionalTensors, values: OptionalTensors, updates: Sequence[TableUpdate | None]
) -> None:
    """Raise ValueError for sparse gradients that are not coalesced or do not fit, IndexError for a row outside its table."""
    for i, (table, row, value, rule) in enumerate(zip(tables, rows, values, updates, strict=True)):
        if row is None or value is None or rule is None:
            continue
        if value.shape != (row.numel(), table.shape[1]):
            raise ValueError(f"the sparse gradient of table {i} has {row.numel()} rows and values of shape {list(value.shape)}")
        if (row[1:] <= row[:-1]).any():
            raise ValueError(f"the sparse gradient of table {i} is not coalesced: its row numbers must ascend strictly")
        if row.numel() and not 0 <= int(row[0]) <= int(row[-1]) < table.shape[0]:
            raise IndexError(f"the sparse gradient of table {i} names rows outside [0, {table.shape[0]})")


def leading_shape(lookup: Lookup, ids: Tensor, offsets: Tensor | None) -> tuple[int, ...]:
    """The shape of a lookup's result without the last dimension."""
    if lookup.pooling == "none":
        return tuple(ids.shape)
    if offsets is None:
        return (ids.shape[0],)
    return (offsets.shape[0] - lookup.include_last_offset,)


def row_width(dim: int, table: Tensor) -> int:
    """How wide a ``table`` of ``dim`` columns is in memory, in elements."""
    return row_bytes("int8", dim) if table.dtype == torch.uint8 else dim


def last_id(lookup: Lookup, flat: Tensor, offsets: Tensor) -> int:
    """How many of the ids belong to a bag."""
    if offsets.numel() == 0:
        return 0
    return int(offsets[-1]) if lookup.include_last_offset else flat.numel()
