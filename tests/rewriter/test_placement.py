"""Where a plan puts tables: what its words may be, and what goes together."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
from small_models import Dot, dot_batch
from tablewright.kernels.collectives.spec import Shard
from tablewright.rewriter.shard_map import layouts


def plan(**entry):
    return tw.Plan.from_dict({"version": 1, "tables": {"user*": entry}})


def test_entries_merge_key_by_key():
    made = tw.Plan.from_dict({"version": 1, "tables": {
        "user*": {"sharding": "row_wise", "communication": {"forward": "fp16"}},
        "*": {"sharding": "table_wise", "ranks": [1], "exchange": "unique"},
    }})  # fmt: skip
    found = made.resolve(["user.weight", "item.weight"])
    assert found["item.weight"] == tw.TablePlan(sharding="table_wise", ranks=(1,), exchange="unique")
    user = found["user.weight"]
    assert (user.sharding, user.ranks, user.exchange) == ("row_wise", (1,), "unique")
    assert user.communication == tw.Communication(forward="fp16", backward="fp32")


@pytest.mark.parametrize("entry, said", [
    ({"sharding": "row_wize"}, r"tables.user\*.sharding is 'row_wize' \(did you mean 'row_wise'\?\); it must be data_parallel"),
    ({"exchange": "uniq"}, r"tables.user\*.exchange is 'uniq' \(did you mean 'unique'"),
    ({"ranks": []}, "a list of different rank numbers"),
    ({"ranks": [0, 0]}, "a list of different rank numbers"),
    ({"ranks": [-1]}, "a list of different rank numbers"),
    ({"ranks": [True]}, "a list of different rank numbers"),
    ({"ranks": 1}, "a list of different rank numbers"),
    ({"reduce_in_node": "yes"}, r"tables.user\*.reduce_in_node is 'yes'; it must be true or false"),
    ({"reduce_in_nodes": True}, "no key 'reduce_in_nodes' .did you mean 'reduce_in_node'"),
    ({"communication": "fp16"}, r"communication is 'fp16'; it must be a mapping"),
    ({"communication": {"forwards": "fp16"}}, "no key 'forwards' .did you mean 'forward'"),
    ({"communication": {"forward": "fp61"}}, r"tables.user\*.communication.forward is 'fp61' .did you mean 'fp16'"),
])  # fmt: skip
def test_bad_words_are_named(entry, said):
    with pytest.raises(tw.PlanError, match=said):
        plan(**entry)


def test_ranks_that_do_not_go_with_the_sharding():
    with pytest.raises(tw.PlanError, match="'user.weight' is table_wise on ranks .0, 1.; a whole table is on one rank"):
        plan(sharding="table_wise", ranks=[0, 1]).resolve(["user.weight"])
    for sharding in (None, "data_parallel"):
        with pytest.raises(tw.PlanError, match="ranks go with another sharding"):
            plan(sharding=sharding, ranks=[0]).resolve(["user.weight"])


@pytest.mark.parametrize("entry, said", [
    ({}, "'user.weight' has reduce_in_node: true and sharding none; only where ranks of a node hold ranges of its rows"),
    ({"sharding": "column_wise"}, "sharding column_wise; .* table_row_wise, grid_shard or row_wise"),
    ({"sharding": "grid_shard", "exchange": "unique"}, "reduce_in_node: true and exchange: unique, which sends single rows, not sums"),
])  # fmt: skip
def test_sums_inside_nodes_that_do_not_go_with_the_rest(entry, said):
    with pytest.raises(tw.PlanError, match=said):
        plan(**entry, reduce_in_node=True).resolve(["user.weight"])
    plan(**entry, reduce_in_node=False).resolve(["user.weight"])


def placed(world: int, per_node: int, **entry):
    wish = tw.TablePlan(**entry)
    return layouts({"t": torch.empty(10, 4, device="meta")}, {"t": wish}, world, per_node)["t"]


@pytest.mark.parametrize("entry, where, said", [
    ({}, (4, 4), r"'t' has reduce_in_node: true, but the mesh has 1 node\(s\) of 4 rank\(s\): a mesh of two dimensions"),
    ({}, (4, 1), "the mesh has 4 node"),
    ({"ranks": (0, 2)}, (4, 2), "none of its nodes has several ranges of its rows"),
    ({"ranks": (0, 2, 1, 3)}, (4, 2), "what node 0 holds of 't' is no range of rows: name its ranks node by node"),
])  # fmt: skip
def test_sums_inside_nodes_that_cannot_be(entry, where, said):
    with pytest.raises(tw.PlanError, match=said):
        placed(*where, sharding="row_wise", reduce_in_node=True, **entry)
    assert placed(*where, sharding="row_wise", **entry).by_node == 0


def test_where_sums_are_made_inside_nodes():
    assert [placed(4, 2, sharding=s).by_node for s in ("table_row_wise", "grid_shard", "row_wise", "table_wise", "column_wise")] == [2, 2, 0, 0, 0]
    assert placed(4, 2, sharding="row_wise", reduce_in_node=True).by_node == 2
    assert [placed(*where, sharding="table_row_wise").by_node for where in ((4, 4), (4, 1))] == [0, 0]
    assert placed(4, 2, sharding="grid_shard", exchange="unique").by_node == placed(4, 2, sharding="grid_shard", reduce_in_node=False).by_node == 0
    assert placed(4, 2, sharding="table_row_wise", exchange="auto").by_node == 2, "until the bytes are counted"
    grid = placed(4, 2, sharding="grid_shard", ranks=(3, 2, 1, 0))
    assert grid.across(2).shards == (Shard(1, 0, 10, 0, 2), Shard(0, 0, 10, 2, 2))
    assert grid.inside(0, 2).shards == (Shard(1, 0, 5, 0, 2), Shard(0, 5, 5, 0, 2)) and grid.inside(0, 2).dim == 2
    rows = placed(4, 2, sharding="row_wise", reduce_in_node=True)
    assert rows.across(2).shards == (Shard(0, 0, 6, 0, 4), Shard(1, 6, 4, 0, 4))
    assert rows.inside(1, 2).shards == (Shard(0, 0, 2, 0, 4), Shard(1, 2, 2, 0, 4)) and rows.inside(1, 2).rows == 4


def test_a_plan_for_several_ranks_does_not_run_on_one_unnoticed():
    with pytest.raises(tw.PlanError, match="mesh"):
        tw.optimize(Dot(), plan(sharding="row_wise"), sample_inputs=dot_batch())
