"""What codecs and exchanges of sharded lookups do to the numbers, and how many bytes travel; run on every rank."""
from __future__ import annotations

import copy

import tablewright as tw
import torch
from tablewright.kernels.collectives import work
from tablewright.kernels.collectives.exchange_rows import SEND
from tablewright.passes.graph import packet_name
from tablewright.passes.shard_tables import exchanges
from torch import Tensor, nn

ROWS, DIM, BAG = 40, 8, 3


class Bags(nn.Module):
    """One bag and one row, side by side; no dense part, so that an error is the codec's."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.row = nn.Embedding(ROWS, DIM)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, bag: Tensor, row: Tensor) -> Tensor:
        return torch.cat([self.bag(bag), self.row(row)], 1)


def ids_of(rank: int, rows: int = 16, high: int = ROWS) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    return torch.randint(0, high, (rows, BAG), generator=g), torch.randint(0, high, (rows,), generator=g)


def bound(codec: str, largest: float) -> float:
    """The largest error of one encoded value of a row whose values are at most ``largest`` (kernels/codecs/op.py)."""
    return {
        "fp32": 0.0, "fp16": 2**-11 * largest + 2**-25, "bf16": 2**-8 * largest, "int8": 2 * largest / 510 + 2**-20 * largest,
    }[codec]  # fmt: skip


def errors(rank: int, world: int, mesh, sharding: str, exchange: str, forward: str, backward: str) -> dict[str, float]:
    """Errors of outputs and of one SGD step, as parts of their bounds."""
    torch.manual_seed(3)
    plain = Bags()
    with torch.no_grad():
        for table in (plain.bag, plain.row):
            table.weight[5] = 0.0
    reference = copy.deepcopy(plain)
    tables = {"*": {"sharding": sharding, "exchange": exchange, "communication": {"forward": forward, "backward": backward}}}
    plan = {"version": 1, "numerics": "approximate", "embedding_optimizer": {"sgd": {"lr": 1.0}}, "tables": tables}
    model = tw.optimize(plain, plan, sample_inputs=ids_of(0), mesh=mesh)
    out = model(*ids_of(rank))
    factors = torch.linspace(-1, 1, 2 * DIM) ** 3
    (out * factors).sum().backward()
    model.embedding_optimizer.step()
    outs = [reference(*ids_of(r)) for r in range(world)]
    (sum((o * factors).sum() for o in outs) / world).backward()
    largest = max(float(t.weight.abs().max()) for t in (reference.bag, reference.row))
    # a bag arrives in at most BAG parts (or, deduplicated, as BAG rows), each a sum of at most BAG rows
    allowed = BAG * bound(forward, BAG * largest) + 1e-5
    found = {"out": float((out - outs[rank]).abs().max()) / allowed, "moved": 0.0}
    for name in ("bag", "row"):
        whole = getattr(reference, name).weight
        wanted = (whole - whole.grad).detach()
        s = model._sharded.mine(model._sharded.layouts[f"{name}.weight"])
        mine = model.get_parameter(f"{name}.weight").detach()
        error = (mine - wanted[s.row : s.row + s.rows, s.column : s.column + s.columns]).abs()
        # a row's gradient is a sum over the times that it was read, each sent (or added up, then sent) with an error of its own
        reads = max(torch.cat([ids_of(r)[0].reshape(-1) for r in range(world)]).bincount().max(), 1) + 1
        allowed = float(reads) * bound(backward, float(reads) / world) + 1e-5
        found["moved"] = max(found["moved"], float(error.max()) / allowed if error.numel() else 0.0)
        found[f"{name} differs"] = float(error.max() > 1e-6) if error.numel() else 0.0
    found["out differs"] = float((out - outs[rank]).abs().max() > 1e-6)
    # only zero rows: exact, whatever the codec
    five = torch.full((4, BAG), 5), torch.full((4,), 5)
    with torch.no_grad():
        fresh = tw.optimize(copy.deepcopy(zeroed(reference)), plan, sample_inputs=ids_of(0), mesh=mesh)
        found["zero rows"] = float(fresh(*five).abs().max())
    return found


def zeroed(model: Bags) -> Bags:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for table in (other.bag, other.row):
            table.weight[5] = 0.0
    return other


def chosen(rank: int, world: int, mesh, rows: int, high: int) -> dict[str, str]:
    """Which exchange ``auto`` takes, for ``rows`` bags with ids from ``[0, high)``."""
    plan = {"version": 1, "tables": {"*": {"sharding": "row_wise", "exchange": "auto"}}}
    model = tw.optimize(Bags(), plan, sample_inputs=ids_of(rank, rows=rows, high=high), mesh=mesh)
    return {name: layout.exchange for name, layout in model._sharded.layouts.items()}


def counted(rank: int, world: int, mesh, tables: dict) -> dict:
    """The collectives of a step, from the nodes; and the bytes that it puts on the wire against the least that it could."""
    model = tw.optimize(Bags(), {"version": 1, "embedding_optimizer": {"sgd": {"lr": 1.0}}, "tables": tables}, sample_inputs=ids_of(0), mesh=mesh)
    sent: list[tuple[str, int]] = []
    plain = work.all_to_all

    def watched(tensor, counts_out, counts_in, group, what):
        mine = counts_out[rank]
        sent.append((what, (sum(counts_out) - mine) * tensor.element_size()))
        return plain(tensor, counts_out, counts_in, group, what)

    from tablewright.kernels.collectives import exchange_ids, exchange_rows

    exchange_ids.all_to_all = exchange_rows.all_to_all = watched
    try:
        model(*ids_of(rank)).sum().backward()
    finally:
        exchange_ids.all_to_all = exchange_rows.all_to_all = plain
    graph = model.graph_module.graph
    names = [packet_name(n) for n in exchanges(graph)]
    assert sum(n.target is SEND for n in graph.nodes) <= 1
    return {"nodes": names, "sent": sent, "layouts": {n: layout for n, layout in model._sharded.layouts.items()}}


def cut(rank: int, world: int, mesh, split: str) -> dict:
    """Rows of each rank where ids are few and small, and whether the model still equals the plain one."""
    plain = Bags()
    reference = copy.deepcopy(plain)
    plan = {"version": 1, "tables": {"*": {"sharding": "row_wise", "split": split}}}
    model = tw.optimize(plain, plan, sample_inputs=ids_of(rank, rows=64, high=8), mesh=mesh)
    same = torch.allclose(model(*ids_of(rank)), reference(*ids_of(rank)), atol=1e-6) if rank == 0 else model(*ids_of(rank)) is not None
    return {"rows": [s.rows for s in model._sharded.layouts["bag.weight"].shards], "same": same}
