"""What one exchange of lookups does, as data: which rank holds which part of each table, and what travels between ranks.

Vocabulary: a *shard* is a block of a table (a range of rows and of columns) on one rank. A *stream* is what goes to one shard for
one lookup: its *bags*, each a run of row numbers. The owner answers a stream with one row (of the shard's columns) for each bag:
the bag's sum. With ``unique`` exchange a stream serves all lookups of the table, and its bags are the distinct rows they read, one
each; the requester pools them itself. Bags that have no row in a shard are not sent there.

An :class:`ExchangeSpec` is the static half of an exchange, the same text on all ranks; ranks count within the process group.
"""
from __future__ import annotations

import functools
import json
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch

from ..embedding.spec import Extra, GroupSpec, Lookup, Table

HEADER = 3  # numbers that announce a stream: bags, rows, and whether the bags' lengths follow (they differ)


@dataclass(frozen=True)
class Shard:
    """Rows ``[row, row + rows)`` and columns ``[column, column + columns)`` of a table, on ``rank``."""

    rank: int
    row: int
    rows: int
    column: int
    columns: int


@dataclass(frozen=True)
class TableLayout:
    """Where one table lives. ``sharding``: TorchRec's name for it; ``shards``: at most one on each rank (none: ``data_parallel``).
    ``exchange``: "pooled" or "unique" (in a plan also "auto", until the bytes are counted). ``forward``, ``backward``: the codec of rows and of their gradients.
    ``by_node``: how many ranks a node has, where bags are added up inside each node before they cross nodes; 0: they are not."""

    name: str
    rows: int
    dim: int
    sharding: str
    shards: tuple[Shard, ...] = ()
    exchange: str = "pooled"
    forward: str = "fp32"
    backward: str = "fp32"
    by_node: int = 0

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the whole table."""
        return not self.shards

    def on(self, rank: int) -> Shard | None:
        """What ``rank`` holds; ``None``: nothing."""
        return next((s for s in self.shards if s.rank == rank), None)

    @property
    def columns_split(self) -> bool:
        """Whether rows are cut, so that no rank holds a whole one."""
        return any(s.columns != self.dim for s in self.shards)

    def across(self, ranks: int) -> TableLayout:
        """The same table over nodes of so many ranks: what the ranks of a node hold is one shard, whose ``rank`` is the node's number.
        Raises ValueError where that is no block."""
        nodes: dict[int, list[Shard]] = {}
        for shard in self.shards:
            nodes.setdefault(shard.rank // ranks, []).append(shard)
        blocks = []
        for node, held in nodes.items():
            held = sorted(held, key=lambda s: s.row)
            first, rows = held[0], sum(s.rows for s in held)
            ends = [s.row + s.rows for s in held[:-1]]
            if ends != [s.row for s in held[1:]] or any((s.column, s.columns) != (first.column, first.columns) for s in held):
                raise ValueError(f"what node {node} holds of '{self.name}' is no range of rows")
            blocks.append(Shard(node, first.row, rows, first.column, first.columns))
        return replace(self, shards=tuple(blocks), by_node=0)

    def inside(self, node: int, ranks: int) -> TableLayout:
        """What a node of so many ranks holds, as a table of its own over those ranks; rows travel in it as they are."""
        whole = next((s for s in self.across(ranks).shards if s.rank == node), Shard(node, 0, 0, 0, 0))
        held = tuple(
            Shard(s.rank % ranks, s.row - whole.row, s.rows, 0, s.columns) for s in self.shards if s.rank // ranks == node
        )
        return TableLayout(self.name, whole.rows, whole.columns, "row_wise", held)


@dataclass(frozen=True)
class Stream:
    """What goes to one shard. ``lookups``: the one it serves, or with ``unique`` all of them. ``padding``: the row (of the table)
    that gets no gradient. ``trained``: whether gradients go back."""

    shard: Shard
    table: int
    lookups: tuple[int, ...]
    unique: bool = False
    padding: int | None = None
    trained: bool = True
    forward: str = "fp32"
    backward: str = "fp32"


@dataclass(frozen=True)
class ExchangeSpec:
    """``group``: the lookups (whole tables), and where each pooled lookup's result goes: slots, and ``extras`` that are copied in
    beside them. ``streams``: ordered by rank, the same on all ranks. ``dtype``: of the tables. ``beside``: what a rank answers another
    travels bag by bag, the rows of all its streams side by side, as one lookup writes them and one reads their gradients; each of these
    streams has the same bags then. Else stream after stream."""

    world: int
    group: GroupSpec
    streams: tuple[Stream, ...]
    dtype: str
    beside: bool = False

    def encode(self) -> str:
        """The canonical text."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @cached_property
    def of_rank(self) -> tuple[tuple[int, ...], ...]:
        """The streams that go to each rank."""
        return tuple(tuple(i for i, s in enumerate(self.streams) if s.shard.rank == r) for r in range(self.world))

    def anchored(self, rank: int) -> tuple[int, ...]:
        """The trained tables that are no leaf of their own below what ``rank`` answers: it has no part of them, or one that is updated in the
        backward, where one table stands for all of a launch."""
        here = {self.streams[k].table for k in self.of_rank[rank]}
        return tuple(sorted({s.table for s in self.streams if s.trained and (s.table not in here or self.group.tables[s.table].grad == "in_backward")}))

    @cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """The streams whose rows travel side by side, in the order in which they travel."""
        return tuple(mine for mine in self.of_rank if mine) if self.beside else tuple((k,) for k in range(len(self.streams)))

    @cached_property
    def id_dtype(self) -> torch.dtype:
        """Row numbers travel as int32 wherever they fit."""
        return torch.int32 if all(s.shard.rows < 2**31 for s in self.streams) else torch.int64

    @cached_property
    def pooled_streams(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(lookup, its streams) of each lookup that is pooled by the owners."""
        return tuple(
            (i, found) for i in range(len(self.group.lookups))
            if (found := tuple(k for k, s in enumerate(self.streams) if not s.unique and s.lookups == (i,)))
        )  # fmt: skip

    @cached_property
    def alike(self) -> bool:
        """Whether the lookups differ in their tables only, and each is pooled by the owners (or not at all) with every id in it."""
        forms = {(k.pooling, k.include_last_offset, k.left_out, k.wrap_negative) for k in self.group.lookups}
        (pooling, _, left_out, wraps), *others = forms
        return not others and pooling != "mean" and left_out is None and not wraps and not any(s.unique for s in self.streams)

    @cached_property
    def unique_groups(self) -> tuple[UniqueGroup, ...]:
        """What is deduplicated together."""
        keys = dict.fromkeys((s.table, s.padding, s.lookups) for s in self.streams if s.unique)
        groups = []
        for table, padding, lookups in keys:
            mine = [k for k, s in enumerate(self.streams) if s.unique and (s.table, s.padding, s.lookups) == (table, padding, lookups)]
            ranges = sorted({(self.streams[k].shard.row, self.streams[k].shard.rows) for k in mine})
            parts = []
            for row, rows in ranges:
                same = [k for k in mine if self.streams[k].shard.row == row]
                parts.append((row, rows, tuple(sorted(same, key=lambda k: self.streams[k].shard.column))))
            groups.append(UniqueGroup(table, lookups, tuple(parts)))
        return tuple(groups)

    def header_splits(self, rank: int) -> tuple[list[int], list[int]]:
        """How many header numbers go to, and come from, each rank: a state, and :data:`HEADER` for each stream."""
        return [1 + HEADER * len(mine) for mine in self.of_rank], [1 + HEADER * len(self.of_rank[rank])] * self.world

    @cached_property
    def checksum(self) -> int:
        """A number by which ranks see that they make the same exchange."""
        return zlib.crc32(self.encode().encode())


@dataclass(frozen=True)
class UniqueGroup:
    """Lookups whose rows are deduplicated together. ``parts``: (first row, rows, streams in the order of their columns) for each
    range of rows."""

    table: int
    lookups: tuple[int, ...]
    parts: tuple[tuple[int, int, tuple[int, ...]], ...]


@functools.lru_cache(maxsize=1024)
def decode(text: str) -> ExchangeSpec:
    """The spec that :meth:`ExchangeSpec.encode` wrote; equal texts give the same object."""
    raw = json.loads(text)
    group = raw["group"]
    return ExchangeSpec(
        raw["world"],
        GroupSpec(
            tuple(Table(**t) for t in group["tables"]), tuple(Lookup(**k) for k in group["lookups"]), tuple(group["slots"]),
            tuple(Extra(**e) for e in group["extras"]),
        ),
        tuple(Stream(**{**s, "shard": Shard(**s["shard"]), "lookups": tuple(s["lookups"])}) for s in raw["streams"]),
        raw["dtype"], raw["beside"],
    )  # fmt: skip


def starts_of(sizes: list[int]) -> list[int]:
    """Where each part begins in their concatenation."""
    return [0, *accumulate(sizes)][:-1]
