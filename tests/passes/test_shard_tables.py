"""The graphs of many ranks, made by one process under a fake process group: collectives counted, bytes against the least possible."""
from __future__ import annotations

import json

import pytest

_CODE = """
import json, sys, torch, torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.device_mesh import init_device_mesh
import tablewright as tw
from tablewright.kernels.collectives import exchange_ids, exchange_rows
from tablewright.kernels.collectives.route_ids import _route
from tablewright.kernels.collectives.spec import decode
from tablewright.passes.graph import is_pure, positions
from tablewright.passes.shard_tables import exchanges

WORLD, SHARDING, RANK = {world}, "{sharding}", 3
TABLES, ROWS, DIM, BATCH, BAG = {tables}, 3000, 16, 64, 4

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(ROWS + 7 * i, DIM, mode="sum") for i in range(TABLES))
        self.bottom = nn.Sequential(*(m for i, o in zip({bottom}, {bottom}[1:]) for m in (nn.Linear(i, o), nn.ReLU())), nn.Linear({bottom}[-1], DIM), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(DIM * (TABLES + 1), 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, dense, ids):
        return self.top(torch.cat([self.bottom(dense), *(bag(ids[i]) for i, bag in enumerate(self.bags))], 1))

dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
mesh = init_device_mesh("cpu", (WORLD,))
ids = torch.randint(0, ROWS, (TABLES, BATCH, BAG), generator=torch.Generator().manual_seed(5))
PLAN = {{"version": 1, "tables": {{"*": {{"sharding": SHARDING}}}}, "passes": {{"dense_chains": {{"measure": False}}}}}}
model = tw.optimize(Model(), PLAN, sample_inputs=(torch.randn(BATCH, 13), ids), mesh=mesh)
graph = model.graph_module.graph
(start,) = [n for n in graph.nodes if n.target is exchange_ids.EXCHANGE]
text = start.args[2]
spec = decode(text)
header = _route([ids[i] for i in range(TABLES)], [None] * TABLES, text)[0].tolist()
remote = [(s, h) for s, h in zip(spec.streams, header) if s.shard.rank != RANK]
sent = sum(rows + (bags if ragged else 0) for _, (bags, rows, ragged) in remote)
answered = sum(bags * s.shard.columns for s, (bags, _, _) in remote)
least_ids = least_rows = 0
for i in range(TABLES):
    for shard in model._sharded.layouts[f"bags.{{i}}.weight"].shards:
        inside = ((ids[i] >= shard.row) & (ids[i] < shard.row + shard.rows)).sum(1)
        some = inside[inside > 0]
        if shard.rank != RANK and len(some):
            least_ids += int(some.sum()) + (0 if len(some.unique()) == 1 else len(some))
            least_rows += len(some) * shard.columns
place = positions(graph)
(wait,) = [n for n in graph.nodes if n.target is exchange_rows.WAIT]
(send,) = [n for n in graph.nodes if n.target is exchange_rows.SEND]
layers = [n for n in graph.nodes if n.op == "call_function" and n.name.startswith("dense")]
print(json.dumps(dict(
    exchanges=[str(n.target) for n in exchanges(graph)], streams=len(spec.streams), sent=[sent, least_ids], answered=[answered, least_rows],
    start=place[start], send=place[send], bottom=[place[n] for n in layers if n.args[1].op == "get_attr" and "bottom" in n.args[1].target], wait=place[wait],
    top=[place[n] for n in layers if n.args[1].op == "get_attr" and "top" in n.args[1].target],
    blocks=len({{s.shard.rank for s in spec.streams}}), held=list(model.get_parameter("bags.0.weight").shape),
)))
"""


@pytest.mark.parametrize(
    ("world", "sharding", "tables", "bottom"),
    [(128, "row_wise", 4, [13, 2000, 2000]), (128, "column_wise", 6, [13, 512]), (1024, "table_wise", 26, [13, 512])],
)
def test_one_exchange_of_ids_and_one_of_rows_however_many_ranks(run_python, world, sharding, tables, bottom):
    found = json.loads(run_python(_CODE.format(world=world, sharding=sharding, tables=tables, bottom=bottom)).splitlines()[-1])
    assert found["exchanges"] == ["tablewright.exchange_ids.default", "tablewright.send_rows.default"]
    assert found["streams"] == {"row_wise": world * tables, "column_wise": 16 * tables, "table_wise": tables}[sharding]
    assert found["sent"][0] == found["sent"][1] and found["answered"][0] == found["answered"][1]
    assert len(found["bottom"]) == len(bottom) and len(found["top"]) == 2, "the last layer of the top is too small to be fused"
    assert found["start"] < min(found["bottom"]) and max(found["bottom"]) < found["wait"], "the bottom MLP runs while ids and rows travel"
    assert found["wait"] < min(found["top"])
    early = sum(place < found["send"] for place in found["bottom"])
    assert early == (len(bottom) > 2), "while ids travel runs only what is not needed while rows do, of which a backward has more"


_NODES = """
import json, sys, torch, torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.device_mesh import init_device_mesh
import tablewright as tw
from tablewright.kernels.collectives.route_ids import _route
from tablewright.kernels.collectives.spec import decode
from tablewright.kernels.collectives.work import group_of
from tablewright.passes.cost import KEY
from tablewright.passes.graph import arguments, packet_name
from tablewright.passes.shard_tables import exchanges

NODES, EACH, SHARDING, RANK = {nodes}, 8, "{sharding}", 11
TABLES, ROWS, DIM, BATCH, BAG = 4, 4096, 256, 32, 16

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(ROWS, DIM, mode="sum") for i in range(TABLES))

    def forward(self, ids):
        return torch.cat([bag(ids[i]) for i, bag in enumerate(self.bags)], 1)

dist.init_process_group("fake", rank=RANK, world_size=NODES * EACH, store=FakeStore())
mesh = init_device_mesh("cpu", (NODES, EACH), mesh_dim_names=("node", "rank"))
ids = torch.randint(0, ROWS, (TABLES, BATCH, BAG), generator=torch.Generator().manual_seed(5))
found = {{}}
for reduced in (True, False):
    entry = {{"sharding": SHARDING, "reduce_in_node": reduced}}
    if SHARDING == "table_row_wise":
        tables = {{f"bags.{{i}}": {{**entry, "ranks": list(range(8 * i, 8 * i + 8))}} for i in range(TABLES)}}
    else:
        tables = {{"*": entry}}
    model = tw.optimize(Model(), {{"version": 1, "tables": tables}}, sample_inputs=(ids,), mesh=mesh)
    graph = model.graph_module.graph
    nodes = exchanges(graph)
    kinds = [(packet_name(n), dist.get_process_group_ranks(group_of(arguments(n)["group"]))) for n in nodes]
    text = nodes[0].args[2]
    spec = decode(text)
    header = _route([ids[i] for i in range(TABLES)], [None] * TABLES, text)[0].tolist()
    away = [(s, h) for s, h in zip(spec.streams, header) if (s.shard.rank if len(kinds[0][1]) == NODES else s.shard.rank // EACH) != RANK // EACH]
    held = [layout for layout in model._sharded.layouts.values() if layout.on(RANK)]
    inner = [decode(n.args[2]) for n, (kind, ranks) in zip(nodes, kinds) if kind == "exchange_ids" and len(ranks) == EACH]
    found[reduced] = dict(
        kinds=[[kind, len(ranks), ranks[:2]] for kind, ranks in kinds], streams=len(spec.streams), held=len(held), inner=[len(s.streams) for s in inner],
        ids=4 * sum(rows + (bags if ragged else 0) for _, (bags, rows, ragged) in away),
        rows=4 * sum(bags * s.shard.columns for s, (bags, _, _) in away),
        across=sum(n.meta[KEY].wire for n in nodes), inside=sum(n.meta[KEY].inside for n in nodes),
        report=[r.detail for r in model.report.records if r.kind == "node sums"],
    )
print(json.dumps([found[True], found[False]]))
"""


@pytest.mark.parametrize(("nodes", "sharding"), [(16, "grid_shard"), (128, "table_row_wise")])
def test_a_bag_crosses_nodes_once_however_many_ranks_a_node_has(run_python, nodes, sharding):
    by_node, flat = json.loads(run_python(_NODES.format(nodes=nodes, sharding=sharding)).splitlines()[-1])
    tables, bags, bag, dim = 4, 32, 16, 256
    across, inside = ["exchange_ids", nodes, [3, 11]], ["exchange_ids", 8, [8, 9]]
    rows = [["send_rows", *group[1:]] for group in (inside, across)]
    assert by_node["kinds"] == [across, inside, *rows]
    assert flat["kinds"] == [[kind, nodes * 8, [0, 1]] for kind in ("exchange_ids", "send_rows")]
    blocks = nodes * tables if sharding == "grid_shard" else tables
    assert (by_node["streams"], flat["streams"]) == (blocks, 8 * blocks) and by_node["inner"] == [8 * by_node["held"]]
    away = (nodes - 1) * tables if sharding == "grid_shard" else tables - 1  # blocks that other nodes hold
    assert by_node["ids"] == 4 * away * bags * bag, "every id once, and no lengths: all bags have as many"
    assert by_node["rows"] == 4 * away * bags * (dim // nodes if sharding == "grid_shard" else dim)
    assert flat["ids"] > by_node["ids"] and flat["rows"] > 6 * by_node["rows"], "of 16 ids nearly each of 8 ranks has one"
    assert 0 < by_node["across"] < 0.4 * flat["across"] and by_node["inside"] > by_node["across"] / 2
    assert all(said.startswith("reduced inside the node first: ") for said in by_node["report"]) and len(by_node["report"]) == tables
