"""``tablewright.merge_rows`` and ``unique_rows``: what the rows that came back are made of.

::

    merge_rows(received, header, places, counts, indices, offsets, extras, spec) -> slots
    unique_rows(received, header, spec) -> [rows_0, rows_1, ...]

``merge_rows`` writes the slots ``[*leading, width]`` of ``spec.group``: each bag is the sum over the row ranges that had a part of it
("mean": divided by its count), the columns side by side; ``extras`` are copied in. A bag that nobody had is zero.
``unique_rows`` gives for each deduplicated group a table ``[1 + distinct rows, dim]`` whose row 0 is zero (padding).

In the backwards the gradient of a received row is divided by the number of ranks, as DDP averages gradients, and is the sum over
whatever read the row.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..embedding.op import leading_shapes
from ..library import DIRECT, LIBRARY, size_from_data, traced, tracing
from . import native
from .exchange_rows import incoming
from .spec import ExchangeSpec, decode, starts_of

LIBRARY.define(
    "merge_rows(Tensor received, Tensor header, Tensor places, Tensor counts, Tensor[] indices, Tensor?[] offsets, Tensor[] extras,"
    " str spec) -> Tensor[]"
)
LIBRARY.define("unique_rows(Tensor received, Tensor header, str spec) -> Tensor[]")


def _chunks(spec: ExchangeSpec, flat: Tensor, header: Tensor) -> list[Tensor]:
    """The part ``[bags, columns]`` of a received tensor that belongs to each stream."""
    found: list[Tensor] = []
    at, bags = 0, header[:, 0].tolist()
    for block in spec.blocks:
        columns = [spec.streams[k].shard.columns for k in block]
        size = bags[block[0]] * sum(columns)
        found += flat[at : at + size].view(-1, sum(columns)).split(columns, 1)
        at += size
    return found


class _Layout:
    """Where the pooled lookups of one call lie: their bags, the bags of each stream, the counts of means."""

    def __init__(self, spec: ExchangeSpec, header: Tensor, places: Tensor, counts: Tensor, indices, offsets) -> None:
        self.spec = spec
        self.shapes = leading_shapes(spec.group, indices, offsets)
        bags = header[:, 0].tolist()
        streams = [k for k, stream in enumerate(spec.streams) if not stream.unique]
        starts = starts_of([bags[k] for k in streams])
        self.places = {k: places[at : at + bags[k]] for k, at in zip(streams, starts)}
        self.scales: dict[int, Tensor] = {}
        at = 0
        for number, _ in spec.pooled_streams:
            lookup = spec.group.lookups[number]
            if lookup.pooling == "mean":
                size = self.bags(number)
                self.scales[number] = counts[at : at + size].clamp_min(1).to(_wide(spec.torch_dtype)).reciprocal()[:, None]
                at += size

    def bags(self, number: int) -> int:
        """How many bags lookup ``number`` has."""
        return torch.Size(self.shapes[self.spec.group.lookups[number].slot]).numel()

    def part(self, slots, number: int) -> Tensor:
        """Lookup ``number``'s columns of its slot, ``[bags, dim]``."""
        lookup = self.spec.group.lookups[number]
        whole = slots[lookup.slot]
        return whole.view(-1, whole.shape[-1]).narrow(1, lookup.column, self.spec.group.tables[lookup.table].dim)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums are made before they are rounded once."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Even:
    """All rows that travel go to one slot as they are. ``columns``: where in it each stream's begin; ``once``: no two streams go to the same
    places. ``width``: of every row, where all are equally wide and go to places of that width, so that one index says where each goes; else 0."""

    slot: int
    columns: Tensor
    once: bool
    width: int
    blocks: native.Blocks

    @staticmethod
    def of(spec: ExchangeSpec) -> _Even | None:
        """``None`` where the rows are not so, or are scaled or rounded on the way."""
        found = spec.__dict__.get("_even", False)
        if found is False:
            found = spec.__dict__["_even"] = _Even._find(spec)
        return found

    @staticmethod
    def _find(spec: ExchangeSpec) -> _Even | None:
        lookups, widths = spec.group.lookups, [s.shard.columns for s in spec.streams]
        slots = {k.slot for k in lookups}
        if not spec.alike or len(slots) != 1 or not all(widths) or _wide(spec.torch_dtype) != spec.torch_dtype:
            return None
        (slot,) = slots
        starts = [lookups[s.lookups[0]].column + s.shard.column for s in spec.streams]
        even = len(set(widths)) == 1 and not spec.beside and not any(start % widths[0] for start in (spec.group.slots[slot], *starts))
        columns, wide, ends = (torch.tensor(n, dtype=torch.int64) for n in (starts, widths, [block[-1] + 1 for block in spec.blocks]))
        blocks = native.Blocks(columns, wide, ends)
        return _Even(slot, columns, len(set(starts)) == len(starts), widths[0] if even else 0, blocks)

    def serves(self, *tensors: Tensor) -> bool:
        """Can this be done for such rows, slots and indices?"""
        return native.merges(*tensors) or self.width > 0

    def index(self, header: Tensor, places: Tensor, width: int) -> Tensor:
        """The place of each row, in units of the rows' width, of a slot of that width."""
        columns = (self.columns // self.width).to(places.device)
        return columns.repeat_interleave(header[:, 0].to(places.device), output_size=places.numel()).add_(places, alpha=width // self.width)

    def merge(self, received: Tensor, header: Tensor, places: Tensor, slot: Tensor, extras: int) -> None:
        """Write the rows to ``slot``, of whose numbers ``extras`` come from elsewhere."""
        fresh = self.once and received.numel() == slot.numel() - extras  # every place gets one row
        if native.merges(received, slot, places, header):
            native.merge(received, slot if fresh else slot.zero_(), places, header, self.blocks, not fresh)
            return
        sums, rows = slot.view(-1, self.width), received.view(-1, self.width)
        index = self.index(header, places, slot.shape[-1])
        sums.index_copy_(0, index, rows) if fresh else sums.zero_().index_add_(0, index, rows)

    def part(self, grad: Tensor, header: Tensor, places: Tensor, count: int, scale: float) -> Tensor:
        """The gradients of the rows, ``count`` numbers: ``scale`` times those of their places in the slot."""
        if native.merges(grad, places, header):
            made = grad.new_empty(count)
            native.part(made, grad, places, header, self.blocks, scale)
            return made
        return grad.view(-1, self.width).index_select(0, self.index(header, places, grad.shape[-1])).mul_(scale).view(-1)


def _merge(received: Tensor, header: Tensor, places: Tensor, counts: Tensor, indices, offsets, extras, text: str) -> list[Tensor]:
    spec = decode(text)
    even = _Even.of(spec)
    if even is not None:
        shapes, dtypes = _slot_shapes(spec, indices, offsets, extras), _slot_dtypes(spec, extras)
        slots = [received.new_empty((*shape, width), dtype=d) for shape, width, d in zip(shapes, spec.group.slots, dtypes)]
        slot = slots[even.slot]
        if slot.dtype == received.dtype and even.serves(received, slot, places, header):
            beside = sum(e.width for e in spec.group.extras if e.slot == even.slot)
            even.merge(received, header, places, slot, slot[..., :1].numel() * beside)
            for place, extra in zip(spec.group.extras, extras):
                slots[place.slot].narrow(-1, place.column, place.width).copy_(extra)
            return slots
    layout, chunks = _Layout(spec, header, places, counts, indices, offsets), _chunks(spec, received, header)
    dtypes = _slot_dtypes(spec, extras)
    slots = [received.new_empty((*shape, width), dtype=d) for shape, width, d in zip(_slot_shapes(spec, indices, offsets, extras), spec.group.slots, dtypes)]
    for number, streams in spec.pooled_streams:
        target, scale = layout.part(slots, number), layout.scales.get(number)
        bags = target.shape[0]
        ranges = {spec.streams[k].shard.row for k in streams}
        whole = len(ranges) == 1 and all(layout.places[k].numel() == bags for k in streams)
        if whole and scale is None:
            for k in streams:
                shard = spec.streams[k].shard
                target.narrow(1, shard.column, shard.columns).copy_(chunks[k])
            continue
        sums = torch.zeros(target.shape, dtype=_wide(spec.torch_dtype), device=target.device)
        for k in streams:
            shard = spec.streams[k].shard
            sums.narrow(1, shard.column, shard.columns).index_add_(0, layout.places[k], chunks[k].to(sums.dtype))
        target.copy_(sums if scale is None else sums.mul_(scale))
    for place, extra in zip(spec.group.extras, extras):
        slots[place.slot].narrow(-1, place.column, place.width).copy_(extra)
    return slots


def _slot_shapes(spec: ExchangeSpec, indices, offsets, extras) -> list[tuple[int, ...]]:
    """The leading shape of each slot: that of its lookups here, or of what is copied in where there are none."""
    shapes, looked_up = leading_shapes(spec.group, indices, offsets), {k.slot for k in spec.group.lookups}
    for place, extra in zip(spec.group.extras, extras):
        if place.slot not in looked_up:
            shapes[place.slot] = tuple(extra.shape[:-1])
    return shapes


def _slot_dtypes(spec: ExchangeSpec, extras) -> list[torch.dtype]:
    dtypes = [spec.torch_dtype] * len(spec.group.slots)
    for place, extra in zip(spec.group.extras, extras):
        dtypes[place.slot] = torch.promote_types(dtypes[place.slot], extra.dtype)
    return dtypes


@torch.library.register_fake("tablewright::merge_rows", lib=LIBRARY)
def _fake_merge(received, header, places, counts, indices, offsets, extras, spec):
    parsed = decode(spec)
    shapes = _slot_shapes(parsed, indices, offsets, extras)
    dtypes = _slot_dtypes(parsed, extras)
    return [received.new_empty((*s, w), dtype=d) for s, w, d in zip(shapes, parsed.group.slots, dtypes)]


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text, received, header, places, counts, indices, offsets, *extras):
        ctx.set_materialize_grads(False)
        ctx.call = text, header, places, counts, indices, offsets, [e.dtype for e in extras]
        spec, slots = decode(text), _merge(received, header, places, counts, indices, offsets, extras, text)
        trained = {spec.group.lookups[i].slot for i, streams in spec.pooled_streams if ctx.needs_input_grad[1] and spec.streams[streams[0]].trained}
        trained |= {extra.slot for extra, need in zip(spec.group.extras, ctx.needs_input_grad[7:]) if need}
        ctx.mark_non_differentiable(*(slot for i, slot in enumerate(slots) if i not in trained))
        return tuple(slots)

    @staticmethod
    def backward(ctx, *slot_grads):
        text, header, places, counts, indices, offsets, dtypes = ctx.call
        spec = decode(text)
        grad = None
        if ctx.needs_input_grad[1]:
            held = [g if g is None else g.contiguous() for g in slot_grads]
            like = next(g for g in held if g is not None)
            even = _Even.of(spec)
            mine = None if even is None else held[even.slot]
            if even is not None and mine is not None and mine.dtype == spec.torch_dtype and even.serves(mine, places, header):
                grad = even.part(mine, header, places, incoming(spec, header).numbers, 1.0 / spec.world)
        if ctx.needs_input_grad[1] and grad is None:
            layout = _Layout(spec, header, places, counts, indices, offsets)
            # Rows that other ops of this exchange read (deduplicated ones) have their gradients from there.
            pooled = {k for _, streams in spec.pooled_streams for k in streams}
            flat = like.new_empty(incoming(spec, header).numbers, dtype=spec.torch_dtype)
            chunks = _chunks(spec, flat, header)
            for number, streams in spec.pooled_streams:
                if held[spec.group.lookups[number].slot] is None:
                    for k in streams:
                        chunks[k].zero_()
                    continue
                part, scale = layout.part(held, number), layout.scales.get(number)
                factor = 1.0 / spec.world if scale is None else scale / spec.world
                for k in streams:
                    shard, bags = spec.streams[k].shard, layout.places[k]
                    rows = part.narrow(1, shard.column, shard.columns)
                    if bags.numel() != rows.shape[0]:
                        rows = rows.index_select(0, bags)
                        each = factor if scale is None else factor.index_select(0, bags)  # type: ignore[union-attr]
                    else:
                        each = factor
                    torch.mul(rows, each, out=chunks[k]) if rows.dtype == chunks[k].dtype and scale is None else chunks[k].copy_(rows * each)
            for k in set(range(len(chunks))) - pooled:
                chunks[k].zero_()
            grad = flat
        extra_grads = [
            None if slot_grads[e.slot] is None else slot_grads[e.slot].narrow(-1, e.column, e.width).to(dtype)
            for e, dtype in zip(spec.group.extras, dtypes)
        ]
        return None, grad, None, None, None, None, None, *extra_grads


def _merge_autograd(received, header, places, counts, indices, offsets, extras, spec):
    if tracing():
        return traced(MERGE, received.requires_grad, received, header, places, counts, indices, offsets, extras, spec)
    if not torch.is_grad_enabled():
        return _merge(received, header, places, counts, indices, offsets, extras, spec)
    return list(_Merge.apply(spec, received, header, places, counts, indices, offsets, *extras))


# --- deduplicated rows ---------------------------------------------------------------------------------------------------------


def _unique(received: Tensor, header: Tensor, text: str) -> list[Tensor]:
    spec = decode(text)
    chunks = _chunks(spec, received, header)
    tables = []
    for group in spec.unique_groups:
        parts = [torch.cat([chunks[k] for k in streams], 1) for _, _, streams in group.parts]
        dim = spec.group.tables[group.table].dim
        tables.append(torch.cat([received.new_zeros(1, dim), *parts]))
    return tables


@torch.library.register_fake("tablewright::unique_rows", lib=LIBRARY)
def _fake_unique(received, header, spec):
    parsed = decode(spec)
    return [received.new_empty(1 + size_from_data(), parsed.group.tables[g.table].dim) for g in parsed.unique_groups]


class _Unique(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text, received, header):
        ctx.call = text, header
        spec, tables = decode(text), _unique(received, header, text)
        trained = [spec.streams[group.parts[0][2][0]].trained for group in spec.unique_groups]
        ctx.mark_non_differentiable(*(table for table, trains in zip(tables, trained) if not trains))
        return tuple(tables)

    @staticmethod
    def backward(ctx, *grads):
        text, header = ctx.call
        spec = decode(text)
        flat = grads[0].new_empty(incoming(spec, header).numbers, dtype=spec.torch_dtype)
        chunks = _chunks(spec, flat, header)
        unique = set()
        for group, grad in zip(spec.unique_groups, grads):
            at = 1
            for _, _, streams in group.parts:
                bags = chunks[streams[0]].shape[0]
                for k in streams:
                    shard = spec.streams[k].shard
                    torch.mul(grad[at : at + bags].narrow(1, shard.column, shard.columns), 1.0 / spec.world, out=chunks[k])
                    unique.add(k)
                at += bags
        for k in set(range(len(chunks))) - unique:
            chunks[k].zero_()
        return None, flat, None


def _unique_autograd(received, header, spec):
    if tracing():
        return traced(UNIQUE, received.requires_grad, received, header, spec)
    if not torch.is_grad_enabled():
        return _unique(received, header, spec)
    return list(_Unique.apply(spec, received, header))


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("merge_rows", _merge, _device)
    LIBRARY.impl("unique_rows", _unique, _device)
LIBRARY.impl("merge_rows", _merge_autograd, "Autograd")
LIBRARY.impl("unique_rows", _unique_autograd, "Autograd")
MERGE, UNIQUE = (getattr(torch.ops.tablewright, name).default for name in ("merge_rows", "unique_rows"))
DIRECT.update({MERGE: _merge_autograd, UNIQUE: _unique_autograd})
