"""The ways to place a table on the ranks of a topology, and what each costs in a training step: seconds, bytes sent, bytes held.

A sharded table is a set of blocks, each a range of rows and of columns on one rank, as the exchange knows them. A step of a block with a
part ``p`` of the ids (``q`` of the different ones) and ``d`` columns, where each of R ranks has ``n`` ids, ``u`` of them different, in ``b`` bags of
``h = n / b``:

==========  =====================================  =========================================  =====================================
exchange    rows read at the owner                 results ``r`` sent to each rank            ids sent by each rank
==========  =====================================  =========================================  =====================================
pooled      ``R n p``                              ``b (1 - (1 - p)^h)``: bags with a part    ``n p``, and a length for each bag
unique      ``R u q``                              ``u q``                                    ``u q``
==========  =====================================  =========================================  =====================================

The owner reads those rows (the first time here and there in memory, then from caches) and writes the results; backward it reads their gradients, sums them for each row that was read, and reads
and writes each different row of the R batches with its state. Ids go to the owner, results come from it, gradients go back, each in
an all-to-all, encoded as ``communication`` says. The other side merges (or pools) results on every rank. ``data_parallel`` tables are
read where they are; rows of their gradients go to every rank. All-to-alls and arithmetic are added up: overlap is not counted on.

Pooled bags that are added up inside nodes first (``docs/sharding.md``) have two stages. Each rank of a node exchanges with one rank of each other
node what the table says for the part ``p`` of all the node's blocks; and each owner exchanges with each other rank of its node, as many times as
there are nodes, what it says for its own ``p``, without codecs.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ...kernels.codecs.op import row_bytes
from ...passes.shard_tables import BY_NODE
from ..errors import PlanError
from ..placement import Communication
from ..plan import TablePlan
from .facts import TableFacts, even
from .option import Option
from .topology import GB, Topology

_ID = 4  # bytes of an id or a length on its way
_LEAST_COLUMNS = 8  # of a column shard: narrower rows do not fill a cache line's worth of work


@dataclass(frozen=True, eq=False)
class Way:
    """One way to place a table. Arrays have one entry for each block: ``rows`` and ``columns``; seconds on its rank for ``lookup`` and
    ``update``; bytes between it and each other rank (of its node, where there is ``across``): ``ids`` in, ``results`` out, ``gradients`` in.
    ``across``: those three between each rank of the block's node and one rank of each other node, where bags are added up inside nodes.
    ``merge``: seconds on every rank. ``gathered``: bytes that each rank sends to each other one (data_parallel)."""

    sharding: str
    exchange: str
    communication: Communication
    rows: np.ndarray
    columns: np.ndarray
    lookup: np.ndarray
    update: np.ndarray
    ids: np.ndarray
    results: np.ndarray
    gradients: np.ndarray
    merge: float
    gathered: float = 0.0
    split: str = "even"
    across: tuple[np.ndarray, ...] = ()

    def seconds(self, topology: Topology) -> list[tuple[np.ndarray, np.ndarray]]:
        """For ids, results and gradients: the seconds of each block's rank, and those of them that every rank of its node has."""
        inside = (self.ids, self.results, self.gradients)
        if not self.across:
            return [(each * topology.all_to_all(1.0), 0.0 * each) for each in inside]
        near, far = topology.inside_node(1.0), topology.across_nodes(1.0)
        return [(each * near + once * far, once * far) for each, once in zip(inside, self.across)]

    def sent(self, ranks: np.ndarray, topology: Topology) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that each rank sends in a step with the blocks on ``ranks``: to all others, and of them to other nodes."""
        world, each = topology.ranks, topology.ranks_per_node
        node_of, nodes = np.arange(world) // each, topology.nodes
        if not len(ranks):
            return np.full(world, self.gathered * (world - 1)), np.full(world, self.gathered * (world - each))
        back = self.ids + self.gradients
        of_node = np.bincount(ranks // each, back, nodes)[node_of]  # what a rank sends to blocks of its own node
        of_rank = np.bincount(ranks, back, world)
        results = np.bincount(ranks, self.results, world)
        if not self.across:
            across = back.sum() - of_node + results * (world - each)
            return across + of_node - of_rank + results * (each - 1), across
        held, first = np.unique(ranks // each, return_index=True)
        asked = np.bincount(held, (self.across[0] + self.across[2])[first], nodes)
        across = asked.sum() - asked[node_of] + np.bincount(held, self.across[1][first] * (nodes - 1), nodes)[node_of]
        return across + of_node - of_rank + results * (each - 1), across

    def __str__(self) -> str:
        if self.sharding == "data_parallel":
            return self.sharding
        over = f" over {len(self.rows)}" if len(self.rows) > 1 else ""
        first = ", reduced in the node" if self.across and self.sharding == "row_wise" else ""
        return f"{self.sharding}{over}, {self.exchange}{first}" + (", split by sample" if self.split == "sample" else "")


def options_of(facts: TableFacts, topology: Topology, wish: TablePlan | None = None) -> list[Option]:
    """Every way that ``wish`` (a resolved entry of a plan) allows. Raises :class:`PlanError` where there is none."""
    wish = wish or TablePlan()
    key = replace(facts, name="", assumed="") if facts.sample is None else None
    names = ("sharding", "ranks", "exchange", "communication", "split", "reduce_in_node")
    plain = TablePlan(**{name: getattr(wish, name) for name in names})
    found = _cached(key, topology, plain) if key is not None else list(_options(facts, topology, plain))
    if not found:
        on = f" on ranks {list(wish.ranks)}" if wish.ranks is not None else f" over {topology.ranks} ranks"
        raise PlanError(f"table '{facts.name}' of {facts.rows} rows and {facts.dim} columns cannot be {wish.sharding or 'sharded'}{on}")
    return found


@functools.lru_cache(maxsize=4096)
def _cached(facts: TableFacts, topology: Topology, wish: TablePlan) -> list[Option]:
    return list(_options(facts, topology, wish))


def _options(facts: TableFacts, topology: Topology, wish: TablePlan) -> Iterator[Option]:
    ranks, node = topology.ranks, topology.ranks_per_node
    if ranks == 1:
        yield _replicated(facts, topology, wish.communication or Communication())
        return
    sizes = _parts(ranks)
    fixed = wish.ranks
    if fixed is not None:
        sizes = [len(fixed)]
    nodes = topology.nodes if fixed is None else len({r // node for r in fixed})

    def ways() -> Iterator[tuple[str, int, int]]:  # sharding, parts of columns, parts of rows
        yield "data_parallel", 0, 0
        yield "table_wise", 1, 1
        for k in sizes if not wish.reduce_in_node or fixed is not None else [ranks]:
            yield "row_wise", 1, k
        for k in sizes:
            yield "column_wise", k, 1
        yield "table_row_wise", 1, node if fixed is None else len(fixed)
        for n in _parts(nodes) if fixed is None else [nodes]:
            yield "grid_shard", n, node if fixed is None else len(fixed) // nodes

    for sharding, columns, rows in ways():
        if wish.sharding not in (None, sharding):
            continue
        if sharding == "data_parallel":
            yield _replicated(facts, topology, wish.communication or Communication())
            continue
        least = 1 if wish.sharding is not None else _LEAST_COLUMNS
        if rows > max(facts.rows, 1) or (columns > 1 and facts.dim // columns < least) or (fixed is not None and columns * rows != len(fixed)):
            continue
        if wish.sharding is None and sharding in ("table_row_wise", "grid_shard") and topology.nodes == 1:
            continue  # inside one node they are row_wise and column_wise
        splits = [wish.split] if wish.split else ["even", "sample"] if rows > 1 and facts.sample is not None else ["even"]
        for exchange in ("pooled", "unique") if wish.exchange in (None, "auto") else (wish.exchange,):
            for split in splits:
                yield _option(facts, topology, wish, sharding, even(facts.dim, columns), facts.ranges(rows, split), exchange, split)


def _parts(most: int) -> list[int]:
    """Into how many parts a table may be cut: 2 to 8, then in steps of about a fifth, and ``most``."""
    found, k = set(), 2
    while k < most:
        found.add(k)
        k = k + 1 if k < 8 else k + max(1, k // 5)
    return sorted(found | {most})


def _option(facts, topology, wish, sharding: str, columns, ranges, exchange: str, split: str) -> Option:
    travel = wish.communication or Communication()
    pooled, r, node = facts.pooled and exchange == "pooled", topology.ranks, topology.ranks_per_node
    reduced = wish.reduce_in_node or wish.reduce_in_node is None and sharding in BY_NODE
    of_node = 0  # blocks of one node whose bags are added up there
    if pooled and reduced and 1 < node < r:
        of_node = len(ranges[0]) // (topology.nodes if sharding == "row_wise" else 1)
    way = _blocks(facts, topology, sharding, np.asarray(columns), ranges, exchange, travel, split, of_node if of_node > 1 else 0)
    seconds = way.seconds(topology)
    costs = way.lookup + way.update + sum(own for own, _ in seconds) + topology.shard_us * 1e-6
    results = way.results
    if not way.across:
        results = way.results / np.array([_row_bytes(travel.forward, d, facts) for d in way.columns]) * way.columns * facts.itemsize
    memory = facts.held(way.rows, way.columns) + (node if way.across else r) * (way.ids + 2 * results)
    memory = memory + (facts.unique_in(r) * (way.rows / max(facts.rows, 1)) * way.columns * facts.itemsize if facts.trained else 0.0)
    merged = float(results.sum()) + 2 * facts.bags * facts.dim * facts.itemsize + (0.0 if pooled else facts.ids * _ID)
    everywhere = way.merge + len(way.rows) * topology.shard_us * 1e-6
    width = 1
    if wish.ranks is not None:
        costs, memory, width = _at(costs, wish.ranks, r), _at(memory, wish.ranks, r), r
        beside(costs, np.array(wish.ranks), sum(shared for _, shared in seconds), topology)
    elif sharding in ("table_row_wise", "grid_shard"):
        width = topology.ranks_per_node
    elif len(costs) == r and sharding == "row_wise":
        width = r
    return Option(costs, memory, width, everywhere, merged, way)


def beside(found: np.ndarray, ranks: np.ndarray, shared: np.ndarray, topology: Topology) -> None:
    """Add to ``found``, an entry for each rank, what ranks without a block have to do for those of their node (``shared``: of each block)."""
    nodes, first = np.unique(ranks // topology.ranks_per_node, return_index=True)
    for node, value in zip(nodes, shared[first]):
        of_node = np.arange(node * topology.ranks_per_node, (node + 1) * topology.ranks_per_node)
        found[np.setdiff1d(of_node, ranks)] += value


def _at(values: np.ndarray, ranks: tuple[int, ...], world: int) -> np.ndarray:
    """Each block's value at its own rank."""
    found = np.zeros(world)
    found[list(ranks)] = values
    return found


def _row_bytes(codec: str, columns: float, facts: TableFacts) -> float:
    return columns * facts.itemsize if codec == "fp32" else row_bytes(codec, int(columns))


def _blocks(
    facts: TableFacts, topology: Topology, sharding: str, columns: np.ndarray, ranges: tuple[np.ndarray, np.ndarray, np.ndarray],
    exchange: str, travel: Communication, split: str, of_node: int,
) -> Way:  # fmt: skip
    """``of_node``: how many blocks of a node have their bags added up there; 0: none."""
    r, s = topology.ranks, facts.itemsize
    rows, ids_share, unique_share = (np.tile(each, len(columns)) for each in ranges)
    d = np.repeat(columns, len(ranges[0]))
    if exchange == "unique":
        read = results = facts.unique * unique_share
        numbers = read
    else:
        read = facts.ids * ids_share
        if facts.pooled and facts.bags:
            numbers, results = _bags(facts, ids_share)
        else:
            results, numbers = read, read
    touched = facts.unique_in(r) * unique_share
    fast, scattered = topology.memory_gb_s * GB, topology.lookup_gb_s * GB
    lookup = _seconds_to_read(r * read, touched, d * s, topology) + r * results * d * s / fast
    update = np.zeros(len(d))
    if facts.trained:
        update = r * (results + read) * d * s / fast + touched * (2 * d * (s + facts.state) + 2 * facts.row_state) / scattered
    back = np.array([_row_bytes(travel.backward, x, facts) for x in d]) * (1.0 if facts.trained else 0.0)
    out = np.array([_row_bytes(travel.forward, x, facts) for x in d])
    sent, across = (numbers * _ID, results * out, results * back), ()
    if of_node:
        share = ids_share.reshape(-1, of_node).sum(1).repeat(of_node)
        asked, whole = _bags(facts, np.minimum(share, 1.0))
        across, nodes = (asked * _ID, whole * out, whole * back), topology.nodes
        sent = (nodes * numbers * _ID, nodes * results * d * s, nodes * results * d * s * facts.trained)
        added = nodes * (results * d).reshape(-1, of_node).sum(1).repeat(of_node) * s / fast  # on every rank of the node
        lookup, update = lookup + added, update + added * facts.trained
        results = whole / of_node
    merged = float((results * d).sum()) * s + facts.bags * facts.dim * s
    merge = (2.0 if facts.trained else 1.0) * merged / fast + 2 * facts.ids * _ID / fast
    if exchange == "unique":  # sorted ids, and rows that came back are read for each id
        pooling = facts.ids * facts.dim * s
        merge += (2.0 if facts.trained else 1.0) * pooling / fast + 8 * facts.ids * _ID / fast
    return Way(sharding, exchange, travel, rows, d, lookup, update, *sent, merge, split=split, across=across)


def _bags(facts: TableFacts, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (ids, and lengths of bags unless every bag is one id) and bags that go from a rank to where a part of the ids is."""
    bags = facts.bags * (1 - (1 - share) ** max(facts.ids / facts.bags, 1.0))
    return facts.ids * share + (bags if facts.ids > facts.bags else 0.0), bags


def _seconds_to_read(rows, different, row_bytes, topology: Topology):
    """Rows, so many of them for the first time."""
    different = np.minimum(rows, different)
    return different * row_bytes / (topology.lookup_gb_s * GB) + (rows - different) * row_bytes / (topology.memory_gb_s * GB)


def _replicated(facts: TableFacts, topology: Topology, travel: Communication) -> Option:
    """Read where it is; the rows of gradients go to every rank, which adds them up and updates its own copy."""
    r, s, d = topology.ranks, facts.itemsize, facts.dim
    fast, scattered = topology.memory_gb_s * GB, topology.lookup_gb_s * GB
    seconds = float(_seconds_to_read(facts.ids, facts.unique, d * s, topology)) + facts.bags * d * s / fast
    gathered = memory = 0.0
    if facts.trained:
        gathered = facts.unique * (8 + d * s) if r > 1 else 0.0
        seconds += (facts.bags + facts.ids) * d * s / fast
        seconds += facts.unique_in(r) * (2 * d * (s + facts.state) + 2 * facts.row_state) / scattered
        seconds += topology.all_to_all(gathered) + (2 * r * facts.unique * d * s / fast if r > 1 else 0.0)
        memory = (r * facts.unique if r > 1 else facts.unique) * (8 + d * s)
    none = np.zeros(0)
    way = Way("data_parallel", "none", travel, none, none, none, none, none, none, none, seconds, gathered)
    held = facts.bytes + memory + 2 * facts.bags * d * s
    return Option((), (), 1, seconds + topology.shard_us * 1e-6, held, way)
