"""What two nodes of two ranks send each other for bags that are added up inside nodes first; run on every rank."""
from __future__ import annotations

import copy
import os
import signal
import time

import tablewright as tw
import torch
from sharding_cases import nodes
from tablewright.kernels.collectives import exchange_ids, exchange_rows, work
from torch import Tensor, nn

ROWS, DIM, BATCH = 40, 8, 24
IDS, HEADERS, RESULTS, GRADIENTS = (
    "the exchange of ids", "the exchange of id counts", "the exchange of rows", "the exchange of rows' gradients",
)  # fmt: skip


class Bags(nn.Module):
    """Three bags of ragged, one and several ids, and a sequence; no dense part, so that an error is the exchange's."""

    def __init__(self) -> None:
        super().__init__()
        self.ragged = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.mean = nn.EmbeddingBag(ROWS + 3, DIM, mode="mean", padding_idx=1)
        self.one = nn.EmbeddingBag(ROWS - 1, DIM, mode="sum")
        self.row = nn.Embedding(ROWS, DIM)

    def forward(self, values: Tensor, offsets: Tensor, mean: Tensor, one: Tensor, row: Tensor) -> Tensor:
        return torch.cat([self.ragged(values, offsets), self.mean(mean), self.one(one), self.row(row), self.row(one[:, 0])], 1)


def batch_of(rank: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(rank)
    lengths = torch.randint(0, 5, (BATCH,), generator=g)
    values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=g)
    return (
        values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)[:-1]]), torch.randint(0, ROWS + 3, (BATCH, 3), generator=g),
        torch.randint(0, ROWS - 1, (BATCH, 1), generator=g), torch.randint(0, ROWS, (BATCH,), generator=g),
    )  # fmt: skip


def bags_of(rank: int) -> dict[str, list[Tensor]]:
    """The ids in each bag of each table."""
    values, offsets, mean, one, _ = batch_of(rank)
    bags = list(values.tensor_split(offsets[1:]))
    return {"ragged": bags, "mean": [b[b != 1] for b in mean], "one": list(one)}


PLACED = {
    "one node": {"sharding": "table_row_wise", "ranks": [2, 3]}, "grid": {"sharding": "grid_shard"}, "rows": {"sharding": "row_wise", "reduce_in_node": True},
}  # fmt: skip


def plan_of(tables: dict, **more) -> dict:
    return {"version": 1, "embedding_optimizer": {"sgd": {"lr": 1.0}}, "tables": dict.fromkeys(("ragged", "mean", "one"), tables), **more}


def sent(rank: int, world: int, mesh, tables: dict) -> dict:
    """Bytes that this rank's step sends to its own node and to others, by what they are; the least of each; and the report."""
    numerics = "approximate" if "communication" in tables else "reassociated"
    model = tw.optimize(Bags(), plan_of(tables, numerics=numerics), sample_inputs=batch_of(rank), mesh=nodes())
    seen: dict[tuple[str, str], int] = {}
    plain = work.all_to_all

    def watched(tensor, counts_out, counts_in, group, what):
        ranks = torch.distributed.get_process_group_ranks(work.group_of(group))
        for other, count in zip(ranks, counts_out):
            if other != rank:
                where = "inside" if other // 2 == rank // 2 else "across"
                seen[where, what] = seen.get((where, what), 0) + count * tensor.element_size()
        return plain(tensor, counts_out, counts_in, group, what)

    exchange_ids.all_to_all = exchange_rows.all_to_all = watched
    try:
        model(*batch_of(rank)).sum().backward()
    finally:
        exchange_ids.all_to_all = exchange_rows.all_to_all = plain
    layouts = {n.split(".")[0]: layout for n, layout in model._sharded.layouts.items() if not layout.replicated}
    return {"seen": seen, "least": least(rank, layouts), "flat": flat(rank, layouts), "report": str(model.report), "table": model.report.table()}


def _inside(bags: list[Tensor], row: int, rows: int) -> list[int]:
    """How many ids of each bag that has any are in a range."""
    counts = [int(((b >= row) & (b < row + rows)).sum()) for b in bags]
    return [c for c in counts if c]


def _numbers(counts: list[int]) -> int:
    """Ids, and the bags' lengths where they differ."""
    return sum(counts) + (len(counts) if len(set(counts)) > 1 else 0)


def least(rank: int, layouts: dict, value: int = 4) -> dict[tuple[str, str], int]:
    """Each id crosses nodes once to each node that needs it, each bag once from each node that has a part of it; inside a node each part of a bag
    goes once to the rank that adds it up."""
    node, place = divmod(rank, 2)
    bags = [bags_of(r) for r in range(4)]
    found = dict.fromkeys([(w, k) for w in ("inside", "across") for k in (IDS, RESULTS, GRADIENTS)], 0)
    for name, layout in layouts.items():
        for block in layout.across(2).shards:
            if block.rank != node:
                counts = _inside(bags[rank][name], block.row, block.rows)
                found["across", IDS] += 4 * _numbers(counts)
                found["across", GRADIENTS] += value * len(counts) * block.columns
            else:
                found["across", RESULTS] += value * len(_inside(bags[2 * (1 - node) + place][name], block.row, block.rows)) * block.columns
        for shard in layout.shards:
            if shard.rank == rank:  # parts for the other rank, which serves the ranks of its place
                parts = [c for n in (0, 1) for c in _inside(bags[2 * n + 1 - place][name], shard.row, shard.rows)]
                found["inside", RESULTS] += 4 * len(parts) * shard.columns
            elif shard.rank // 2 == node:
                parts = [c for n in (0, 1) for c in _inside(bags[2 * n + place][name], shard.row, shard.rows)]
                found["inside", IDS] += 4 * _numbers(parts)
                found["inside", GRADIENTS] += 4 * len(parts) * shard.columns
    return found


def flat(rank: int, layouts: dict) -> dict[str, int]:
    """Bytes across nodes where each part of a bag goes straight to the rank that asked."""
    bags, found = [bags_of(r) for r in range(4)], dict.fromkeys((IDS, RESULTS, GRADIENTS), 0)
    for name, layout in layouts.items():
        for shard in layout.shards:
            for other in range(4):
                if other // 2 == rank // 2:
                    continue
                if shard.rank == other:
                    counts = _inside(bags[rank][name], shard.row, shard.rows)
                    found[IDS] += 4 * _numbers(counts)
                    found[GRADIENTS] += 4 * len(counts) * shard.columns
                elif shard.rank == rank:
                    found[RESULTS] += 4 * len(_inside(bags[other][name], shard.row, shard.rows)) * shard.columns
    return found


def rounded(rank: int, world: int, mesh, tables: dict) -> dict[str, float]:
    """Errors of outputs and of one SGD step where bags are rounded on their way, and the largest bag and gradient."""
    torch.manual_seed(3)
    plain = Bags()
    reference = copy.deepcopy(plain)
    model = tw.optimize(plain, plan_of(tables, numerics="approximate"), sample_inputs=batch_of(rank), mesh=nodes())
    out = model(*batch_of(rank))
    outs = [reference(*batch_of(r)) for r in range(world)]
    factors = torch.linspace(-1, 1, out.shape[1]) ** 3
    (out * factors).sum().backward()
    model.embedding_optimizer.step()
    (sum((o * factors).sum() for o in outs) / world).backward()
    out, outs = out.detach(), [o.detach() for o in outs]
    found = {"out": float((out - outs[rank])[:, :DIM].abs().max()), "largest": float(outs[rank][:, :DIM].abs().max())}
    layout = model._sharded.layouts["ragged.weight"]
    s, whole = model._sharded.mine(layout), reference.ragged.weight
    wanted = (whole - whole.grad).detach()[s.row : s.row + s.rows, s.column : s.column + s.columns]
    error = (model.get_parameter("ragged.weight").detach() - wanted).abs()
    reads = torch.cat([batch_of(r)[0] for r in range(world)]).bincount().max()
    return {**found, "moved": float(error.max()) if error.numel() else 0.0, "reads": float(reads)}


def wrong_ids(rank: int, world: int, mesh, tables: dict) -> tuple[str, float]:
    """The last rank has an id that its table does not: all stop at once, and can go on together."""
    torch.manual_seed(3)
    plain = Bags()
    model = tw.optimize(plain, plan_of(tables), sample_inputs=batch_of(rank), mesh=nodes())
    values, *rest = batch_of(rank)
    began = time.monotonic()
    try:
        model(values.fill_(ROWS) if rank == world - 1 else values, *rest)
    except (IndexError, tw.PeerError) as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "nothing"
    took = time.monotonic() - began
    torch.testing.assert_close(model(*batch_of(rank)), plain(*batch_of(rank)))
    return said, took


def killed(rank: int, world: int, mesh, tables: dict) -> str:
    """The last rank dies in the middle of training; what the others are told."""
    model = tw.optimize(Bags(), plan_of(tables), sample_inputs=batch_of(rank), mesh=nodes())
    for step in range(3):
        if rank == world - 1 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            model(*batch_of(rank)).sum().backward()
        except tw.PeerError as error:
            return str(error)
    return "nothing"


def other_mesh(rank: int, world: int, mesh) -> str:
    """What a mesh whose nodes are not one after another is told."""
    from torch.distributed.device_mesh import DeviceMesh

    try:
        tw.optimize(Bags(), plan_of(PLACED["grid"]), sample_inputs=batch_of(rank), mesh=DeviceMesh("cpu", [[0, 2], [1, 3]]))
    except tw.PlanError as error:
        return str(error)
    return "nothing"


def chosen(rank: int, world: int, mesh, high: int) -> dict[str, tuple[str, int]]:
    """Which exchange ``auto`` takes for each table, with ids from ``[0, high)``, and whether bags are added up inside nodes."""
    batch = [b if i == 1 else b % high for i, b in enumerate(batch_of(rank))]
    plan = plan_of({"sharding": "table_row_wise", "exchange": "auto"})
    model = tw.optimize(Bags(), plan, sample_inputs=tuple(batch), mesh=nodes())
    return {n: (layout.exchange, layout.by_node) for n, layout in model._sharded.layouts.items() if not layout.replicated}


def both_ways(rank: int, world: int, mesh) -> tuple[list[str], str]:
    """A table that is read as bags and row by row: outputs and a step; (records of node sums, the resolved plan)."""
    torch.manual_seed(3)
    plain = Bags()
    reference = copy.deepcopy(plain)
    tables = {"*": {"sharding": "table_row_wise"}, "bags.one": {"reduce_in_node": False}}
    plan = {"version": 1, "embedding_optimizer": {"rowwise_adagrad": {"lr": 0.1, "in_backward": True}}, "tables": tables}
    model = tw.optimize(Twice(plain), plan, sample_inputs=batch_of(rank), mesh=nodes())
    twice = Twice(reference)
    out, outs = model(*batch_of(rank)), [twice(*batch_of(r)) for r in range(world)]
    torch.testing.assert_close(out, outs[rank])
    (out**2).sum().backward()
    (sum((o**2).sum() for o in outs) / world).backward()
    for name, whole in reference.named_parameters():
        state = (whole.grad**2).mean(1, keepdim=True)
        wanted = whole.detach() - 0.1 * whole.grad / (state.sqrt() + 1e-8)
        s = model._sharded.mine(model._sharded.layouts[f"bags.{name}"])
        torch.testing.assert_close(model.get_parameter(f"bags.{name}").detach(), wanted[s.row : s.row + s.rows, s.column : s.column + s.columns])
    return [f"{r.status} {r.subject}: {r.reason or r.detail}" for r in model.report.records if r.kind == "node sums"], model.resolved_plan


class Twice(nn.Module):
    """The bags, and the table of one of them read once more, row by row."""

    def __init__(self, bags: Bags) -> None:
        super().__init__()
        self.bags = bags

    def forward(self, values: Tensor, offsets: Tensor, mean: Tensor, one: Tensor, row: Tensor) -> Tensor:
        again = torch.nn.functional.embedding(row, self.bags.ragged.weight)
        return torch.cat([self.bags(values, offsets, mean, one, row), torch.tanh(again)], 1)
