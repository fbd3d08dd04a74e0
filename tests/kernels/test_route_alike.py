"""Lookups that are asked alike are routed at once: what comes out is what routing them one by one gives, and back again."""
from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tablewright.kernels.collectives import exchange_ids, exchange_rows, merge_rows, native, route_ids
from tablewright.kernels.collectives.route_alike import route_alike
from tablewright.kernels.collectives.spec import ExchangeSpec, Shard, Stream, decode
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table
from torch.nn import functional as F


def cuts(rng: random.Random, rows: int, dim: int, world: int, kinds=("whole", "rows", "columns")) -> list[Shard]:
    """A table in blocks, at most one on each rank."""
    kind, ranks = rng.choice(kinds), rng.sample(range(world), world)
    if kind == "whole":
        return [Shard(ranks[0], 0, rows, 0, dim)]
    if kind == "columns":
        return [Shard(ranks[0], 0, rows, 0, dim // 2), Shard(ranks[1], 0, rows, dim // 2, dim - dim // 2)]
    middle = rng.randint(1, rows - 1)
    return [Shard(ranks[0], 0, middle, 0, dim), Shard(ranks[1], middle, rows - middle, 0, dim)]


def draw(seed: int):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    world, form = rng.choice([2, 3]), rng.choice(["none", "matrix", "one hot", "ragged", "equal", "last", "empty"])
    pooling, count = "none" if form == "none" else "sum", rng.randint(1, 5)
    tables = tuple(Table(f"t{i}", rng.randint(2, 9), 4) for i in range(count))
    lookups = tuple(Lookup(i, f"l{i}", pooling, 0, 4 * (i + 1), include_last_offset=form == "last") for i in range(count))
    lengths = {"ragged": [0, 3, 1, 0, 2], "last": [2, 0, 2], "equal": [2, 2, 2], "empty": []}.get(form)
    offsets = None
    if lengths is not None:
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        offsets = offsets if form == "last" else offsets[:-1]
    shape = {"none": (3, 2), "matrix": (4, 3), "one hot": (5, 1)}.get(form) or (sum(lengths) + (form == "last"),)
    ids = [torch.randint(0, t.rows, shape) for t in tables]
    streams = [Stream(s, i, (i,), False) for i, t in enumerate(tables) for s in cuts(rng, t.rows, t.dim, world)]
    streams.sort(key=lambda s: s.shard.rank)
    spec = ExchangeSpec(world, GroupSpec(tables, lookups, (4 * (count + 1),), (Extra(0, 0, 4),)), tuple(streams), "float64")
    return spec, ids, [offsets] * count


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def ways(request, monkeypatch):
    """In C++, and in PyTorch."""
    if request.param and native.library is None:
        pytest.skip("NOT TESTED: the C++ library was not built")
    if not request.param:
        monkeypatch.setattr(native, "library", None)


@pytest.mark.parametrize("seed", range(60))
def test_routed_at_once_as_one_by_one(seed, ways, monkeypatch):
    spec, ids, offsets = draw(seed)
    ids = [i.to(torch.int32) for i in ids] if seed % 3 == 0 else ids
    together = route_alike(spec, ids, offsets)
    if offsets[0] is not None and not offsets[0].numel():
        assert together is None
        return
    monkeypatch.setattr(route_ids, "route_alike", lambda *_: None)
    for mine, wanted in zip(together, route_ids._routed(spec, ids, offsets), strict=True):
        assert torch.equal(mine, wanted) and mine.dtype == wanted.dtype
    bad = [*ids[:-1], torch.full_like(ids[-1], spec.group.tables[-1].rows)]
    used = ids[-1].numel() if offsets[0] is None else int(offsets[0][-1])
    assert not used or route_alike(spec, bad, offsets) is None
    assert not used or route_alike(spec, [*ids[:-1], torch.full_like(ids[-1], -1)], offsets) is None


@pytest.mark.parametrize("seed", range(40))
def test_rows_merged_by_one_index_as_stream_by_stream(seed, ways, monkeypatch):
    spec, ids, offsets = draw(seed)
    header, _, places, counts = route_ids._routed(spec, ids, offsets)
    size = exchange_rows.incoming(spec, header).numbers
    found = []
    for even in (True, False):
        if not even:
            monkeypatch.setattr(merge_rows._Even, "of", staticmethod(lambda _: None))
        torch.manual_seed(seed)
        received = torch.randn(size, dtype=torch.float64, requires_grad=True)
        leading = merge_rows.leading_shapes(spec.group, ids, offsets)[0]
        extra = torch.randn(*leading, 4, dtype=torch.float64, requires_grad=True)
        (out,) = merge_rows._merge_autograd(received, header, places, counts, ids, offsets, [extra], spec.encode())
        found.append((out, *torch.autograd.grad(out, [received, extra], torch.randn_like(out))))
    for mine, wanted in zip(*found):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("apart", [False, True])
def test_answers_side_by_side_are_the_plain_lookups(seed, apart, ways):
    """All ranks' parts of an exchange in one process. ``apart``: each lookup has offsets of its own, which are not seen to be equal."""
    spec, *_ = draw(seed)
    rng, (pooling,) = random.Random(seed), {k.pooling for k in spec.group.lookups}
    streams = [Stream(s, i, (i,), False) for i, t in enumerate(spec.group.tables) for s in cuts(rng, t.rows, t.dim, spec.world, ("whole", "columns"))]
    spec = replace(spec, streams=tuple(sorted(streams, key=lambda s: s.shard.rank)), beside=True)
    assert decode(spec.encode()) == spec
    tables = [torch.randn(t.rows, t.dim, dtype=torch.float64, requires_grad=True) for t in spec.group.tables]
    asked, wanted = [], []
    for rank in range(spec.world):
        lengths = torch.randint(0, 3, (4 * rank,), generator=torch.Generator().manual_seed(10 * seed + rank))
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        ids = [torch.randint(0, t.rows, (int(ends[-1]),)) for t in spec.group.tables]
        offsets = [ends if spec.group.lookups[0].include_last_offset else ends[:-1]] * len(ids)
        offsets = [None] * len(ids) if pooling == "none" else [o.clone() for o in offsets] if apart else offsets
        asked.append((route_ids._routed(spec, ids, offsets), ids, offsets))
        rows = [F.embedding(i, t) if pooling == "none" else F.embedding_bag(i, t, ends, mode="sum", include_last_offset=True) for i, t in zip(ids, tables)]
        wanted.append(torch.cat([torch.zeros(len(rows[0]), 4, dtype=torch.float64), *rows], 1))
    arriving: list[list[torch.Tensor]] = [[] for _ in asked]
    for owner, mine in enumerate(spec.of_rank):
        if not mine:
            continue
        header_in = torch.stack([routed[0][list(mine)] for routed, *_ in asked])
        payload = []
        for (header, sent, *_), *_ in asked:
            pieces = sent.split([exchange_ids.id_counts(spec, [row]) for row in header.tolist()])
            payload += [pieces[k] for k in mine]
        parts = exchange_ids._received(header_in, torch.cat(payload), spec.encode(), owner)
        blocks = []
        for place, k in enumerate(mine):
            shard, rows = spec.streams[k].shard, parts[2 * place].long()
            block = tables[spec.streams[k].table].narrow(1, shard.column, shard.columns)
            blocks.append(F.embedding(rows, block) if pooling == "none" else F.embedding_bag(rows, block, parts[2 * place + 1], mode="sum"))
        slot = torch.cat(blocks, 1)
        flat = exchange_rows._pack([slot], slot, header_in, spec.encode(), owner)
        assert flat.data_ptr() == slot.data_ptr() or not slot.numel()
        sizes = [sum(bags * spec.streams[k].shard.columns for k, bags in source) for source in exchange_rows.outgoing(spec, owner, header_in)]
        for source, part in enumerate(slot.view(-1).split(sizes)):
            arriving[source].append(part)
    for ((header, _, places, counts), ids, offsets), parts, plain in zip(asked, arriving, wanted):
        extra = torch.zeros(len(plain), 4, dtype=torch.float64)
        (out,) = merge_rows._merge_autograd(torch.cat(parts), header, places, counts, ids, offsets, [extra], spec.encode())
        assert torch.equal(out, plain)
        if out.numel():
            grad = torch.randn_like(out)
            mine, theirs = (torch.autograd.grad(o, tables, grad, retain_graph=True) for o in (out, plain))
            for each, other in zip(mine, theirs):
                torch.testing.assert_close(each * spec.world, other)  # a mean over ranks


@pytest.mark.parametrize("seed", range(40))
def test_owners_see_the_bags_of_all_ranks(seed):
    spec, *_ = draw(seed)
    asked = []
    for rank in range(spec.world):  # each rank its own batch, of any size
        rng = torch.Generator().manual_seed(100 * seed + rank)
        lookups, ids, offsets = spec.group.lookups, [], []
        lengths = torch.randint(0, 3, (rank + 1,), generator=rng)
        for lookup in lookups:
            rows = spec.group.tables[lookup.table].rows
            ids.append(torch.randint(0, rows, (int(lengths.sum()),), generator=rng))
            ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            offsets.append(None if lookup.pooling == "none" else ends if lookup.include_last_offset else ends[:-1])
        asked.append((route_ids._routed(spec, ids, offsets), ids, offsets))
    for owner, streams in enumerate(spec.of_rank):
        header_in = torch.stack([routed[0][list(streams)] for routed, *_ in asked]) if streams else torch.empty(spec.world, 0, 3)
        payload = []
        for (header, sent, *_), *_ in asked:
            sizes = [exchange_ids.id_counts(spec, [row]) for row in header.tolist()]
            pieces = sent.split(sizes)
            payload += [pieces[k] for k in streams]
        arrived = torch.cat([torch.empty(0, dtype=spec.id_dtype), *payload])
        parts = exchange_ids._received(header_in.long(), arrived, spec.encode(), owner)
        for place, k in enumerate(streams):
            shard, lookup = spec.streams[k].shard, spec.group.lookups[spec.streams[k].lookups[0]]
            bags: list[list[int]] = []
            for _, ids, offsets in asked:
                own, starts = ids[spec.streams[k].lookups[0]].tolist(), offsets[spec.streams[k].lookups[0]]
                starts = list(range(len(own))) if starts is None else starts.tolist()
                ends = [*starts[1:], len(own)]
                within = [[i - shard.row for i in own[a:b] if shard.row <= i < shard.row + shard.rows] for a, b in zip(starts, ends)]
                bags += [bag for bag in within if bag]
            assert parts[2 * place].tolist() == [i for bag in bags for i in bag]
            if lookup.pooling != "none":
                assert parts[2 * place + 1].tolist() == [sum(map(len, bags[:n])) for n in range(len(bags))]
