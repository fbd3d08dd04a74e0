"""``tablewright.route_ids``: which row numbers go to which rank.

::

    route_ids(indices, offsets, spec) -> [header, payload, places, counts, inverse_0, offsets_0, inverse_1, ...]

``header`` int64 ``[streams, 3]``: bags, rows, and 1 where the bags' lengths are sent too (they are equal otherwise). ``payload``, of
``spec.id_dtype``: for each stream the lengths (where sent) and the row numbers within the shard. Both are ordered by the rank they go
to. ``places`` int64: for each pooled stream the numbers of the bags that were sent. ``counts`` int64: for each pooled lookup with
pooling "mean" how many ids each bag has (padding not counted). For each deduplicated lookup: where each of its ids is among the rows
that come back (0: nowhere, it is padding), of the shape of its ids (pooled: flat), and for a pooled one the offsets ``[bags + 1]``.

Ids are checked here. An id outside its table, or offsets that do not fit, are told to all ranks by the next ``exchange_ids``, so that
they stop together: the rank that has it raises what it is, the others that another rank has it.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ..embedding import checks
from ..embedding.op import leading_shapes
from ..embedding.reference import Reads, unroll
from ..library import DIRECT, LIBRARY, size_from_data, tracing
from .route_alike import route_alike
from .spec import HEADER, ExchangeSpec, decode

LIBRARY.define("route_ids(Tensor[] indices, Tensor?[] offsets, str spec) -> Tensor[]")

# What this rank's routes found wrong, by the header's storage (kept, so that no other has its place); exchange_ids raises it when all
# ranks know. Several routes may run before the first exchange.
_refused: dict[int, tuple[Tensor, Exception]] = {}


def refusal(header: Tensor) -> Exception | None:
    """What was wrong with the ids that ``header`` announces, and forget it."""
    found = _refused.pop(header.untyped_storage()._cdata, None)
    return None if found is None else found[1]


def _route(indices, offsets, text: str) -> list[Tensor]:
    spec = decode(text)
    try:
        return _routed(spec, indices, offsets)
    except (IndexError, ValueError, TypeError) as error:
        header = torch.zeros((len(spec.streams), HEADER), dtype=torch.int64)
        _refused[header.untyped_storage()._cdata] = header, error
        none = torch.empty(0, dtype=torch.int64)
        return [header, torch.empty(0, dtype=spec.id_dtype), none, none, *[none] * (2 * _unique_lookups(spec))]


def _unique_lookups(spec: ExchangeSpec) -> int:
    return sum(len(g.lookups) for g in spec.unique_groups)


def _routed(spec: ExchangeSpec, indices, offsets) -> list[Tensor]:
    device = indices[0].device
    found = route_alike(spec, indices, offsets)
    if found is not None:
        return found
    check(spec, indices, offsets)
    sent: list[tuple[Tensor, Tensor | None]] = [None] * len(spec.streams)  # type: ignore[list-item]  # row numbers, lengths
    places: list[Tensor | None] = [None] * len(spec.streams)
    counts: list[Tensor] = []
    for number, streams in spec.pooled_streams:
        lookup = spec.group.lookups[number]
        reads = unroll(spec.group, lookup, indices[number], offsets[number], None, torch.float32)
        if lookup.pooling == "mean":
            counts.append(torch.bincount(reads.bag, minlength=reads.leading[0]))
        bags, by_range = math.prod(reads.leading), {}
        for k in streams:
            shard = spec.streams[k].shard
            if shard.row not in by_range and spec.beside:  # all bags, as other lookups may have other empty ones
                by_range[shard.row] = reads.rows, torch.bincount(reads.bag, minlength=bags), torch.arange(bags, device=device)
            elif shard.row not in by_range:
                by_range[shard.row] = _bags_in(reads, shard.row, shard.rows, shard.rows == spec.group.tables[lookup.table].rows)
            rows, lengths, bags = by_range[shard.row]
            sent[k], places[k] = (rows, lengths), bags
    extra: list[Tensor] = []
    for group in spec.unique_groups:
        distinct, described = _deduplicated(spec, group.lookups, indices, offsets)
        extra += described
        for row, rows, streams in group.parts:
            first, end = torch.searchsorted(distinct, torch.tensor([row, row + rows], device=device)).tolist()
            for k in streams:
                sent[k] = (distinct[first:end] - row, None)
    header, payload = [], []
    for rows, lengths in sent:
        bags = rows.numel() if lengths is None else lengths.numel()
        ragged = lengths is not None and bags > 0 and not bool((lengths == rows.numel() // bags).all())
        header.append((bags, rows.numel(), int(ragged)))
        payload += [lengths, rows] if ragged else [rows]
    none = torch.empty(0, dtype=torch.int64, device=device)
    return [
        torch.tensor(header, dtype=torch.int64).view(-1, HEADER),
        torch.cat([p.to(spec.id_dtype) for p in payload]) if payload else none.to(spec.id_dtype),
        torch.cat([none, *(p for p in places if p is not None)]),
        torch.cat([none, *counts]),
        *extra,
    ]


def _bags_in(reads: Reads, row: int, rows: int, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The row numbers within a range, how many of each bag, and the numbers of the bags that have any."""
    numbers, bag = reads.rows, reads.bag
    if not whole:
        inside = ((numbers >= row) & (numbers < row + rows)).nonzero().squeeze(1)
        numbers, bag = numbers[inside] - row, bag[inside]
    bags, lengths = torch.unique_consecutive(bag, return_counts=True)
    return numbers, lengths, bags


def _deduplicated(spec: ExchangeSpec, lookups, indices, offsets) -> tuple[Tensor, list[Tensor]]:
    """The distinct rows that ``lookups`` read, ascending; and for each lookup its (inverse, offsets)."""
    rows, kept = [], []
    for number in lookups:
        lookup = spec.group.lookups[number]
        reads = unroll(spec.group, lookup, indices[number], offsets[number], None, torch.float32, keep_padding=True)
        here = reads.rows
        if lookup.left_out is not None:
            here = here[here != lookup.left_out]
        rows.append(here)
        kept.append(reads)
    distinct, inverse = torch.unique(torch.cat(rows), return_inverse=True)
    described: list[Tensor] = []
    begin = 0
    for number, mine, reads in zip(lookups, rows, kept):
        lookup, ids = spec.group.lookups[number], indices[number]
        where = inverse[begin : begin + mine.numel()] + 1
        begin += mine.numel()
        full = where.new_zeros(ids.numel())
        if lookup.left_out is None:
            full[: where.numel()] = where
        else:
            full[: reads.rows.numel()][reads.rows != lookup.left_out] = where
        if lookup.pooling == "none":
            described += [full.view(ids.shape), full.new_empty(0)]
        else:
            per_bag = torch.bincount(reads.bag, minlength=reads.leading[0])
            described += [full, torch.cat([per_bag.new_zeros(1), per_bag.cumsum(0)])]
    return distinct, described


def check(spec: ExchangeSpec, indices, offsets) -> None:
    """Raises what ``embedding_bags`` raises for ids, offsets and shapes that do not fit."""
    for number, lookup in enumerate(spec.group.lookups):
        ids, offs, table = indices[number], offsets[number], spec.group.tables[lookup.table]
        checks.check_shapes(lookup, ids, offs, None)
        if offs is not None:
            checks.check_offsets(lookup, table, ids, offs)
        if ids.numel():
            low, high = torch.aminmax(ids)
            if int(high) >= table.rows or int(low) < (-table.rows if lookup.wrap_negative else 0):
                checks.check_ids(spec.group, lookup, ids, offs)
    leading: dict[int, tuple[tuple[int, ...], str]] = {}
    for lookup, ids, offs in zip(spec.group.lookups, indices, offsets):
        checks.check_leading(lookup, ids, offs, leading)


@torch.library.register_fake("tablewright::route_ids", lib=LIBRARY)
def _fake(indices, offsets, spec):
    parsed = decode(spec)
    like = indices[0]

    def unknown(dtype=torch.int64):
        return like.new_empty(size_from_data(), dtype=dtype)

    out = [torch.empty(len(parsed.streams), HEADER, dtype=torch.int64), unknown(parsed.id_dtype), unknown(), unknown()]
    shapes = leading_shapes(parsed.group, indices, offsets)
    for group in parsed.unique_groups:
        for number in group.lookups:
            lookup, ids = parsed.group.lookups[number], indices[number]
            if lookup.pooling == "none":
                out += [ids.new_empty(ids.shape, dtype=torch.int64), ids.new_empty(0, dtype=torch.int64)]
            else:
                bags = shapes[lookup.slot][0]
                out += [ids.new_empty(ids.numel(), dtype=torch.int64), ids.new_empty(bags + 1, dtype=torch.int64)]
    return out


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("route_ids", _route, _device)
OP = torch.ops.tablewright.route_ids.default
DIRECT[OP] = lambda indices, offsets, spec: (OP if tracing() else _route)(indices, offsets, spec)
