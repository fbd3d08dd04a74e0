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

Where ranks of one node hold ranges of a table's rows, pooled lookups of it are exchanged in two stages (``TableLayout.by_node``). First
across nodes, between ranks of equal place in them, as if each node were one rank that holds the whole range; the ``embedding_bags``
that such a "rank" then makes is an exchange again, inside the node: it hands ids to the owners and adds up their parts of each bag. So
a bag crosses nodes once for each node that has a part of it, and not once for each rank; ids cross once, as they do anyway. The
backward is the mirror of it, as it is of every exchange.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch.fx import Node

from ..kernels.codecs.op import row_bytes
from ..kernels.collectives import exchange_ids, exchange_rows, merge_rows, route_ids
from ..kernels.collectives.spec import ExchangeSpec, Stream, TableLayout
from ..kernels.collectives.wire import AS_IS
from ..kernels.embedding.op import OP
from ..kernels.embedding.spec import Extra, GroupSpec, Lookup, Table, decode
from .cost import KEY as COST
from .cost import Cost
from .graph import Editor, aten, is_op, packet_name, stored_tensor, value_of
from .records import APPLIED, DISABLED, SKIPPED, Record, record
from .rule import Context, Pass

BY_NODE = ("table_row_wise", "grid_shard")  # shardings whose bags are added up inside nodes first, where there are nodes
ANCHOR = "_tablewright_anchor"  # an attribute of the root: a tensor that requires a gradient


@dataclass(frozen=True)
class Sharding:
    """Where all tables live, by plain name; this ``rank`` of ``world``; ``group``: the process group's name. ``per_node``: ranks of a
    node, where there are several nodes of several ranks; then ``inside`` names the group of this rank's node, and ``across`` that of the ranks
    with its place in all nodes. ``everyone``: see ``exchange_ids``; ``stage``: how what this rank is asked for is looked up, if not here."""

    layouts: Mapping[str, TableLayout]
    rank: int
    world: int
    group: str
    per_node: int = 0
    inside: str = ""
    across: str = ""
    everyone: str = ""
    stage: Sharding | None = None

    def of_nodes(self) -> Sharding:
        """The stage across nodes, whose ranks are the nodes; inside them is its own ``stage``."""
        node, each = self.rank // self.per_node, self.per_node
        cut = {name: layout for name, layout in self.layouts.items() if layout.by_node}
        inside = Sharding({n: t.inside(node, each) for n, t in cut.items()}, self.rank % each, each, self.inside, per_node=each)
        layouts = {**self.layouts, **{n: t.across(each) for n, t in cut.items()}}
        return Sharding(layouts, node, self.world // each, self.across, everyone=self.group, stage=inside)

    def sent(self, count: float) -> tuple[float, float]:
        """Of ``count`` bytes for all ranks alike: what leaves the node, and what goes to its other ranks. Without nodes all that leaves the
        rank leaves the node."""
        each = self.per_node or 1
        return count * (self.world - each) / self.world, count * (each - 1) / self.world


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
        records: list[Record] = []
        for node in [n for n in context.graph.nodes if n.target is OP]:
            spec = decode(node.args[5])  # type: ignore[arg-type]
            mine = [t.name for t in spec.tables if not sharding.layouts[t.name].replicated]
            done.update((t.name, sharding.layouts[t.name]) for t in spec.tables)
            if mine and context.allowed():
                made = _Exchange(editor, node, spec, sharding, context)
                records += made.records(self.name)
                made.make()
        editor.remove_dead()
        records += [Record(self.kind, APPLIED, name, self.name, detail=describe(layout)) for name, layout in done.items()]
        norms = [n for n in context.graph.nodes if is_op(n, aten.batch_norm.default)]
        return records + [record(self.name, "batch norms over ranks", SKIPPED, n, _NORM) for n in norms]


_NORM = (
    "it normalises by its rank's batch, and its running statistics are its rank's own (a checkpoint holds those of one rank), as under "
    "DistributedDataParallel(broadcast_buffers=False); statistics over all ranks would be needed to equal one process"
)
_NO_SUM = "its rows travel one by one (no bags, or deduplicated or weighted ones), so nothing is added up by their owners; sums or means of bags were needed"
_NO_NODE = "the plan says so, or no node has several ranges of its rows: each rank sends its part of a bag straight to the rank that asked"


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
    first = ", reduced inside the node first" if layout.by_node else ""
    return f"{layout.sharding} ({parts}{more}), {layout.exchange} exchange{first}{travel}"


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
    """The rewrite of one launch. ``at``: where its nodes go (by default where the launch is); ``asked``: (ids, bags) that this rank has for each
    lookup, where their shapes do not say so."""

    def __init__(
        self, editor: Editor, node: Node, spec: GroupSpec, sharding: Sharding, context: Context, at: Node | None = None,
        asked: Sequence[tuple[float, float] | None] = (),
    ) -> None:  # fmt: skip
        self.editor, self.node, self.spec, self.sharding, self.context, self.at = editor, node, spec, sharding, context, at or node
        self.tables, self.ids, self.offsets, self.weights, self.extras = (list(a) for a in node.args[:5])  # type: ignore[arg-type]
        stored = [t for n in self.tables if (t := stored_tensor(n, context.root)) is not None]
        self.dtype, self.trains = stored[0].dtype, [t.requires_grad for t in stored]
        self.rest = node.args[6:]  # ticket and owner of updates in the backward
        self.asked = asked or [_asked(*each) for each in zip(spec.lookups, self.ids, self.offsets)]
        self.far = [i for i in range(len(spec.lookups)) if not self.layout(i).replicated]
        self.near = [i for i in range(len(spec.lookups)) if self.layout(i).replicated]
        self.staged = [i for i in self.far if self.layout(i).by_node and spec.lookups[i].pooling != "none" and not self.unique(i)]

    def layout(self, lookup: int) -> TableLayout:
        return self.sharding.layouts[self.spec.tables[self.spec.lookups[lookup].table].name]

    def call(self, target: Any, *args: Any) -> Node:
        return self.editor.call(target, *args, before=self.at, sources=[self.node])

    def parts(self, node: Node, count: int) -> list[Node]:
        return [self.call(operator.getitem, node, i) for i in range(count)]

    def make(self) -> Node:
        """What the launch is replaced by."""
        if self.staged and self.staged == self.far:
            return self.inner(self.node, self.spec, self.sharding.of_nodes(), self.asked).make()
        self.far = [i for i in self.far if i not in self.staged]
        if not self.staged:
            self.ask()
            return self.answer()
        launch = self.launch(self.staged)
        stages = self.inner(launch, decode(launch.args[5]), self.sharding.of_nodes(), [self.asked[i] for i in self.staged])  # type: ignore[arg-type]
        stages.ask()
        self.ask()  # the ids of both are under way before either is answered
        return self.answer(self.results(self.staged, stages.answer()))

    def inner(self, node: Node, spec: GroupSpec, sharding: Sharding, asked: Sequence[tuple[float, float] | None]) -> _Exchange:
        """The exchange of a launch that this one made, or is."""
        return _Exchange(self.editor, node, spec, sharding, self.context, self.at, asked)

    def ask(self) -> None:
        """Ids on their way to those who hold the rows."""
        self.exchange = self.exchange_spec()
        self.text = self.exchange.encode()
        self.given = [self.ids[i] for i in self.far], [self.offsets[i] for i in self.far]
        self.routed = self.call(route_ids.OP, *self.given, self.text)
        self.header, payload, self.places, self.counts = self.parts(self.routed, 4)
        sharding = self.sharding
        to = self.text, sharding.rank, sharding.group, *([sharding.everyone] if sharding.everyone else [])
        exchanged = self.call(exchange_ids.EXCHANGE, self.header, payload, *to)
        numbers, self.rows = (sharding.sent(count) for count in self.wire_bytes(self.exchange.streams, self.far))
        exchanged.meta[COST] = Cost(wire=numbers[0], inside=numbers[1], calls=1, messages=2)
        self.header_in, self.payload_in = self.parts(exchanged, 2)

    def answer(self, elsewhere: Mapping[int, Node] | None = None) -> Node:
        """Rows on their way back, and what the launch gave made of them. ``elsewhere``: the results of lookups that are not in this exchange."""
        sharding, spec, exchange, text = self.sharding, self.spec, self.exchange, self.text
        rank, group, header, header_in = sharding.rank, sharding.group, self.header, self.header_in
        answers = self.local_lookup(exchange, self.call(exchange_ids.RECEIVED, header_in, self.payload_in, text, rank))
        anchors = [self.editor.attribute(ANCHOR, before=self.at, sources=[self.node]), *(self.tables[t] for t in exchange.anchored(rank))]
        sent = self.call(exchange_rows.PACK, answers, anchors, header_in, text, rank)
        wire = self.call(exchange_rows.SEND, sent, header_in, header, text, rank, group)
        wire.meta[COST] = Cost(wire=self.rows[0], inside=self.rows[1], calls=1, messages=1)
        received = self.call(exchange_rows.WAIT, sent, wire, header_in, header, text, rank, group)
        own = {**self.pooled_here(exchange, self.routed, received, header, text), **(elsewhere or {})}
        near = self.results(self.near, self.launch(self.near)) if self.near else {}
        joined = [*self.extras, *(own[i] for i in sorted(own)), *(near[i] for i in self.near)]
        slots = self.call(merge_rows.MERGE, received, header, self.places, self.counts, *self.given, joined, text)
        slots.meta["val"] = self.node.meta.get("val")
        self.editor.replace(self.node, slots)
        assert len(joined) == len(exchange.group.extras) and spec.slots == exchange.group.slots
        return slots

    def wire_bytes(self, streams: Sequence[Stream], chosen: Sequence[int], gradients: bool = False) -> tuple[float, float]:
        """Bytes that one rank expects to send to all ranks (itself too) as ids, and as rows (``gradients``: and to get as their gradients), for ids
        spread evenly over the rows; 0 for lookups of unknown size. The streams' lookups are places in ``chosen``."""
        numbers = rows = 0.0
        for stream in streams:
            for lookup in (chosen[place] for place in stream.lookups):
                ids, bags = self.part(stream, lookup)
                ragged = ids > bags and (stream.shard.rows < self.spec.tables[stream.table].rows or self.offsets[lookup] is not None)
                numbers += 4 * (ids + (bags if ragged else 0))
                for codec in (stream.forward, *([stream.backward] if gradients and stream.trained else [])):
                    columns = stream.shard.columns
                    rows += bags * (columns * self.dtype.itemsize if codec == AS_IS else row_bytes(codec, columns))
        return numbers, rows

    def part(self, stream: Stream, lookup: int) -> tuple[float, float]:
        """How many ids and bags of a lookup are expected to go to a stream; 0 where that is not known."""
        ids, bags = self.asked[lookup] or (0.0, 0.0)
        share = stream.shard.rows / max(1, self.spec.tables[stream.table].rows)
        return (ids * share, bags * (1 - (1 - share) ** (ids / bags))) if bags else (0.0, 0.0)

    def records(self, rule: str) -> list[Record]:
        """What is said of bags that are, or could be, added up inside nodes."""
        kind, found, flat = "node sums", [], self.sharding
        for i in self.far if flat.per_node else []:
            lookup, layout = self.spec.lookups[i], self.layout(i)
            if i in self.staged:
                sent = []
                for each in (flat.of_nodes(), flat):
                    streams = self.streams(each.layouts, [i])
                    sent.append(round(each.sent(sum(self.wire_bytes(streams, [i], gradients=True)))[0]))
                size = f": {sent[0]:,} bytes across nodes instead of {sent[1]:,} (a rank's ids, rows and gradients of a step)" if self.asked[i] else ""
                found.append(Record(kind, APPLIED, lookup.name, rule, detail=f"reduced inside the node first{size}"))
            elif layout.by_node:
                found.append(Record(kind, SKIPPED, lookup.name, rule, _NO_SUM))
            elif layout.sharding in BY_NODE and layout.exchange == "pooled" and lookup.pooling != "none":
                found.append(Record(kind, DISABLED, lookup.name, rule, _NO_NODE))
        return found

    # --- the static half ---------------------------------------------------------------------------------------------------------

    def unique(self, lookup: int) -> bool:
        return self.layout(lookup).exchange == "unique" or self.weights[lookup] is not None

    def streams(self, layouts: Mapping[str, TableLayout], chosen: Sequence[int]) -> list[Stream]:
        """What goes to whom for the lookups ``chosen``, by whose places in that list they are named."""
        spec = self.spec
        asked: dict[tuple, list[int]] = {}  # (table, padding, and the lookup itself where it is not deduplicated) -> lookups
        for place, i in enumerate(chosen):
            lookup = spec.lookups[i]
            padding = None if lookup.left_out is not None else lookup.padding_idx  # what is left out is not sent
            asked.setdefault((lookup.table, padding, self.unique(i), None if self.unique(i) else i), []).append(place)
        streams = []
        for (table, padding, unique, _), lookups in asked.items():
            layout = layouts[spec.tables[table].name]
            trained = spec.tables[table].grad != "none" and self.trains[table]
            facts = table, tuple(lookups), unique, padding, trained, layout.forward, layout.backward
            streams += [Stream(shard, *facts) for shard in layout.shards]
        return sorted(streams, key=lambda s: s.shard.rank)

    def exchange_spec(self) -> ExchangeSpec:
        spec, sharding = self.spec, self.sharding
        streams = self.streams(sharding.layouts, self.far)
        extras = list(spec.extras)
        apart = [i for i in range(len(spec.lookups)) if i not in self.near and (i not in self.far or self.unique(i))]
        for i in [*apart, *self.near]:
            lookup = spec.lookups[i]
            extras.append(Extra(lookup.slot, lookup.column, spec.tables[lookup.table].dim))
        lookups = tuple(spec.lookups[i] for i in self.far)
        dtype = str(self.dtype).removeprefix("torch.")
        found = ExchangeSpec(sharding.world, GroupSpec(spec.tables, lookups, spec.slots, tuple(extras)), tuple(streams), dtype)
        return replace(found, beside=self.beside(found))

    def beside(self, exchange: ExchangeSpec) -> bool:
        """Can one lookup write all that a rank answers, and one read the gradients? Its streams must have the same bags, and travel as they are."""
        return (
            exchange.alike and len({k.slot for k in exchange.group.lookups}) == 1 and len({self.offsets[i] for i in self.far}) == 1
            and all(s.shard.rows == exchange.group.tables[s.table].rows for s in exchange.streams)
            and {(s.forward, s.backward) for s in exchange.streams} == {(AS_IS, AS_IS)} and len({s.trained for s in exchange.streams}) == 1
        )  # fmt: skip

    # --- the nodes -----------------------------------------------------------------------------------------------------------------

    def local_lookup(self, exchange: ExchangeSpec, bags: Node) -> list[Node]:
        """Look up what all ranks ask of this one: a slot for each stream, or one for all."""
        mine = exchange.of_rank[self.sharding.rank]
        if not mine:
            return []
        tables: dict[int, Table] = {}
        places: dict[int, int] = {}
        lookups, slots, rows, offsets, counts = [], [], [], [], []
        for place, k in enumerate(mine):
            stream = exchange.streams[k]
            slot, column = (0, sum(slots)) if exchange.beside else (place, 0)
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
            reads = padding is not None and not single
            lookups.append(Lookup(places[stream.table], asked.name, pooling, slot, column, padding, padding_read=reads))
            slots.append(shard.columns)
            counts.append(tuple(n * exchange.world for n in self.part(stream, self.far[stream.lookups[0]])))
            rows.append(self.call(operator.getitem, bags, 2 * place))
            offsets.append(None if single else self.call(operator.getitem, bags, 2 * place + 1))
        if exchange.beside:
            slots = [sum(slots)]
        spec = GroupSpec(tuple(tables.values()), tuple(lookups), tuple(slots))
        stored = [self.tables[t] for t in tables]
        updated = any(t.grad == "in_backward" for t in tables.values())
        found = self.call(OP, stored, rows, offsets, [None] * len(rows), [], spec.encode(), *(self.rest if updated else ()))
        if self.sharding.stage is not None:
            found = self.inner(found, spec, self.sharding.stage, counts).make()
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

    def launch(self, chosen: Sequence[int]) -> Node:
        """Some of the lookups in a launch of their own."""
        used = sorted({self.spec.lookups[i].table for i in chosen})
        lookups = tuple(
            replace(self.spec.lookups[i], table=used.index(self.spec.lookups[i].table), slot=slot, column=0) for slot, i in enumerate(chosen)
        )
        tables = tuple(self.spec.tables[t] for t in used)
        spec = GroupSpec(tables, lookups, tuple(tables[k.table].dim for k in lookups))
        updated = any(t.grad == "in_backward" for t in tables)
        return self.call(
            OP, [self.tables[t] for t in used], [self.ids[i] for i in chosen], [self.offsets[i] for i in chosen],
            [self.weights[i] for i in chosen], [], spec.encode(), *(self.rest if updated else ()),
        )  # fmt: skip

    def results(self, chosen: Sequence[int], launch: Node) -> dict[int, Node]:
        """What each lookup of such a launch gives."""
        return dict(zip(chosen, self.parts(launch, len(chosen))))


def _asked(lookup: Lookup, ids: Node, offsets: Node | None) -> tuple[float, float] | None:
    """How many ids and bags a lookup has in a batch of the sample's shapes; ``None``: that is not known."""
    shape, starts = _sizes(ids), _sizes(offsets)
    if not shape or offsets is not None and not starts:
        return None
    count = math.prod(shape)
    bags = count if lookup.pooling == "none" else starts[0] - lookup.include_last_offset if starts else shape[0]
    return float(count), float(bags)


def _sizes(node: Node | None) -> list[int] | None:
    value = value_of(node)
    if value is None or not all(isinstance(n, int) or n.node.has_hint() for n in value.shape):
        return None
    return [n if isinstance(n, int) else n.node.hint for n in value.shape]


def exchanges(graph) -> list[Node]:
    """The collectives of a rewritten graph, in order."""
    return [n for n in graph.nodes if is_op(n, exchange_ids.EXCHANGE, exchange_rows.SEND)]
