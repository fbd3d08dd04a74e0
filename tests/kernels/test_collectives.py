"""Routing, packing and merging of rows, on one rank (nothing travels), against plain lookups; and the wire formats."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.collectives import exchange_ids, exchange_rows, merge_rows, route_ids
from tablewright.kernels.collectives.spec import ExchangeSpec, Shard, Stream, decode
from tablewright.kernels.collectives.wire import decoded, encoded, wire_sizes
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table
from torch.nn import functional as F

ROWS, DIM = 11, 6


def spec_of(pooling: str, *, unique: bool = False, cuts=((0, 11),), columns=((0, 6),), padding=None, **more) -> ExchangeSpec:
    shards = [Shard(0, row, rows, column, width) for row, rows in cuts for column, width in columns]
    lookup = Lookup(0, "emb", pooling, 0, 1, padding_idx=padding, **more)
    extras = (Extra(0, 0, 1), Extra(0, 1, DIM)) if unique else (Extra(0, 0, 1),)
    group = GroupSpec((Table("emb.weight", ROWS, DIM),), (lookup,), (1 + DIM,), extras)
    return ExchangeSpec(1, group, tuple(Stream(s, 0, (0,), unique, None if pooling != "none" else padding) for s in shards), "float64")


def answer(spec: ExchangeSpec, table: torch.Tensor, header, payload) -> list[torch.Tensor]:
    """What the owner's lookup gives for each stream."""
    header_in, arrived = exchange_ids._exchange(header, payload, spec.encode(), 0, "")
    parts = exchange_ids._received(header_in, arrived, spec.encode(), 0)
    found = []
    for k, stream in enumerate(spec.streams):
        s, rows, offsets = stream.shard, parts[2 * k].long(), parts[2 * k + 1]
        block = table[s.row : s.row + s.rows, s.column : s.column + s.columns]
        single = stream.unique or spec.group.lookups[0].pooling == "none"
        found.append(block[rows] if single else F.embedding_bag(rows, block, offsets.long(), mode="sum"))
    return found, header_in


CUTS = {"whole": {}, "rows": {"cuts": ((0, 4), (4, 7))}, "columns": {"columns": ((0, 2), (2, 4))}, "grid": {"cuts": ((0, 4), (4, 7)), "columns": ((0, 5), (5, 1))}}


@pytest.mark.parametrize("cut", list(CUTS))
@pytest.mark.parametrize(("pooling", "form"), [("none", "ids"), ("sum", "matrix"), ("mean", "ragged"), ("sum", "ragged"), ("mean", "empty")])
def test_rows_that_come_back_are_the_plain_lookup(cut, pooling, form):
    torch.manual_seed(0)
    table = torch.randn(ROWS, DIM, dtype=torch.float64, requires_grad=True)
    padding = 3 if pooling == "mean" else None
    spec = spec_of(pooling, padding=padding, **CUTS[cut])
    assert decode(spec.encode()) is decode(spec.encode()) and decode(spec.encode()).streams == spec.streams
    ids = {"ids": torch.randint(0, ROWS, (2, 3)), "matrix": torch.randint(0, ROWS, (4, 3)), "ragged": torch.randint(0, ROWS, (9,)), "empty": torch.empty(0).long()}[form]
    offsets = {"ragged": torch.tensor([0, 2, 2, 7]), "empty": torch.empty(0).long()}.get(form)
    wanted = F.embedding(ids, table) if pooling == "none" else F.embedding_bag(ids, table, offsets, mode=pooling, padding_idx=padding)
    extra = torch.randn(*wanted.shape[:-1], 1, dtype=torch.float64)
    header, payload, places, counts = route_ids._route([ids], [offsets], spec.encode())
    slots, header_in = answer(spec, table, header, payload)
    anchor = torch.zeros(1, requires_grad=True)
    sent = exchange_rows._pack_autograd(slots, anchor, header_in, spec.encode(), 0)
    wire = exchange_rows._send(sent, header_in, header, spec.encode(), 0, "")
    received = exchange_rows._wait_autograd(sent, wire, header_in, header, spec.encode(), 0, "")
    (out,) = merge_rows._merge_autograd(received, header, places, counts, [ids], [offsets], [extra], spec.encode())
    torch.testing.assert_close(out, torch.cat([extra, wanted], -1))
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, table, grad), torch.autograd.grad(wanted, table, grad[..., 1:]))


@pytest.mark.parametrize("cut", ["whole", "rows", "grid"])
def test_deduplicated_rows_travel_once(cut):
    torch.manual_seed(0)
    table = torch.randn(ROWS, DIM, dtype=torch.float64)
    spec = spec_of("sum", unique=True, padding=2, **CUTS[cut])
    ids = torch.tensor([[5, 5, 2], [5, 9, 9], [2, 2, 2]])
    header, payload, places, counts, inverse, offsets = route_ids._route([ids], [None], spec.encode())
    per_column = len({s.shard.column for s in spec.streams})
    assert int(header[:, 0].sum()) == 2 * per_column and places.numel() == counts.numel() == 0
    slots, header_in = answer(spec, table, header, payload)
    received = exchange_rows._pack(slots, torch.zeros(1), header_in, spec.encode(), 0)
    (rows,) = merge_rows._unique_autograd(received, header, spec.encode())
    assert rows.shape == (3, DIM) and not rows[0].any()
    pooled = F.embedding_bag(inverse, rows, offsets, mode="sum", include_last_offset=True, padding_idx=0)
    torch.testing.assert_close(pooled, F.embedding_bag(ids, table, mode="sum", padding_idx=2))


def test_bags_of_one_length_do_not_send_their_lengths():
    spec = spec_of("sum")
    header, payload, *_ = route_ids._route([torch.randint(0, ROWS, (4, 3))], [None], spec.encode())
    assert header.tolist() == [[4, 12, 0]] and payload.numel() == 12 and payload.dtype == torch.int32
    header, payload, *_ = route_ids._route([torch.tensor([1, 2, 3])], [torch.tensor([0, 0, 1])], spec.encode())
    assert header.tolist() == [[2, 3, 1]] and payload.tolist() == [1, 2, 1, 2, 3], "the empty bag is not sent"


@pytest.mark.parametrize(("ids", "offsets", "error"), [([11], [0], IndexError), ([-1], [0], IndexError), ([1, 2], [0, 2, 1], ValueError)])
def test_what_cannot_be_looked_up_is_refused_when_all_ranks_know(ids, offsets, error):
    text = spec_of("sum").encode()
    header, payload, *_ = route_ids._route([torch.tensor(ids)], [torch.tensor(offsets)], text)
    with pytest.raises(error, match="emb"):
        exchange_ids._exchange(header, payload, text, 0, "")
    header, payload, *_ = route_ids._route([torch.tensor([1])], [torch.tensor([0])], text)
    exchange_ids._exchange(header, payload, text, 0, "")  # forgotten


def test_the_gradient_of_packed_rows_may_not_be_changed_on_its_way():
    spec = spec_of("none")
    table = torch.randn(ROWS, DIM, dtype=torch.float64, requires_grad=True)
    header, payload, places, counts = route_ids._route([torch.tensor([1, 2])], [None], spec.encode())
    slots, header_in = answer(spec, table, header, payload)
    sent = exchange_rows._pack_autograd(slots, [torch.zeros(1, requires_grad=True)], header_in, spec.encode(), 0)
    sent.register_hook(lambda g: g * 2)
    wire = exchange_rows._send(sent, header_in, header, spec.encode(), 0, "")
    with pytest.raises(RuntimeError, match="changed on its way"):
        exchange_rows._wait_autograd(sent, wire, header_in, header, spec.encode(), 0, "").sum().backward()


def test_streams_of_several_codecs_share_a_wire():
    streams = tuple(
        Stream(Shard(0, 0, ROWS, 0, DIM), 0, (0,), forward=codec, backward="fp32", trained=codec != "int8") for codec in ("int8", "fp32", "fp16", "bf16")
    )  # fmt: skip
    spec = ExchangeSpec(1, spec_of("sum").group, streams, "float32")
    parts = [[(k, 3) for k in range(4)]]
    flat = torch.randn(4 * 3 * DIM)
    sizes = wire_sizes(spec, "forward")
    wire = encoded(flat, spec, parts, sizes)
    assert wire.dtype == torch.uint8 and wire.numel() == 3 * (DIM + 8) + 3 * DIM * (4 + 2 + 2)
    back = decoded(wire, spec, parts, sizes)
    torch.testing.assert_close(back, flat, rtol=1e-2, atol=2e-2)
    assert torch.equal(back[3 * DIM : 6 * DIM], flat[3 * DIM : 6 * DIM])
    sizes = wire_sizes(spec, "backward")  # of frozen tables no gradient travels
    wire = encoded(flat, spec, parts, sizes)
    assert wire.numel() == 3 * 3 * DIM
    assert not decoded(wire, spec, parts, sizes)[: 3 * DIM].any()


def test_a_trace_with_gradients_is_refused():
    """Compiled code would drop the gradients of sharded tables without a word."""
    spec = spec_of("none")
    header, payload, *_ = route_ids._route([torch.tensor([1, 2])], [None], spec.encode())
    slots, header_in = answer(spec, torch.randn(ROWS, DIM, dtype=torch.float64, requires_grad=True), header, payload)

    anchor, text = torch.zeros(1, requires_grad=True), spec.encode()
    run = torch.compile(lambda slot: exchange_rows.PACK([slot], [anchor], header_in, text, 0), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="cannot be compiled"):
        run(slots[0])
    sent = torch.ops.tablewright.pack_rows(slots, [anchor], header_in, text, 0)
    assert sent.requires_grad, "the op itself, without the short way, is differentiable too"
