"""Lookups of sharded tables become exchanges: ids go to the ranks that hold the rows, rows come back.

``y = embedding_bags(tables, ids)``  ->

::

    header, payload, ..    = route_ids(ids)               # which row numbers go to which rank
    header_in, payload_in  = exchange_ids(header, payload)        all-to-all
    bags                   = received_bags(header_in, payload_in)
    answers                = embedding_bags(shards, bags) # this rank's part of each table
    received               = wait_rows(send_rows(pack_rows(answers)))    all-to-all
    y                      = merge_rows(received, ..)     # with what is not sharded copied in

One exchange of ids and one of rows serve all tables of a launch, however each of them is sharded: every sharding is a list of
blocks (``kernels/collectives/spec.py``) and the exchange knows only blocks. ``data_parallel`` tables stay in a plain launch.
Deduplicated lookups are pooled here, by ATen's embedding_bag over the rows that came back; so are lookups with sample weights, whose
gradient needs the rows.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch.fx import Node

from ..kernels.collectives import exchange_ids, exchange_rows, merge_rows, route_ids
from ..kernels.collectives.spec import ExchangeSpec, Stream, TableLayout
from ..kernels.embedding.op import OP
from ..kernels.embedding.spec import Extra, GroupSpec, Lookup, Table, decode
from .cost import KEY as COST
from .cost import Cost
from .graph import Editor, aten, is_op, packet_name, stored_tensor, value_of
from .records import APPLIED, SKIPPED, Record, record
from .rule import Context, Pass

ANCHOR = "_tablewright_anchor"  # an attribute of the root: a tensor that requires a gradient


@dataclass(frozen=True)
class Sharding:
    """Where all tables live, by plain name; this ``rank`` of ``world``; ``group``: the process group's name."""

    layouts: Mapping[str, TableLayout]
    rank: int
    world: int
    group: str


class CannotShard(ValueError):
    """A table is to be sharded, and something that is no fused lookup reads it."""


@dataclass
class ShardTables(Pass):
    """Exchange the lookups of sharded tables."""

    name: ClassVar[str] = "shard_tables"
    kind: ClassVar[str] = "shards"
    numerics: ClassVar[str] = "reassociated"
    alone: ClassVar[bool] = False

    def run(self, context: Context) -> list[Record]:
        sharding: Sharding | None = context.sharding
        if sharding is None:
            return []
        _refuse_other_readers(context, sharding)
        editor = Editor(context.graph, self.name)
        done: dict[str, TableLayout] = {}
        for node in [n for n in context.graph.nodes if n.target is OP]:
            spec = decode(node.args[5])  # type: ignore[arg-type]
            mine = [t.name for t in spec.tables if not sharding.layouts[t.name].replicated]
            done.update((t.name, sharding.layouts[t.name]) for t in spec.tables)
            if mine and context.allowed():
                _Exchange(editor, node, spec, sharding, context).make()
        editor.remove_dead()
        records = [Record(self.kind, APPLIED, name, self.name, detail=describe(layout)) for name, layout in done.items()]
        norms = [n for n in context.graph.nodes if is_op(n, aten.batch_norm.default)]
        return records + [record(self.name, "batch norms over ranks", SKIPPED, n, _NORM) for n in norms]


_NORM = (
    "it normalises by its rank's batch, and its running statistics are its rank's own (a checkpoint holds those of one rank), as under "
    "DistributedDataParallel(broadcast_buffers=False); statistics over all ranks would be needed to equal one process"
)


def describe(layout: TableLayout) -> str:
    """A layout in words."""
    if layout.replicated:
        return "data_parallel: whole on every rank, gradients averaged"
    parts = ", ".join(
        f"rank {s.rank}: rows {s.row}..{s.row + s.rows}" + (f" columns {s.column}..{s.column + s.columns}" if layout.columns_split else "")
        for s in layout.shards[:4]
    )
    more = f", and {len(layout.shards) - 4} more" if len(layout.shards) > 4 else ""
    travel = "" if (layout.forward, layout.backward) == ("fp32", "fp32") else f", rows as {layout.forward}, gradients as {layout.backward}"
    return f"{layout.sharding} ({parts}{more}), {layout.exchange} exchange{travel}"


def _refuse_other_readers(context: Context, sharding: Sharding) -> None:
    names = {id(p): n for n, p in reversed(list(context.root.named_parameters(remove_duplicate=False)))}
    for node in context.graph.nodes:
        tensor = stored_tensor(node, context.root)
        name = None if tensor is None else names.get(id(tensor))
        layout = None if name is None else sharding.layouts.get(name)
        if layout is None or layout.replicated:
            continue
        other = next((u for u in node.users if u.target is not OP), None)
        if other is not None:
            raise CannotShard(
                f"table '{name}' is to be {layout.sharding}, but {packet_name(other) or other.op} reads it as a whole "
                f"({other.meta['origin'].where() if 'origin' in other.meta else ''}). Only fused lookups can be exchanged: let the plan say "
                "sharding: data_parallel for it (the report says why a lookup is not fused)"
            )


class _Exchange:
    """The rewrite of one launch."""

    def __init__(self, editor: Editor, node: Node, spec: GroupSpec, sharding: Sharding, context: Context) -> None:
        self.editor, self.node, self.spec, self.sharding = editor, node, spec, sharding
        self.tables, self.ids, self.offsets, self.weights, self.extras = (list(a) for a in node.args[:5])  # type: ignore[arg-type]
        stored = [t for n in self.tables if (t := stored_tensor(n, context.root)) is not None]
        self.dtype, self.trains = stored[0].dtype, [t.requires_grad for t in stored]
        self.rest = node.args[6:]  # ticket and owner of updates in the backward
        layouts = [sharding.layouts[t.name] for t in spec.tables]
        self.far = [i for i, lookup in enumerate(spec.lookups) if not layouts[lookup.table].replicated]
        self.near = [i for i, lookup in enumerate(spec.lookups) if layouts[lookup.table].replicated]

    def call(self, target: Any, *args: Any) -> Node:
        return self.editor.call(target, *args, before=self.node, sources=[self.node])

    def parts(self, node: Node, count: int) -> list[Node]:
        return [self.call(operator.getitem, node, i) for i in range(count)]

    def make(self) -> None:
        sharding, spec = self.sharding, self.spec
        exchange = self.exchange_spec()
        text, rank, group = exchange.encode(), sharding.rank, sharding.group
        ids, offsets = [self.ids[i] for i in self.far], [self.offsets[i] for i in self.far]
        routed = self.call(route_ids.OP, ids, offsets, text)
        header, payload, places, counts = self.parts(routed, 4)
        exchanged = self.call(exchange_ids.EXCHANGE, header, payload, text, rank, group)
        header_in, payload_in = self.parts(exchanged, 2)
        answers = self.local_lookup(exchange, self.call(exchange_ids.RECEIVED, header_in, payload_in, text, rank))
        anchor = self.editor.attribute(ANCHOR, before=self.node, sources=[self.node])
        sent = self.call(exchange_rows.PACK, answers, anchor, header_in, text, rank)
        wire = self.call(exchange_rows.SEND, sent, header_in, header, text, rank, group)
        numbers, rows = self.wire_bytes(exchange)
        exchanged.meta[COST], wire.meta[COST] = Cost(wire=numbers, calls=1, messages=2), Cost(wire=rows, calls=1, messages=1)
        received = self.call(exchange_rows.WAIT, sent, wire, header_in, header, text, rank, group)
        own = self.pooled_here(exchange, routed, received, header, text)
        near = self.near_lookups()
        joined = [*self.extras, *(own[i] for i in self.far if i in own), *(near[i] for i in self.near)]
        slots = self.call(merge_rows.MERGE, received, header, places, counts, ids, offsets, joined, text)
        slots.meta["val"] = self.node.meta.get("val")
        self.editor.replace(self.node, slots)
        assert len(joined) == len(exchange.group.extras) and spec.slots == exchange.group.slots

    def wire_bytes(self, exchange: ExchangeSpec) -> tuple[float, float]:
        """Bytes that one rank expects to send as ids, and as rows, for a batch of the sample's shapes spread evenly; 0 without shapes."""
        numbers = rows = 0.0
        for stream in exchange.streams:
            share = stream.shard.rows / self.spec.tables[stream.table].rows * (exchange.world - 1) / exchange.world
            for lookup in stream.lookups:
                ids, asked = value_of(self.ids[self.far[lookup]]), exchange.group.lookups[lookup]
                if ids is None or not all(isinstance(n, int) or n.node.has_hint() for n in ids.shape):
                    continue
                count = math.prod(n if isinstance(n, int) else n.node.hint for n in ids.shape)
                single = asked.pooling == "none" or ids.dim() != 2
                bags = count if single else count // max(1, ids.shape[1] if isinstance(ids.shape[1], int) else ids.shape[1].node.hint)
                numbers += 4 * count * share
                rows += min(bags * (exchange.world - 1) / exchange.world, count * share) * stream.shard.columns * self.dtype.itemsize
        return numbers, rows

    # --- the static half ---------------------------------------------------------------------------------------------------------

    def unique(self, lookup: int) -> bool:
        layout = self.sharding.layouts[self.spec.tables[self.spec.lookups[lookup].table].name]
        return layout.exchange == "unique" or self.weights[lookup] is not None

    def exchange_spec(self) -> ExchangeSpec:
        spec, sharding = self.spec, self.sharding
        number = {lookup: i for i, lookup in enumerate(self.far)}
        asked: dict[tuple, list[int]] = {}  # (table, padding, and the lookup itself where it is not deduplicated) -> lookups
        for i in self.far:
            lookup = spec.lookups[i]
            padding = None if lookup.left_out is not None else lookup.padding_idx  # what is left out is not sent
            asked.setdefault((lookup.table, padding, self.unique(i), None if self.unique(i) else i), []).append(number[i])
        streams = []
        for (table, padding, unique, _), lookups in asked.items():
            layout = sharding.layouts[spec.tables[table].name]
            trained = spec.tables[table].grad != "none" and self.trains[table]
            streams += [
                Stream(shard, table, tuple(lookups), unique, padding, trained, layout.forward, layout.backward)
                for shard in layout.shards
            ]
        streams.sort(key=lambda s: s.shard.rank)
        extras = list(spec.extras)
        for i in [*(i for i in self.far if self.unique(i)), *self.near]:
            lookup = spec.lookups[i]
            extras.append(Extra(lookup.slot, lookup.column, spec.tables[lookup.table].dim))
        kept = tuple(replace(t, grad="dense") for t in spec.tables)  # the whole tables; who trains them is said in the streams
        lookups = tuple(spec.lookups[i] for i in self.far)
        dtype = str(self.dtype).removeprefix("torch.")
        return ExchangeSpec(sharding.world, GroupSpec(kept, lookups, spec.slots, tuple(extras)), tuple(streams), dtype)

    # --- the nodes -----------------------------------------------------------------------------------------------------------------

    def local_lookup(self, exchange: ExchangeSpec, bags: Node) -> list[Node]:
        """Look up what all ranks ask of this one: a slot for each stream."""
        mine = exchange.of_rank[self.sharding.rank]
        if not mine:
            return []
        tables: dict[int, Table] = {}
        places: dict[int, int] = {}
        lookups, slots, rows, offsets = [], [], [], []
        for slot, k in enumerate(mine):
            stream = exchange.streams[k]
            shard, whole = stream.shard, self.spec.tables[stream.table]
            if stream.table not in tables:
                places[stream.table] = len(tables)
                tables[stream.table] = replace(whole, rows=shard.rows, dim=shard.columns)
            asked = exchange.group.lookups[stream.lookups[0]]
            single = stream.unique or asked.pooling == "none"
            padding = None if stream.padding is None else stream.padding - shard.row
            if padding is not None and not 0 <= padding < shard.rows:
                padding = None
            pooling = "none" if single else "sum"
            lookups.append(Lookup(places[stream.table], asked.name, pooling, slot, 0, padding, padding_read=padding is not None and not single))
            slots.append(shard.columns)
            rows.append(self.call(operator.getitem, bags, 2 * slot))
            offsets.append(None if single else self.call(operator.getitem, bags, 2 * slot + 1))
        spec = GroupSpec(tuple(tables.values()), tuple(lookups), tuple(slots))
        stored = [self.tables[t] for t in tables]
        updated = any(t.grad == "in_backward" for t in tables.values())
        found = self.call(OP, stored, rows, offsets, [None] * len(rows), [], spec.encode(), *(self.rest if updated else ()))
        return self.parts(found, len(slots))

    def pooled_here(self, exchange: ExchangeSpec, routed: Node, received: Node, header: Node, text: str) -> dict[int, Node]:
        """The results of deduplicated lookups, from the rows that came back."""
        groups = exchange.unique_groups
        if not groups:
            return {}
        found: dict[int, Node] = {}
        at = 4
        for rows, group in zip(self.parts(self.call(merge_rows.UNIQUE, received, header, text), len(groups)), groups):
            for lookup in group.lookups:
                i, asked = self.far[lookup], exchange.group.lookups[lookup]
                where, offsets = self.call(operator.getitem, routed, at), self.call(operator.getitem, routed, at + 1)
                at += 2
                if asked.pooling == "none":
                    found[i] = self.call(aten.embedding.default, rows, where)
                    continue
                weights = self.weights[i]
                weights = None if weights is None else self.call(aten.reshape.default, weights, [-1])
                mode = {"sum": 0, "mean": 1}[asked.pooling]
                bag = self.call(aten.embedding_bag.padding_idx, rows, where, offsets, False, mode, False, weights, True, 0)
                found[i] = self.call(operator.getitem, bag, 0)
        return found

    def near_lookups(self) -> dict[int, Node]:
        """Lookups of tables that every rank holds, in a launch of their own."""
        if not self.near:
            return {}
        used = sorted({self.spec.lookups[i].table for i in self.near})
        lookups = tuple(
            replace(self.spec.lookups[i], table=used.index(self.spec.lookups[i].table), slot=slot, column=0)
            for slot, i in enumerate(self.near)
        )
        tables = tuple(self.spec.tables[t] for t in used)
        spec = GroupSpec(tables, lookups, tuple(tables[k.table].dim for k in lookups))
        updated = any(t.grad == "in_backward" for t in tables)
        found = self.call(
            OP, [self.tables[t] for t in used], [self.ids[i] for i in self.near], [self.offsets[i] for i in self.near],
            [self.weights[i] for i in self.near], [], spec.encode(), *(self.rest if updated else ()),
        )  # fmt: skip
        return dict(zip(self.near, self.parts(found, len(lookups))))


def exchanges(graph) -> list[Node]:
    """The collectives of a rewritten graph, in order."""
    return [n for n in graph.nodes if is_op(n, exchange_ids.EXCHANGE, exchange_rows.SEND)]
