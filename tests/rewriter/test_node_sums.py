"""Bags are added up inside a node before they cross nodes: the plain model's numbers, the fewest bytes, errors that all ranks hear of.

Two nodes of two processes; every combination of settings by hand: ``python tests/rewriter/test_sharding.py``.
"""
from __future__ import annotations

import pytest
from node_sum_cases import GRADIENTS, IDS, PLACED, RESULTS, both_ways, chosen, killed, other_mesh, rounded, sent, wrong_ids
from ranks import Pool, Pools
from sharding_cases import NODE_AXES, Case, agree, pairs, train


@pytest.fixture(scope="module")
def pools():
    made = Pools()
    yield made
    made.close()


@pytest.mark.parametrize("case", [Case(**c, exchange="pooled", world=4) for c in pairs(NODE_AXES)], ids=str)
def test_training_equals_the_plain_model(pools, case):
    found = pools(4).run(train, case)
    agree(found)
    for rank, each in enumerate(found):  # one exchange of ids and one of rows across nodes, inside nodes, and for what is not added up
        groups = [(rank % 2, rank % 2 + 2), (rank // 2 * 2, rank // 2 * 2 + 1), (0, 1, 2, 3)]
        assert sorted(each["collectives"]) == sorted((kind, group) for kind in ("exchange_ids", "send_rows") for group in groups)


@pytest.mark.parametrize("tables", list(PLACED))
def test_what_crosses_nodes_is_the_least_possible(pools, tables):
    ranks = pools(4).run(sent, PLACED[tables])
    straight = pools(4).run(sent, {**PLACED[tables], "reduce_in_node": False})
    for found, other in zip(ranks, straight):
        for what in (IDS, RESULTS, GRADIENTS):
            for where in ("across", "inside"):
                assert found["seen"].get((where, what), 0) == found["least"][where, what], (where, what)
            assert other["seen"].get(("across", what), 0) == other["flat"][what], "and without it, what the flat exchange sends"
            assert found["least"]["across", what] <= found["flat"][what]
        assert found["table"].count("reduced inside the node first") >= 3 and "3/3 node sums" in found["report"]
        if tables != "rows":
            assert other["table"].count("DISABLED  ragged") == 1
    for what in (RESULTS, GRADIENTS):
        assert sum(f["least"]["across", what] for f in ranks) < 0.9 * sum(f["flat"][what] for f in ranks)


def test_only_what_crosses_nodes_is_rounded(pools):
    codecs = {"communication": {"forward": "fp16", "backward": "int8"}}
    for found in pools(4).run(sent, {**PLACED["one node"], **codecs}):
        plain = found["least"]
        for what, width in ((RESULTS, 16), (GRADIENTS, 8 + 8)):  # of a row of 8 columns; int8 rows carry their scale and offset
            assert found["seen"].get(("across", what), 0) == plain["across", what] / 32 * width
            assert found["seen"].get(("inside", what), 0) == plain["inside", what]
    for found in pools(4).run(rounded, {**PLACED["one node"], **codecs}):
        assert 1e-7 < found["out"] <= 2**-11 * found["largest"] + 2**-25 + 1e-6, "a bag is rounded once, however many ranks have parts of it"
        assert found["moved"] <= found["reads"] * (2 / 4 / 510) + 1e-5


def test_an_id_outside_its_table_stops_all_ranks_together(pools):
    said = pools(4).run(wrong_ids, PLACED["one node"])
    assert said[3][0].startswith("IndexError: id 40") and "ragged" in said[3][0]
    for message, seconds in said[:3]:
        assert message.startswith("PeerError: rank 3 was given ids") and seconds < 20


def test_a_rank_that_dies_ends_the_others():
    pool = Pool(4, timeout=8)
    try:
        outcomes = pool.outcomes(killed, PLACED["grid"], heard=3, wait=300)
    finally:
        pool.close()
    assert all(ok and "another rank died, hung" in said for ok, said in outcomes), outcomes


def test_a_mesh_that_does_not_go_node_by_node_is_refused(pools):
    assert all("mesh has the ranks [[0, 2], [1, 3]]; nodes one after another were needed" in said for said in pools(4).run(other_mesh))


def test_auto_counts_the_bytes_across_nodes(pools):
    few = pools(4).run(chosen, 2)
    assert all(f == few[0] for f in few) and set(few[0].values()) == {("unique", 0)}
    many = pools(4).run(chosen, 43)
    assert many[0]["ragged.weight"] == ("pooled", 2), "parts of a bag cross nodes as one: fewer bytes than its rows"


def test_rows_that_are_not_added_up_go_straight(pools):
    for said, resolved in pools(4).run(both_ways):
        assert sum(s.startswith("APPLIED bags.mean: reduced inside the node first: ") for s in said) == 1
        assert sum(s.startswith("APPLIED bags.ragged") for s in said) == 1
        assert sum(s.startswith("SKIPPED ") and "travel one by one" in s for s in said) == 3
        assert sum(s.startswith("DISABLED bags.one: the plan says so") for s in said) == 1
        assert "pooled, by node" in resolved
