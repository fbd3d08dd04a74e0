"""What each way of placing a table costs, against numbers counted by hand."""
from __future__ import annotations

import numpy as np
import pytest
import tablewright as tw
from tablewright.rewriter.planner.costs import options_of
from tablewright.rewriter.planner.facts import TableFacts, with_ids

FAST = tw.Topology(ranks=4, memory_gib=1, memory_gb_s=1e9, lookup_gb_s=1e9, tflops=1, intra_node_gb_s=1, shard_us=0, call_us=0, message_us=0)
B, N, U, D, ROWS = 100, 400, 150, 16, 1000
FACTS = TableFacts("t", ROWS, D, N, B, U)


def way(sharding, exchange=None, facts=FACTS, topology=FAST, **more):
    (option,) = options_of(facts, topology, tw.TablePlan(sharding=sharding, exchange=exchange, **more))
    return option


def test_table_wise_pooled():
    option = way("table_wise", "pooled", ranks=(2,))
    found = option.label
    assert found.ids.tolist() == [4 * (N + B)] and found.results.tolist() == [4 * B * D] and found.gradients.tolist() == [4 * B * D]
    seconds = 3 * (4 * (N + B) + 2 * 4 * B * D) / 1e9  # to and from each of three other ranks
    assert np.asarray(option.costs).tolist() == pytest.approx([0, 0, seconds, 0], rel=1e-6)
    assert option.memory[2] > ROWS * D * 4 and not np.asarray(option.memory)[[0, 1, 3]].any()


def test_unique_ids_travel_once():
    found = way("table_wise", "unique", ranks=(0,)).label
    assert found.ids.tolist() == [4 * U] and found.results.tolist() == [4 * U * D]


def test_row_wise_pooled_sends_the_bags_that_a_range_has_a_part_of():
    found = way("row_wise", "pooled", ranks=(0, 1, 2, 3)).label
    bags = B * (1 - 0.75**4)
    assert found.results.tolist() == pytest.approx([4 * bags * D] * 4)
    assert found.ids.tolist() == pytest.approx([4 * (N / 4 + bags)] * 4)


def test_row_wise_follows_the_skew_of_the_sample():
    skewed = with_ids("t", ROWS, D, [np.zeros(N, dtype=int)], B)
    found = way("row_wise", "unique", skewed, ranks=(0, 1, 2, 3), split="even").label
    assert found.results.tolist() == [4 * D, 0, 0, 0]


def test_rows_are_cut_where_the_sample_reads_them():
    ids = np.concatenate([np.zeros(100, dtype=int), np.arange(100), np.arange(900, 1000)])
    skewed = with_ids("t", ROWS, D, [ids], B)
    found = way("row_wise", "pooled", skewed, ranks=(0, 1, 2, 3), split="sample").label
    assert found.rows.sum() == ROWS and found.rows.min() < 110 and str(found).endswith("split by sample")
    seen = skewed.ranges(4, "sample")[1]
    assert seen.max() < 0.36 and skewed.ranges(4, "even")[1].max() > 0.6  # a third of all reads is one row
    assert {o.label.split for o in options_of(skewed, FAST)} == {"even", "sample"}


def test_columns_are_cut_and_ids_go_to_every_one_of_them():
    found = way("column_wise", "pooled", ranks=(0, 1, 3)).label
    assert found.columns.tolist() == [6, 5, 5]
    assert found.results.tolist() == [4 * B * d for d in (6, 5, 5)] and found.ids.tolist() == [4 * (N + B)] * 3


def test_codecs_shrink_what_they_encode():
    found = way("table_wise", "pooled", ranks=(0,), communication=tw.Communication(forward="int8", backward="bf16")).label
    assert found.results.tolist() == [B * (D + 8)] and found.gradients.tolist() == [B * 2 * D]


def test_frozen_tables_send_no_gradients_and_unpooled_lookups_one_row_for_each_id():
    frozen = TableFacts("t", ROWS, D, N, B, U, trained=False)
    found = way("table_wise", "pooled", frozen, ranks=(0,)).label
    assert found.gradients.tolist() == [0] and found.update.tolist() == [0]
    sequence = TableFacts("t", ROWS, D, N, N, U, pooled=False)
    assert way("table_wise", "pooled", sequence, ranks=(0,)).label.results.tolist() == [4 * N * D]


def test_data_parallel_sends_rows_of_gradients_and_holds_all_of_it():
    option = way("data_parallel")
    assert option.label.gathered == U * (8 + 4 * D) and len(option.costs) == 0
    assert option.everywhere_memory > FACTS.bytes
    assert option.everywhere == pytest.approx(3 * U * (8 + 4 * D) / 1e9, rel=1e-3)


def test_every_way_holds_the_whole_table_once():
    for option in options_of(FACTS, FAST):
        if option.label.sharding != "data_parallel":
            w = option.label
            assert (w.rows * w.columns).sum() == ROWS * D, str(w)
            assert w.lookup.min() >= 0 and len(option.costs) % option.width == 0


def test_what_the_plan_allows():
    every = {str(o.label) for o in options_of(FACTS, FAST)}
    assert {"data_parallel", "table_wise, pooled", "row_wise over 4, unique", "column_wise over 2, pooled"} <= every
    assert not any(w.startswith(("grid", "table_row")) for w in every)  # of one node: they are row_wise
    nodes = tw.Topology(**{**vars(FAST), "nodes": 2, "inter_node_gb_s": 1.0})
    assert {"grid_shard over 4, pooled", "table_row_wise over 2, unique"} <= {str(o.label) for o in options_of(FACTS, nodes)}
    only = options_of(FACTS, FAST, tw.TablePlan(exchange="unique"))
    assert {o.label.exchange for o in only} == {"unique", "none"}
    assert [str(o.label) for o in options_of(FACTS, FAST.with_ranks(1))] == ["data_parallel"]
    tiny = TableFacts("t", 2, 4, N, B, 2)
    assert max(len(o.label.rows) for o in options_of(tiny, FAST)) == 2  # two rows are not cut in three, nor four columns


NODES = tw.Topology(**{**vars(FAST), "nodes": 2, "intra_node_gb_s": 4.0, "inter_node_gb_s": 0.5})


def test_bags_that_are_reduced_inside_the_node_cross_nodes_once():
    option = way("table_row_wise", "pooled", topology=NODES, ranks=(2, 3))
    found, bags = option.label, B * (1 - 0.5**4)
    assert found.ids.tolist() == pytest.approx([2 * 4 * (N / 2 + bags)] * 2), "for a rank of each node"
    assert found.results.tolist() == found.gradients.tolist() == pytest.approx([2 * 4 * bags * D] * 2)
    assert [each.tolist() for each in found.across] == [[4 * (N + B)] * 2, [4 * B * D] * 2, [4 * B * D] * 2]
    inside, across = 2 * 4 * (N / 2 + bags) + 2 * 2 * 4 * bags * D, 4 * (N + B) + 2 * 4 * B * D
    assert np.asarray(option.costs)[2:].tolist() == pytest.approx([inside / 4e9 + across / 0.5e9] * 2, rel=1e-5)
    sent, away = found.sent(np.array([2, 3]), NODES)
    assert away.tolist() == [4 * (N + B) + 4 * B * D] * 2 + [4 * B * D] * 2
    assert (sent - away).tolist() == pytest.approx([0, 0, inside, inside])


def test_what_goes_straight_crosses_nodes_in_parts():
    found, bags = way("table_row_wise", "pooled", topology=NODES, ranks=(2, 3), reduce_in_node=False).label, B * (1 - 0.5**4)
    assert not found.across and found.results.tolist() == pytest.approx([4 * bags * D] * 2)
    sent, away = found.sent(np.array([2, 3]), NODES)
    to_owner = 4 * (N / 2 + bags) + 4 * bags * D
    assert away.tolist() == pytest.approx([2 * to_owner] * 2 + [2 * 4 * bags * D] * 2)
    assert (sent - away).tolist() == pytest.approx([0, 0, to_owner + 4 * bags * D, to_owner + 4 * bags * D])


def test_other_exchanges_codecs_and_shardings_in_nodes():
    assert not way("table_row_wise", "unique", topology=NODES, ranks=(0, 1)).label.across
    sequence = TableFacts("t", ROWS, D, N, N, U, pooled=False)
    assert not way("table_row_wise", "pooled", sequence, NODES, ranks=(0, 1)).label.across
    travel = tw.Communication(forward="int8", backward="bf16")
    found = way("grid_shard", "pooled", topology=NODES, ranks=(0, 1, 2, 3), communication=travel).label
    assert [each.tolist() for each in found.across[1:]] == [[B * (8 + 8)] * 4, [B * 2 * 8] * 4]
    assert found.results.tolist() == found.gradients.tolist() == pytest.approx([2 * 4 * B * (1 - 0.5**4) * 8] * 4), "as they are inside nodes"
    rows = way("row_wise", "pooled", topology=NODES, ranks=(0, 1, 2, 3), reduce_in_node=True).label
    assert rows.across[1].tolist() == pytest.approx([4 * B * (1 - 0.5**4) * D] * 4) and str(rows).endswith("reduced in the node")


def test_a_rank_without_a_block_works_for_those_of_its_node():
    nodes = tw.Topology(**{**vars(NODES), "ranks": 8})
    option = way("table_row_wise", "pooled", topology=nodes, ranks=(5, 6))
    far = (4 * (N + B) + 2 * 4 * B * D) / 0.5e9
    assert np.asarray(option.costs)[[0, 4, 7]].tolist() == pytest.approx([0, far, far])
