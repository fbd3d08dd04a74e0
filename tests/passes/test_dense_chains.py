"""Chains of linear layers: every layer is in one record, and what is rewritten computes the same."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_same_numbers, assert_sound, rewrite
from tablewright.kernels.dense.gemm import LEAST_WORK
from tablewright.passes import dense_chains
from tablewright.passes.dense_chains import DenseChains
from tablewright.passes.measure import Timing
from torch import nn

FUSE = DenseChains(measure=False)


@pytest.fixture(autouse=True)
def small_layers_count(monkeypatch):
    monkeypatch.setattr(dense_chains, "LEAST_WORK", 0)


def tower(*between):
    return nn.Sequential(nn.Linear(7, 8), *between, nn.Linear(8, 1), nn.Sigmoid())


BETWEEN = {
    "nothing": ((), ["none", "sigmoid"]),
    "relu": ((nn.ReLU(),), ["relu", "sigmoid"]),
    "sigmoid": ((nn.Sigmoid(),), ["sigmoid", "sigmoid"]),
    "tanh": ((nn.Tanh(),), ["tanh", "sigmoid"]),
    "relu, no dropout": ((nn.ReLU(), nn.Dropout(0.0)), ["relu", "sigmoid"]),
    "batch norm, relu": ((nn.BatchNorm1d(8), nn.ReLU()), ["none", "sigmoid"]),
    "prelu": ((nn.PReLU(),), ["none", "sigmoid"]),
    "leaky relu, layer norm": ((nn.LeakyReLU(), nn.LayerNorm(8)), ["none", "sigmoid"]),
    "gelu": ((nn.GELU(),), ["none", "sigmoid"]),
}


@pytest.mark.parametrize("rows", [5, 2])
@pytest.mark.parametrize("name", BETWEEN)
def test_activations(name, rows):
    between, functions = BETWEEN[name]
    done = rewrite(tower(*between), (torch.randn(rows, 7),), FUSE)
    (row,) = done.records
    assert (row.status, row.subject, row.detail) == ("APPLIED", "0", "2 of 2 linear layers")
    assert [n.args[3] for n in done.nodes("dense")] == functions and not done.nodes("linear")
    assert_sound(done)


def test_relu_in_place():
    done = rewrite(tower(nn.ReLU(inplace=True)), (torch.randn(5, 7),), FUSE)
    assert [n.args[3] for n in done.nodes("dense")] == ["relu", "sigmoid"]
    assert_same_numbers(done.shell, done.before, done.after, done.leaves)


@pytest.mark.parametrize("rows", [0, 1])
def test_batches_of_none_and_one(rows):
    done = rewrite(tower(nn.ReLU()), (torch.randn(rows, 7),), FUSE)
    assert done.of("APPLIED")
    assert_sound(done)


def test_train_and_eval_are_followed():
    """Dropout and batch norm stay nodes of their own, with their flags."""
    done = rewrite(tower(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5)), (torch.randn(6, 7),), FUSE)
    assert len(done.nodes("dropout")) == len(done.nodes("batch_norm")) == 1
    assert_sound(done)


class Forms(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.how = how

    def forward(self, x):
        return self.how(self, x)


FORMS = {
    "fork": (lambda m, x: (lambda y: m.b(y) + m.c(y))(m.a(x).relu()), 3, 3),
    "the product is read twice": (lambda m, x: (lambda y: y.relu() + y)(m.a(x)), 1, 1),
    "one layer used twice": (lambda m, x: m.a(m.a(x).relu()), 1, 2),
    "three dimensions": (lambda m, x: m.b(m.a(x.unsqueeze(1)).tanh()), 1, 2),
    "the relu's result is returned too": (lambda m, x: (lambda y: (m.b(y), y))(m.a(x).relu()), 2, 2),
    "written to afterwards": (lambda m, x: m.a(x).mul_(2), 1, 1),
    "matmul by a parameter": (lambda m, x: (m.a(x) @ m.b.weight).relu(), 1, 2),
    "matmul by a transposed parameter": (lambda m, x: (x.unsqueeze(1) @ m.b.weight.t()).relu(), 1, 1),
    "scores of all rows of a table": (lambda m, x: torch.matmul(x, m.b.weight.transpose(0, 1)), 1, 1),
    "a matrix times columns": (lambda m, x: torch.matmul(m.b.weight, x.unsqueeze(2)).relu(), 1, 1),
    "a matrix times columns of columns": (lambda m, x: m.b.weight @ (m.c.weight @ x.view(-1, 1, 4, 1)).tanh(), 2, 2),
    "einsum": (lambda m, x: torch.einsum("bi,ij->bj", x, m.b.weight).sigmoid(), 1, 1),
    "einsum by the transpose": (lambda m, x: torch.einsum("bli, ji -> blj", x.unsqueeze(1), m.b.weight), 1, 1),
    "a product of two activations": (lambda m, x: m.a(x) @ m.b(x).t(), 2, 2),
    "a functional layer": (lambda m, x: nn.functional.linear(x, m.b.weight * 2), 1, 1),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_layer_is_in_one_record(name):
    how, chains, layers = FORMS[name]
    done = rewrite(Forms(how), (torch.randn(5, 4),), FUSE)
    assert len(done.records) == len(done.of("APPLIED")) == chains
    assert sum(int(r.detail.split()[2]) for r in done.records) == len(done.nodes("dense")) == layers
    assert_sound(done)


@pytest.mark.parametrize(
    "how",
    [
        lambda m, x: m.b.weight @ x.unsqueeze(2).expand(-1, -1, 3),
        lambda m, x: torch.einsum("bi,ij->ib", x, m.b.weight),
        lambda m, x: torch.einsum("bi,jk->bi", x, m.b.weight),
        lambda m, x: torch.einsum("bi,ij->b", x, m.b.weight),
        lambda m, x: torch.einsum("bi,jj->bj", x, m.b.weight),
        lambda m, x: torch.einsum("bi,ii->bi", x, m.b.weight),
        lambda m, x: torch.einsum("bi,i->b", x, m.c.bias),
        lambda m, x: m.b.weight @ m.c.weight.unsqueeze(2) * x.sum(),
    ],
    ids=["wide columns", "turned", "no product", "summed", "diagonal", "times its diagonal", "a vector", "of parameters alone"],
)
def test_look_alikes_stay(how):
    done = rewrite(Forms(how), (torch.randn(5, 4),), FUSE)
    assert not done.records and not done.nodes("dense")


def test_an_einsum_that_repeats_a_column_is_skipped():
    done = rewrite(Forms(lambda m, x: torch.einsum("bi,ij->bj", x[:, :1], m.b.weight)), (torch.randn(5, 4),), FUSE)
    assert "of 4 columns was needed" in done.of("SKIPPED")[0].reason


def test_frozen_and_tied_weights():
    model = Forms(lambda m, x: m.c(m.b(m.a(x).relu())))
    model.c.weight = model.a.weight
    model.b.requires_grad_(False)
    done = rewrite(model, (torch.randn(5, 4),), FUSE)
    assert done.records[0].detail == "3 of 3 linear layers"
    assert_sound(done)


def test_what_the_op_does_not_serve_is_skipped_with_the_reason():
    assert "float64" in rewrite(tower().double(), (torch.randn(5, 7, dtype=torch.float64),), FUSE).of("SKIPPED")[0].reason
    done = rewrite(tower(), None, FUSE)
    assert "not known without sample_inputs" in done.of("SKIPPED")[0].reason


def test_small_layers_are_skipped_unmeasured(monkeypatch):
    monkeypatch.setattr(dense_chains, "LEAST_WORK", LEAST_WORK)
    done = rewrite(tower(), (torch.randn(5, 7),), DenseChains())
    assert "million multiply-adds" in done.of("SKIPPED")[0].reason and not done.context.timings


@pytest.mark.parametrize(("gains", "status", "layers"), [((2.0, 2.0), "APPLIED", 2), ((2.0, 1.0), "APPLIED", 1), ((1.0, 0.9), "SKIPPED", 0)])
def test_only_layers_measured_faster_are_rewritten(monkeypatch, gains, status, layers):
    given = iter(gains)
    monkeypatch.setattr(dense_chains, "_time", lambda *facts: Timing(next(given), 1.0))
    done = rewrite(tower(nn.ReLU()), (torch.randn(5, 7),), DenseChains())
    (row,) = done.records
    assert row.status == status and len(done.nodes("dense")) == layers
    assert f"measured {sum(gains[:layers or 2]) / (layers or 2):.2f}x" in (row.detail or row.reason)
    assert_sound(done, idempotent=False)


def test_the_measurement_runs():
    done = rewrite(tower(nn.ReLU()), (torch.randn(5, 7),), DenseChains())
    assert len(done.context.timings) == 2 and all(t.plain > 0 and t.rewritten > 0 for t in done.context.timings.values())


def test_budget():
    done = rewrite(Forms(FORMS["fork"][0]), (torch.randn(5, 4),), FUSE, budget=1)
    assert len(done.of("APPLIED")) == 1 and len(done.of("DISABLED")) == 2
    assert_sound(done, idempotent=False)


def _written(write):
    def how(m, x):
        state = x * 1
        product = m.a(state)
        write(m, state)
        return product.relu() + state + m.c.weight.sum()

    return how


WRITES = {
    "a view of the input": lambda m, state: state.view(-1).add_(1),
    "the input in a list": lambda m, state: torch._foreach_add_([state], 1),
    "the weight": lambda m, state: m.a.weight.mul_(0.5),
    "the bias": lambda m, state: m.a.bias.add_(3),
}


@pytest.mark.parametrize("what", WRITES)
def test_writes_between_a_product_and_its_activation(what):
    """The op reads where the product did, and the activation stays."""
    model = Forms(_written(WRITES[what])).requires_grad_(False)
    done = rewrite(model, (torch.randn(5, 4),), FUSE)
    assert [n.args[3] for n in done.nodes("dense")] == ["none"] and done.nodes("relu")
    assert_sound(done)


class Returned(nn.Module):
    """The hidden result is read by a layer alone, by another reader too, or returned, so that its gradient can be asked for."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.second = how, nn.Linear(7, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x).relu()
        out = self.second(hidden)
        return (out, hidden) if self.how == "returned" else out + hidden.sum() if self.how == "read twice" else out


@pytest.mark.parametrize("how", ["read once", "read twice", "returned"])
def test_only_the_one_reader_of_a_relu_masks_its_gradient(how):
    done = rewrite(Returned(how), (torch.randn(5, 7),), FUSE)
    first, second = done.nodes("dense")
    assert len(first.args) == 4 and second.args[4:] == ((True,) if how == "read once" else ())
    assert_sound(done)
