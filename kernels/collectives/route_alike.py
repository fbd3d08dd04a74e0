"""Routing of lookups that are asked alike (ids of one shape, one tensor of offsets): all of them at once.

A model with a bag for each of its features asks them so, and to route them one by one costs a hundred small calls. What comes out is
what ``route_ids`` makes of them, number by number. On CPU C++ (native/route.cpp) does it in one pass over the ids of each stream.
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .spec import ExchangeSpec

_INTEGERS = (torch.int32, torch.int64)


def route_alike(spec: ExchangeSpec, indices: list[Tensor], offsets: list[Tensor | None]) -> list[Tensor] | None:
    """The header, payload, places and counts of ``route_ids``; ``None`` where the lookups are not alike, or an id or offset is wrong
    (``route_ids`` says which)."""
    ids, starts = indices[0], offsets[0]
    if not spec.alike or ids.dtype not in _INTEGERS or any(o is not starts for o in offsets):
        return None
    if any(i.shape != ids.shape or i.dtype != ids.dtype for i in indices):
        return None
    lengths = _lengths(spec, ids, starts)
    if lengths is None:
        return None
    if native.library is not None and ids.is_cpu and all(i.is_contiguous() for i in indices):
        return _natively(spec, indices, lengths, starts)
    single = spec.group.lookups[0].pooling == "none" or (starts is None and ids.shape[1] == 1)  # one id in each bag
    rows = torch.stack([i.reshape(-1) for i in indices])
    if starts is not None:
        used = int(lengths.sum()) if lengths.numel() else 0
        rows = rows[:, :used]
    if rows.numel():
        low, high = torch.aminmax(rows, dim=1)
        if int(low.min()) < 0 or any(h >= spec.group.tables[k.table].rows for h, k in zip(high.tolist(), spec.group.lookups)):
            return None
    rows = rows.to(spec.id_dtype)
    filled = torch.arange(lengths.numel(), device=ids.device) if single else lengths.nonzero().squeeze(1)
    sizes = lengths if filled.numel() == lengths.numel() else lengths[filled]
    bag_of = filled if single else filled.repeat_interleave(sizes)
    header: list[tuple[int, int, int]] = []
    payload: list[Tensor] = []
    places: list[Tensor] = []
    for streams in spec.of_rank:
        if not streams:
            continue
        lookups = [spec.streams[k].lookups[0] for k in streams]
        if lookups == list(range(lookups[0], lookups[0] + len(lookups))):
            asked = rows[lookups[0] : lookups[0] + len(lookups)]
        else:
            asked = rows[torch.tensor(lookups, device=rows.device)]
        shards = [spec.streams[k].shard for k in streams]
        if all(s.rows == spec.group.tables[spec.streams[k].table].rows for s, k in zip(shards, streams)):
            ragged = not single and sizes.numel() > 0 and bool((sizes != sizes[0]).any())
            header += [(sizes.numel(), asked.shape[1], int(ragged))] * len(streams)
            sent = torch.cat([sizes.to(rows.dtype).expand(len(streams), -1), asked], 1) if ragged else asked
            payload.append(sent.reshape(-1))
            places.append(filled.repeat(len(streams)))
            continue
        first = torch.tensor([s.row for s in shards], dtype=rows.dtype, device=rows.device)[:, None]
        size = torch.tensor([s.rows for s in shards], device=rows.device)[:, None]
        inner = asked - first
        at = ((inner >= 0) & (inner < size)).view(-1).nonzero().squeeze(1)
        found = inner.view(-1).index_select(0, at)
        numbers = torch.arange(len(streams) + 1, device=at.device)
        counts = torch.searchsorted(at, numbers * asked.shape[1]).diff()
        # The bags of all streams, numbered on; ids of one bag are neighbours.
        key, per_bag = (numbers[:-1, None] * lengths.numel() + bag_of).view(-1).index_select(0, at), None
        held = counts
        if not single:
            key, per_bag = torch.unique_consecutive(key, return_counts=True)
            held = torch.searchsorted(key, numbers * lengths.numel()).diff()
        parts = numbers[:-1].repeat_interleave(held, output_size=key.numel())
        bags = key - parts * lengths.numel()
        uneven = [False] * len(streams)
        if per_bag is not None and per_bag.numel():
            begins = (held.cumsum(0) - held).clamp_max(per_bag.numel() - 1)
            uneven = (torch.bincount(parts[per_bag != per_bag[begins][parts]], minlength=len(streams)) > 0).tolist()
        held_list, counted = held.tolist(), counts.tolist()
        header += [(b, n, int(u)) for b, n, u in zip(held_list, counted, uneven)]
        places.append(bags)
        if per_bag is None or not any(uneven):
            payload.append(found)
        else:
            pieces = zip(per_bag.to(rows.dtype).split(held_list), found.split(counted), uneven)
            payload += [p for sized, mine, u in pieces for p in ((sized, mine) if u else (mine,))]
    none = torch.empty(0, dtype=torch.int64, device=ids.device)
    return [torch.tensor(header, dtype=torch.int64), torch.cat(payload), torch.cat(places), none]


def _natively(spec: ExchangeSpec, indices: list[Tensor], lengths: Tensor, starts: Tensor | None) -> list[Tensor] | None:
    used = indices[0].numel() if starts is None else int(lengths.sum())
    rows, ways = _words(spec)
    made = native.route(indices, rows, lengths.contiguous(), used, ways, spec.id_dtype)
    return None if made is None else [*made, torch.empty(0, dtype=torch.int64)]


def _words(spec: ExchangeSpec) -> tuple[bytes, bytes]:
    """The rows of each lookup's table, and what goes to each stream, for the library."""
    found = spec.__dict__.get("_words")
    if found is None:
        rows = native.words([spec.group.tables[k.table].rows for k in spec.group.lookups])
        ways = native.words([n for s in spec.streams for n in (s.lookups[0], s.shard.row, s.shard.rows)])
        found = spec.__dict__["_words"] = rows, ways
    return found


def _lengths(spec: ExchangeSpec, ids: Tensor, offsets: Tensor | None) -> Tensor | None:
    """How many ids each bag has; ``None``: something does not fit."""
    lookup = spec.group.lookups[0]
    if lookup.pooling == "none":
        return None if offsets is not None else torch.ones(ids.numel(), dtype=torch.int64, device=ids.device)
    if offsets is None:
        return None if ids.dim() != 2 else torch.full((ids.shape[0],), ids.shape[1], device=ids.device)
    if offsets.dtype not in _INTEGERS or offsets.dim() != 1 or ids.dim() != 1 or not offsets.numel() or int(offsets[0]) != 0:
        return None
    ends = offsets[1:] if lookup.include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([ids.numel()])])
    lengths = (ends - offsets[: ends.numel()]).to(torch.int64)
    wrong = lengths.numel() and (int(lengths.min()) < 0 or int(offsets[-1]) > ids.numel())
    return None if wrong else lengths
