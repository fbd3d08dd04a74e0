"""Lookups leave the graph: the lowered graph with bound rows computes what the plain model computes in evaluation mode."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pass_harness import rewrite
from tablewright.kernels.gather.op import bound
from tablewright.passes.eval_form import EvalForm
from tablewright.passes.fold_batch_norm import FoldBatchNorm
from tablewright.passes.graph import packet_name, stored_tensor
from tablewright.passes.lower_to_serving import LowerToServing, table_names
from tablewright.passes.records import APPLIED, DISABLED, SKIPPED
from tablewright.passes.rule import Context
from tablewright.rewriter.capture import attach
from torch import nn


class Model(nn.Module):
    """Every form of lookup, batch norm after a linear layer and on its own, dropout."""

    def __init__(self):
        super().__init__()
        self.single, self.mean = nn.Embedding(50, 8, padding_idx=3), nn.EmbeddingBag(60, 8, mode="mean", padding_idx=-1)
        self.max, self.weighted = nn.EmbeddingBag(40, 8, mode="max"), nn.EmbeddingBag(40, 8, mode="sum", scale_grad_by_freq=False)
        self.short = nn.Embedding(30, 8).half()
        self.free = nn.Parameter(torch.randn(20, 8))
        self.first, self.norm, self.norm2 = nn.Linear(48, 16), nn.BatchNorm1d(16), nn.BatchNorm1d(16, affine=False)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(16, 1)

    def forward(self, ids, history, offsets, weights):
        matrix = torch.stack([ids, ids + 1], 1) % 40
        parts = [
            self.single(ids), self.mean(history, offsets), self.max(matrix), self.weighted(matrix, per_sample_weights=weights),
            self.short(ids % 30).float(), self.free[ids % 20 - 20],
        ]  # fmt: skip
        return self.last(self.drop(self.norm2(F.relu(self.norm(self.first(torch.cat(parts, 1)))))))


def _model() -> Model:
    torch.manual_seed(0)
    model = Model()
    for norm in (model.norm, model.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model.eval()


def _inputs(batch: int) -> tuple:
    # the second bag is empty; duplicates, the padding id and the largest id are among the ids
    return (torch.arange(batch) % 50, torch.tensor([59, 1, 1, 59, 7, 0]), torch.tensor([0, 2, 2, *[4] * (batch - 3)]), torch.rand(batch, 2))


def _lowered(model: nn.Module, inputs: tuple, inline_below: int = 0):
    done = rewrite(model, inputs, EvalForm())
    context = Context(done.after, done.shell)
    records = [*done.records, *FoldBatchNorm().run(context), *LowerToServing(inline_below).run(context)]
    context.graph.lint()
    names = {name: key for key, name in table_names(done.shell).items()}
    tensors = {id(t): t for t in [*done.shell.parameters(), *done.shell.buffers()]}

    def run(*leaves):
        with torch.no_grad(), bound(lambda table, ids: tensors[names[table]][ids].float()):
            return attach(done.shell, context.graph)(*leaves)[0]

    return run, context.graph, records, done.shell


def test_every_form_of_lookup_leaves_the_graph_and_numbers_stay():
    model = _model()
    run, graph, records, shell = _lowered(model, _inputs(5))
    called = [packet_name(n) for n in graph.nodes if n.op == "call_function"]
    assert called.count("distributed_gather") == 3 and called.count("distributed_gather_bag") == 3
    assert not {"embedding", "embedding_bag", "batch_norm", "dropout", "add_", "index"} & set(called)
    assert len([r for r in records if r.kind == "lookups" and r.status == APPLIED]) == 6
    assert len([r for r in records if r.kind == "batch norms" and r.status == APPLIED]) == 2
    assert called.count("linear") == 2 and called.count("mul") == 1  # one norm is folded, one is a scale and a shift
    read = {id(t) for n in graph.nodes if (t := stored_tensor(n, shell)) is not None}
    assert not read & {id(t) for t in (model.single.weight, model.mean.weight, model.short.weight, model.free)}
    for batch in (5, 9):
        inputs = _inputs(batch)
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def test_every_node_made_has_an_origin_of_the_pass():
    graph = _lowered(_model(), _inputs(5))[1]
    for node in graph.nodes:
        if packet_name(node).startswith("distributed_gather"):
            assert node.meta["origin"].made_by == "lower_to_serving" and node.meta["origin"].location and node.meta["origin"].sources


@pytest.mark.parametrize("wrong", [-1, 50])
def test_a_wrong_id_is_an_error_as_in_the_plain_model(wrong):
    run = _lowered(_model(), _inputs(5))[0]
    inputs = _inputs(5)
    inputs[0][2] = wrong
    with pytest.raises(IndexError, match="table 'single', which has 50"):
        run(*inputs)


def test_small_tables_stay_inside_by_plan():
    run, graph, records, _ = _lowered(_model(), _inputs(5), inline_below=20 * 8 * 4 + 1)
    inside = [r for r in records if r.status == DISABLED]
    assert len(inside) == 2 and all("serving.inline_below" in r.reason for r in inside)  # short: 480 bytes, free: 640
    assert [packet_name(n) for n in graph.nodes].count("distributed_gather") == 1


def test_a_table_tied_to_an_output_layer_stays_inside():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.items = nn.Embedding(20, 4)

        def forward(self, ids):
            return self.items(ids) @ self.items.weight.T

    model = Tied().eval()
    run, graph, records, _ = _lowered(model, (torch.arange(6),))
    (skipped,) = [r for r in records if r.status == SKIPPED]
    assert "also read by" in skipped.reason and not [n for n in graph.nodes if packet_name(n) == "distributed_gather"]


def test_tied_tables_have_one_name():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(20, 4), nn.Embedding(20, 4)
            self.b.weight = self.a.weight

        def forward(self, x, y):
            return self.a(x) * self.b(y)

    graph = _lowered(Shared().eval(), (torch.arange(6), torch.arange(6)))[1]
    assert [n.args[1] for n in graph.nodes if packet_name(n) == "distributed_gather"] == ["a", "a"]


def test_a_double_table_stays_inside():
    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Embedding(20, 4, dtype=torch.float64)

        def forward(self, x):
            return self.a(x)

    records = _lowered(Double().eval(), (torch.arange(6),))[2]
    assert [r.status for r in records if r.kind == "lookups"] == [SKIPPED] and "float64" in records[-1].reason


def test_a_model_in_training_mode_keeps_its_dropout():
    model = _model()
    model.drop.train()
    graph = _lowered(model, _inputs(5))[1]
    assert "dropout" in [packet_name(n) for n in graph.nodes]
