"""Topologies: presets, text, what is refused, and how long exchanges take."""
from __future__ import annotations

import pytest
import tablewright as tw

GOOD = {"ranks": 8, "nodes": 2, "memory_gib": 80, "memory_gb_s": 2000, "lookup_gb_s": 1000, "tflops": 100, "intra_node_gb_s": 200,
        "inter_node_gb_s": 20}  # fmt: skip


def test_round_trip(tmp_path):
    for topology in (tw.Topology(**GOOD), tw.Topology.load("8xh200"), tw.Topology.load("16x8xh100")):
        topology.save(tmp_path / "t.yaml")
        assert tw.Topology.load(tmp_path / "t.yaml") == topology
        assert tw.Topology.load(str(tmp_path / "t.yaml")) == topology
    assert tw.Topology.load(GOOD) == tw.Topology(**GOOD)


def test_presets():
    one, many = tw.Topology.load("8xa100"), tw.Topology.load("16X8xA100")
    assert (one.ranks, one.nodes, many.ranks, many.nodes, many.ranks_per_node) == (8, 1, 128, 16, 8)
    assert one.memory_gib == 80 and "data sheet" in one.source
    assert tw.Topology.load("8xa100.yaml") == one  # no such file here: the preset of that name


@pytest.mark.parametrize("change, said", [
    ({"ranks": 0}, "ranks is 0; it must be a whole number from 1"),
    ({"ranks": True}, "ranks is True"),
    ({"ranks": 7}, "7 ranks on 2 nodes"),
    ({"memory_gib": -1}, "memory_gib is -1; it must be a number above 0"),
    ({"memory_gb_s": "fast"}, "memory_gb_s is 'fast'"),
    ({"lookup_gb_s": float("nan")}, "lookup_gb_s is nan"),
    ({"reserved": 1.0}, "reserved is 1.0; it must be a part from 0"),
    ({"inter_node_gb_s": 0}, "inter_node_gb_s is missing"),
    ({"memory": 80}, "no key 'memory' .did you mean 'memory_gib'"),
    ({"name": 3}, "name is 3; it must be a text"),
])  # fmt: skip
def test_bad_values_are_named(change, said):
    with pytest.raises(tw.PlanError, match=said):
        tw.Topology.load({**GOOD, **change})


@pytest.mark.parametrize("what, said", [
    ("8xh10", r"no topology '8xh10' .did you mean '8xh100'\?."),
    ("h100", "no topology 'h100'"),
    ("0xh100", "no topology '0xh100'"),
    ("2x2x2xh100", "no topology"),
    ("none.yaml", "there is no topology file none.yaml"),
    ([8], "it must be a mapping"),
    ({"ranks": 8}, "memory_gib, memory_gb_s, lookup_gb_s, tflops, intra_node_gb_s missing"),
])  # fmt: skip
def test_what_is_no_topology(what, said):
    with pytest.raises(tw.PlanError, match=said):
        tw.Topology.load(what)


def test_bad_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("ranks: [8")
    with pytest.raises(tw.PlanError, match="bad.yaml is not valid YAML"):
        tw.Topology.load(tmp_path / "bad.yaml")
    (tmp_path / "wrong.yaml").write_text("ranks: 8\nmemory: 3\n")
    with pytest.raises(tw.PlanError, match="wrong.yaml: topology: no key 'memory'"):
        tw.Topology.load(tmp_path / "wrong.yaml")


def test_seconds_of_exchanges():
    t = tw.Topology(**GOOD)  # nodes of 4
    assert t.all_to_all(1e9) == pytest.approx(max(3 / 200, 4 / 20))
    assert t.all_reduce(8e9) == pytest.approx(2 * 8 * 3 / 4 / 200 + 2 * 2 * 1 / 2 / 20)
    alone = t.with_ranks(1)
    assert alone.all_to_all(1e9) == 0 and alone.all_reduce(1e9) == 0
    assert t.with_ranks(16).nodes == 4
    assert t.memory == 80 * 1024**3 * 0.9
