"""Bytes and operations of nodes, against numbers counted by hand."""
from __future__ import annotations

import pytest
import torch
from tablewright.passes.cost import FREE, KEY, Cost, Rates, backward_cost, graph_cost, is_collective, node_cost
from tablewright.passes.graph import packet_name
from tablewright.rewriter.capture import capture, clone_shell
from tablewright.rewriter.optimize import optimize
from torch import nn

B, D, ROWS = 6, 4, 20


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(ROWS, D)
        self.tags = nn.EmbeddingBag(ROWS, D, mode="sum")
        self.over = nn.Linear(2 * D, 3)

    def forward(self, user, tags):
        x = torch.cat([self.user(user), self.tags(tags)], 1)
        return torch.einsum("bi,bj->ij", self.over(x).relu().view(-1, 3), x).sum()


def inputs():
    return torch.randint(0, ROWS, (B,)), torch.randint(0, ROWS, (B, 5))


def captured(model, args):
    shell = clone_shell(model)
    return shell, capture(shell, args, {}).graph


def only(graph, name):
    (found,) = [n for n in graph.nodes if packet_name(n) == name]
    return found


def test_plain_ops():
    shell, graph = captured(Model(), inputs())
    assert node_cost(only(graph, "linear"), shell) == Cost(
        read=4 * (B * 2 * D + 3 * 2 * D + 3), written=4 * B * 3, flops=2 * B * 2 * D * 3, calls=1
    )
    assert node_cost(only(graph, "cat"), shell) == Cost(4 * B * 2 * D, 4 * B * 2 * D, B * 2 * D, calls=1)
    assert node_cost(only(graph, "embedding"), shell) == Cost(8 * B + 4 * B * D, 4 * B * D, B * D, calls=1)
    assert node_cost(only(graph, "embedding_bag"), shell).read >= 8 * B * 5 + 4 * B * 5 * D
    assert node_cost(only(graph, "embedding_bag"), shell).written == 4 * B * D
    assert node_cost(only(graph, "einsum"), shell).flops == 2 * B * 3 * 2 * D
    assert node_cost(only(graph, "view"), shell) == FREE
    for node in graph.nodes:
        if node.op != "call_function":
            assert node_cost(node, shell) == FREE


def test_backward_of_a_product_makes_two_products_and_frozen_inputs_make_none():
    model = Model()
    shell, graph = captured(model, inputs())
    linear = only(graph, "linear")
    found = backward_cost(linear, shell)
    assert found.flops == 2 * node_cost(linear, shell).flops
    assert found.written == 4 * (B * 2 * D + 3 * 2 * D + 3)
    model.user.weight.requires_grad_(False)
    shell, graph = captured(model, inputs())
    assert backward_cost(only(graph, "embedding"), shell) == FREE
    assert backward_cost(only(graph, "embedding_bag"), shell).written > 0


def test_the_fused_lookup_costs_what_its_parts_cost():
    opt = optimize(Model(), sample_inputs=inputs())
    variant = opt._variants[0]
    fused = only(variant.graph, "embedding_bags")
    cost = node_cost(fused, opt)
    assert cost.read == 8 * (B + 5 * B) + 4 * D * (B + 5 * B)
    assert cost.written == 4 * B * 2 * D
    total, unknown = graph_cost(variant.graph, opt, backward=True, skip=[fused])
    assert not unknown and total.flops > 0 and total.wire == 0


def test_unknown_shapes_are_unknown_and_a_pass_may_say_better():
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.over = nn.Linear(3, 2)

        def forward(self, x):
            return self.over(x)

    shell, graph = captured(One(), None)
    linear = only(graph, "linear")
    assert node_cost(linear, shell) is None and backward_cost(linear, shell) is None
    assert graph_cost(graph, shell) == (FREE, [linear])
    linear.meta[KEY] = Cost(1, 2, 3)
    assert node_cost(linear, shell) == Cost(1, 2, 3)


@pytest.mark.parametrize("name, sent", [
    ("all_to_all_single", 80 * 3 / 4), ("reduce_scatter_tensor", 80 * 3 / 4), ("all_gather_into_tensor", 320 * 3 / 4),
    ("all_reduce", 2 * 80 * 3 / 4),
])  # fmt: skip
def test_collectives(name, sent, monkeypatch):
    wire = torch.ops._c10d_functional
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_group_size_by_name", lambda group: 4)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(20, device="meta")
    calls = {
        "all_to_all_single": (x, [5] * 4, [5] * 4, "g"), "reduce_scatter_tensor": (x, "sum", 4, "g"),
        "all_gather_into_tensor": (x, 4, "g"), "all_reduce": (x, "sum", "g"),
    }  # fmt: skip
    node = graph.call_function(getattr(wire, name).default, calls[name])
    node.meta["val"] = torch.empty({"reduce_scatter_tensor": 5, "all_gather_into_tensor": 80}.get(name, 20), device="meta")
    wait = graph.call_function(wire.wait_tensor.default, (node,))
    assert node_cost(node, nn.Module()).wire == sent and node_cost(node, nn.Module()).messages == 1
    assert is_collective(node) and not is_collective(wait) and node_cost(wait, nn.Module()) == FREE
    assert backward_cost(node, nn.Module()).wire == sent


def test_seconds_are_the_longer_of_memory_and_arithmetic_and_the_wire_on_top():
    rates = Rates(memory=10, flops=100, wire=5, call=1, message=2)
    assert Cost(read=10, written=10, flops=100, calls=1).seconds(rates) == 2 + 1
    assert Cost(read=1, written=1, flops=1000).seconds(rates) == 10
    assert (Cost(wire=10, messages=1) + Cost(read=10)).seconds(rates) == 1 + 2 + 2


def test_every_op_of_ours_has_a_count():
    """Of a DLRM, a DCN and an FM, optimized without measuring, no node is unknown and each op of ours does arithmetic."""

    class Zoo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(ROWS, D) for _ in range(3))
            self.cross = nn.ModuleList(nn.Linear(3 * D, 3 * D) for _ in range(2))
            self.vector = nn.ParameterList(torch.randn(3 * D, 1) for _ in range(2))
            self.over = nn.Sequential(nn.Linear(3 * D, 8), nn.ReLU(), nn.Linear(8, 1))

        def forward(self, ids):
            rows = torch.stack([t(ids[:, i]) for i, t in enumerate(self.tables)], 1)
            x0 = x = rows.flatten(1)
            for layer in self.cross:
                x = x0 * layer(x) + x
            v = x0
            for w in self.vector:
                v = x0 * (v @ w) + v
            fm = 0.5 * (rows.sum(1) ** 2 - (rows**2).sum(1))
            gram = torch.bmm(rows, rows.transpose(1, 2))
            i, j = torch.tril_indices(3, 3, -1)
            return self.over(x).sum() + v.sum() + fm.sum() + gram[:, i, j].sum()

    names = ["fuse_fm", "fuse_dot_interaction", "fuse_cross", "dense_chains"]
    opt = optimize(Zoo(), {"version": 1, "passes": {n: {"measure": False} for n in names}}, sample_inputs=torch.randint(0, ROWS, (B, 3)))
    ours = [n for n in opt._variants[0].graph.nodes if str(n.target).startswith("tablewright.")]
    assert {packet_name(n) for n in ours} >= {"embedding_bags", "cross", "cross_vector", "fm", "dot_interaction"}
    for node in ours:
        cost, back = node_cost(node, opt), backward_cost(node, opt)
        assert cost.flops > 0 and cost.read > 0 and cost.written > 0 and back.moved > 0, node
    assert graph_cost(opt._variants[0].graph, opt, backward=True)[1] == []


def test_dense_ops_and_pair_products_count_their_products():
    ours, graph = torch.ops.tablewright, torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    x.meta["val"], weight.meta["val"] = torch.empty(B, 5, device="meta"), torch.empty(7, 5, device="meta")
    dense = graph.call_function(ours.dense.default, (x, weight, None, "relu"))
    group = graph.call_function(ours.dense_group.default, (x, [weight, weight], [None, None]))
    features = graph.placeholder("features")
    features.meta["val"] = torch.empty(B, 3, D, device="meta")
    pairs = graph.call_function(ours.pair_products.default, (features, "3 lower"))
    out = torch.empty(B, 7, device="meta")
    dense.meta["val"], group.meta["val"], pairs.meta["val"] = out, [out, out], torch.empty(B, 3, D, device="meta")
    root = nn.Module()
    assert node_cost(dense, root).flops == 2 * B * 5 * 7
    assert node_cost(group, root).flops == 2 * 2 * B * 5 * 7 and node_cost(group, root).written == 2 * 4 * B * 7
    assert node_cost(pairs, root).flops == 3 * B * D
