"""The data of the viewer: every node of every step, where it comes from, what it costs; and its forms."""
from __future__ import annotations

import json

import pytest
import tablewright as tw
import torch
from tablewright.rewriter.errors import PlanError
from tablewright.rewriter.viewer import visualize
from tablewright.rewriter.viewer.graph_data import graph_data
from tablewright.rewriter.viewer.timing import time_nodes
from torch import nn
from viewer_models import Hostile, dlrm, optimized


@pytest.fixture(scope="module")
def opt():
    return dlrm()


@pytest.fixture(scope="module")
def data(opt):
    return json.loads(json.dumps(graph_data(opt)))


def _graphs(data):
    (program,) = data["programs"]
    ids = program["ids"]
    found = [ids]
    for step in program["steps"]:
        ids = ids if step["ids"] is None else step["ids"]
        found.append(ids)
    return [[data["nodes"][i] for i in ids] for ids in found]


def test_every_step_is_the_graph_that_the_pass_left(opt, data):
    graphs = _graphs(data)
    assert [n["name"] for n in graphs[0]] == [n.name for n in opt.steps[0].before.nodes]
    for step, graph in zip(opt.steps, graphs[1:]):
        assert [n["name"] for n in graph] == [n.name for n in step.after.nodes]
        assert [n.get("inputs", []) for n in graph] == [[i.name for i in dict.fromkeys(n.all_input_nodes)] for n in step.after.nodes]
    assert len(data["nodes"]) < sum(map(len, graphs)) / 2  # what did not change is stored once


def test_every_node_says_where_it_comes_from(data):
    captured, last = _graphs(data)[0], _graphs(data)[-1]
    names = {n["name"] for n in captured}
    for node in last:
        assert set(node.get("sources", [])) <= names, node
    (bags,) = [n for n in last if n["op"] == "embedding_bags"]
    assert len([s for s in bags["sources"] if s.startswith("embedding_bag")]) == 4 and bags["made_by"] != "capture"
    place = data["places"][bags["place"]]
    assert place["text"].startswith("viewer_models.py:") and "self.embs" in place["lines"][place["line"] - place["first"]]
    assert len(place["lines"]) == 5


def test_costs_and_memory(data):
    last = _graphs(data)[-1]
    (bags,) = [n for n in last if n["op"] == "embedding_bags"]
    assert bags["read"] > 16 * 4 * 8 * 4 and bags["written"] == 16 * 5 * 8 * 4
    linear = next(n for n in last if n["kind"] == "op" and n["op"] in ("linear", "dense"))
    assert linear["flops"] >= 2 * 16 * 13 * 32
    stored = {n["target"]: n for n in last if n["kind"] == "stored"}
    assert stored["embs.0.weight"]["memory"] == 100 * 8 * 4 and stored["embs.0.weight"]["stored"] == "parameter"
    assert [t["rows"] for t in data["tables"]] == [100, 101, 102, 103]


def test_records_and_coverage(opt, data):
    shown = [r for step in data["programs"][0]["steps"] for r in step["records"]]
    assert {(r["rule"], r["status"], r.get("subject", "")) for r in shown} == {(r.rule, r.status, r.subject) for r in opt.report.records}
    assert data["coverage"]["lookups"] == [4, 4]


def test_profile(opt):
    inputs = torch.randn(16, 13), torch.randint(0, 100, (16, 4))
    state = torch.get_rng_state()
    seconds = time_nodes(opt, *inputs, rounds=2)
    assert torch.equal(state, torch.get_rng_state())
    data = graph_data(opt, seconds)
    for graph in (_graphs(data)[0], _graphs(data)[-1]):
        assert all(n.get("seconds", 0) > 0 for n in graph if n["kind"] == "op")


def test_model_explorer(opt):
    found = json.loads(visualize(opt, format="model-explorer"))
    captured = found["graphs"][0]
    ids = {n["id"] for n in captured["nodes"]}
    assert len(found["graphs"]) > 2 and len(ids) == len(captured["nodes"])
    assert all(e["sourceNodeId"] in ids for n in captured["nodes"] for e in n["incomingEdges"])
    assert {n["namespace"] for n in captured["nodes"]} >= {"embs/0", "bottom/0", ""}


def test_pieces():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, ids):
            x = self.table(ids)
            if x.detach().numpy().sum() > 1e9:  # what no graph can follow
                x = x * 2
            return torch.relu(x)

    ids = torch.randint(0, 10, (3, 2))
    pieces = graph_data(optimized(Branch(), ids))
    assert len(pieces["programs"]) > 1 and all("piece" in p["title"] for p in pieces["programs"])


def test_without_inputs_nothing_is_known_of_costs():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.top = nn.Embedding(10, 4), nn.Linear(4, 1)

        def forward(self, ids):
            return self.top(self.table(ids))

    nodes = graph_data(tw.optimize(Plain()))["nodes"]
    assert all(n.get("unknown") and "flops" not in n for n in nodes if n["target"].startswith(("aten", "tablewright")))


def test_serving_splits_the_model(opt):
    program = graph_data(opt, serving=True)["programs"][-1]
    data = graph_data(opt, serving=True)
    last = [data["nodes"][i] for i in next(s["ids"] for s in reversed(program["steps"]) if s["ids"])]
    assert sum(n["op"] == "distributed_gather_bag" for n in last) == 4 and "serving" in program["title"]
    assert not [n for n in last if n["kind"] == "stored" and n["target"].startswith("embs")]


def test_tables_in_tiers_are_shown_whole(tmp_path):
    model = nn.Sequential(nn.Embedding(1000, 4))
    plan = tw.Plan.from_dict({"version": 1, "tables": {"0": {"storage": {"cache": 3200, "path": str(tmp_path / "rows")}}}})
    opt, _ = tw.optimize(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(torch.tensor([1, 2]),))
    (table,) = graph_data(opt)["tables"]
    assert (table["rows"], table["memory"], table["place"]) == (1000, 16000, "file, 192 rows cached")


def test_predicted_times_and_no_ranks(data):
    assert data["ranks"] == [] and data["rates"]["memory"] > 0
    assert all(n["predicted"] > 0 for n in _graphs(data)[-1] if n["op"] in ("embedding_bags", "linear") and n["kind"] == "op")


def test_bad_format_and_no_sources(opt, tmp_path):
    with pytest.raises(PlanError, match="format is 'pdf'"):
        visualize(opt, format="pdf")
    assert all("lines" not in p for p in graph_data(opt, sources=False)["places"])
    text = opt.visualize(tmp_path / "graph.html")
    assert (tmp_path / "graph.html").read_text(encoding="utf-8") == text
    assert opt._repr_html_().startswith("<iframe") and "<script" not in opt._repr_html_()


def test_hostile_names_are_escaped():
    text = visualize(optimized(Hostile(), torch.randint(0, 10, (3, 2))))
    assert "<img" not in text and text.count("</script>") == text.count("<script") == 3
