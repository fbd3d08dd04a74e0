"""From what a plan says of tables to who holds what: the resolved plan, and the only place that computes it.

Every table is cut into blocks (:class:`~..kernels.collectives.spec.Shard`), at most one on a rank. Tables without ``ranks`` are placed
one after the other, the largest first, where there is most room; the planner (``Plan.auto``) writes ``ranks`` into the plan instead.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from torch import Tensor

from ..kernels.collectives.spec import Shard, TableLayout
from ..passes.shard_tables import BY_NODE
from .errors import PlanError
from .placement import Communication
from .plan import TablePlan


def layouts(
    tables: Mapping[str, Tensor], resolved: Mapping[str, TablePlan], world: int, per_node: int,
    cuts: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, TableLayout]:  # fmt: skip
    """Where each table lives. ``per_node``: ranks of one node, which have neighbouring numbers. ``cuts``: for a table whose rows are
    split otherwise than evenly, the first row of each range but the first. Raises :class:`PlanError` for ranks that do not exist."""
    load = [0] * world
    found: dict[str, TableLayout] = {}
    order = sorted(tables, key=lambda name: (-tables[name].numel(), name))
    for name in order:
        wish, (rows, dim) = resolved[name], tables[name].shape
        ranks = _ranks(name, wish, world, per_node, load, dim)
        cut = (cuts or {}).get(name)
        shards = _shards(name, wish.sharding or "data_parallel", ranks, rows, dim, per_node, cut)
        for shard in shards:
            load[shard.rank] += shard.rows * shard.columns
        travel = wish.communication or Communication()
        layout = TableLayout(name, rows, dim, wish.sharding or "data_parallel", shards, wish.exchange or "pooled", travel.forward, travel.backward)
        found[name] = replace(layout, by_node=_by_node(layout, wish, world, per_node))
    return {name: found[name] for name in tables}


def _by_node(layout: TableLayout, wish: TablePlan, world: int, per_node: int) -> int:
    """How many ranks a node has, if they add up their parts of a bag before it crosses nodes; else 0."""
    if layout.exchange == "unique" or not (wish.reduce_in_node or wish.reduce_in_node is None and layout.sharding in BY_NODE):
        return 0

    def refuse(why: str) -> int:
        if wish.reduce_in_node:
            raise PlanError(f"table '{layout.name}' has reduce_in_node: true, but {why}")
        return 0

    if not 1 < per_node < world:
        return refuse(
            f"the mesh has {world // per_node} node(s) of {per_node} rank(s): a mesh of two dimensions, several nodes of several ranks, was "
            'needed, as init_device_mesh("cuda", (nodes, ranks_of_a_node)) makes it'
        )
    nodes = [s.rank // per_node for s in layout.shards]
    if len(set(nodes)) == len(nodes):
        return refuse("none of its nodes has several ranges of its rows: nothing is to be added up there")
    try:
        layout.across(per_node)
    except ValueError as error:
        return refuse(f"{error}: name its ranks node by node")
    return per_node


def _ranks(name: str, wish: TablePlan, world: int, per_node: int, load: list[int], dim: int) -> tuple[int, ...]:
    if wish.sharding in (None, "data_parallel"):
        return ()
    if wish.ranks is not None:
        wrong = [r for r in wish.ranks if r >= world]
        if wrong:
            raise PlanError(f"table '{name}' has ranks {list(wish.ranks)}; rank {wrong[0]} does not exist, there are {world} (0 to {world - 1})")
        return wish.ranks
    if wish.sharding == "table_wise":
        return (min(range(world), key=lambda r: (load[r], r)),)
    if wish.sharding == "table_row_wise":
        nodes = [range(first, min(first + per_node, world)) for first in range(0, world, per_node)]
        return tuple(min(nodes, key=lambda node: (sum(load[r] for r in node), node[0])))
    if wish.sharding == "column_wise":
        return tuple(sorted(sorted(range(world), key=lambda r: (load[r], r))[:dim]))
    return tuple(range(world))


def _shards(
    name: str, sharding: str, ranks: tuple[int, ...], rows: int, dim: int, per_node: int, cut: Sequence[int] | None
) -> tuple[Shard, ...]:
    if sharding == "data_parallel":
        return ()
    if sharding == "table_wise":
        return (Shard(ranks[0], 0, rows, 0, dim),)
    if sharding == "column_wise":
        if len(ranks) > dim:
            raise PlanError(f"table '{name}' has {dim} columns, too few to be column_wise on {len(ranks)} ranks")
        return tuple(Shard(rank, 0, rows, column, columns) for rank, (column, columns) in zip(ranks, evenly(dim, len(ranks))))
    if sharding in ("row_wise", "table_row_wise"):
        nodes = {r // per_node for r in ranks}
        if sharding == "table_row_wise" and len(nodes) > 1:
            raise PlanError(f"table '{name}' is table_row_wise on ranks {list(ranks)}, which are of {len(nodes)} nodes of {per_node} ranks; one was needed")
        return tuple(Shard(rank, row, count, 0, dim) for rank, (row, count) in zip(ranks, _ranges(rows, len(ranks), cut)) if count)
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(rank // per_node, []).append(rank)
    if len({len(node) for node in by_node.values()}) != 1 or len(by_node) > dim:
        raise PlanError(
            f"table '{name}' is grid_shard on ranks {list(ranks)}; equally many ranks of each node (of {per_node} ranks) were needed, "
            f"and no more nodes than its {dim} columns"
        )
    return tuple(
        Shard(rank, row, count, column, columns)
        for node, (column, columns) in zip(by_node.values(), evenly(dim, len(by_node)))
        for rank, (row, count) in zip(node, _ranges(rows, len(node), cut)) if count
    )  # fmt: skip


def evenly(size: int, parts: int) -> list[tuple[int, int]]:
    """(start, count) of each part; the first ones take what is left over."""
    base, more = divmod(size, parts)
    return [(i * base + min(i, more), base + (i < more)) for i in range(parts)]


def _ranges(rows: int, parts: int, cut: Sequence[int] | None) -> list[tuple[int, int]]:
    if cut is None:
        return evenly(rows, parts)
    bounds = [0, *cut, rows]
    return [(first, end - first) for first, end in zip(bounds, bounds[1:])]


def digest(found: Mapping[str, TableLayout]) -> str:
    """A hash of the resolved plan; equal on ranks that agree."""
    text = json.dumps([asdict(layout) for layout in found.values()], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def table(found: Mapping[str, TableLayout]) -> str:
    """The resolved plan for people: every table, rank, row range and column range."""
    rows = [("TABLE", "SHARDING", "RANK", "ROWS", "COLUMNS", "EXCHANGE", "FORWARD", "BACKWARD")]
    for layout in found.values():
        travel = (layout.exchange + (", by node" if layout.by_node else ""), layout.forward, layout.backward)
        if layout.replicated:
            rows.append((layout.name, layout.sharding, "all", f"0..{layout.rows}", f"0..{layout.dim}", "none", "none", "fp32"))
        for s in layout.shards:
            rows.append((layout.name, layout.sharding, str(s.rank), f"{s.row}..{s.row + s.rows}", f"{s.column}..{s.column + s.columns}", *travel))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
