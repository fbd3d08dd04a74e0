"""Factorization machines in their spellings become one op; look-alikes do not."""
from __future__ import annotations

import pytest
import torch
from interaction_models import IDS, Lookups, fused
from pass_harness import again, rewrite
from tablewright.passes import measure
from tablewright.passes.fuse_fm import FuseFm
from tablewright.passes.graph import Editor
from tablewright.rewriter.verify import copy_graph

PER_COLUMN = {
    "half after": lambda m, rows, x: 0.5 * (x.sum(1) ** 2 - (x**2).sum(1)),
    "half before": lambda m, rows, x: (torch.sum(x, dim=1).pow(2) - torch.sum(x * x, dim=[1])) * 0.5,
    "divided": lambda m, rows, x: (x.sum(-2).square() - x.square().sum(-2)) / 2,
    "float exponents": lambda m, rows, x: 0.5 * (x.sum(1) ** 2.0 - (x**2.0).sum(1)),
    "kept dimension": lambda m, rows, x: 0.5 * (x.sum(1, keepdim=True).pow(2) - (x * x).sum(1, keepdim=True)),
    "other way round": lambda m, rows, x: -0.5 * ((x * x).sum(1) - x.sum(1) ** 2),
    "no half": lambda m, rows, x: x.sum(1) ** 2 - (x * x).sum(1),
    "sum times itself": lambda m, rows, x: (lambda s: s * s)(x.sum(1)) - (x * x).sum(1),
    "fields first": lambda m, rows, x: torch.stack(rows).sum(0) ** 2 - (torch.stack(rows) ** 2).sum(0),
    "fields last": lambda m, rows, x: (lambda y: y.sum(2) ** 2 - (y**2).sum(2))(x.transpose(1, 2).contiguous()),
    "list": lambda m, rows, x: 0.5 * (sum(rows) ** 2 - sum(r * r for r in rows)),
    "list of kept": lambda m, rows, x: (lambda k: sum(k) ** 2 - sum(r**2 for r in k))([r.unsqueeze(1) for r in rows]),
    "columns of X": lambda m, rows, x: (lambda c: sum(c) ** 2 - sum(r**2 for r in c))([x[:, i] for i in range(4)]),
}
SUMMED = {
    "last sum": lambda m, rows, x: 0.5 * (x.sum(1) ** 2 - (x**2).sum(1)).sum(1),
    "last sum kept": lambda m, rows, x: 0.5 * (x.sum(1) ** 2 - (x**2).sum(1)).sum(1, keepdim=True),
    "half between": lambda m, rows, x: ((x.sum(1) ** 2 - (x**2).sum(1)) * 0.5).sum(-1, keepdim=True),
    "kept twice": lambda m, rows, x: 0.5 * torch.sum(torch.pow(x.sum(1, True), 2) - (x * x).sum(1, True), dim=2),
    "negated": lambda m, rows, x: -(x.sum(1) ** 2 - (x**2).sum(1)).sum(1),
}


@pytest.mark.parametrize("name", [*PER_COLUMN, *SUMMED])
def test_spellings(name):
    done = fused((PER_COLUMN | SUMMED)[name], FuseFm(measure=False))
    assert [r.status for r in done.records] == ["APPLIED"]
    (op,) = done.nodes("fm")
    assert op.args[2] is (name in SUMMED)
    assert not done.nodes("sub") and not done.nodes("pow") and not done.nodes("sum")


def test_what_else_reads_the_sum_still_does():
    def how(m, rows, x):
        s = x.sum(1)
        return (s**2 - (x**2).sum(1)).sum(1) + s.sum(1)

    done = fused(how, FuseFm(measure=False))
    assert len(done.nodes("fm")) == 1 and len(done.nodes("sum")) == 2


NEGATIVE = {
    "two things": lambda m, rows, x: x.sum(1) ** 2 - ((x + 1) ** 2).sum(1),
    "cubes": lambda m, rows, x: x.sum(1) ** 3 - (x**3).sum(1),
    "other dimensions": lambda m, rows, x: x.sum(1) ** 2 - (x**2).sum(2).sum(1, keepdim=True),
    "mean": lambda m, rows, x: x.mean(1) ** 2 - (x**2).mean(1),
    "one term more": lambda m, rows, x: (rows[0] + rows[1] + rows[2]) ** 2 - sum(r * r for r in rows),
    "a matrix": lambda m, rows, x: rows[0].sum(1) ** 2 - (rows[0] ** 2).sum(1),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_look_alikes_stay(name):
    done = fused(NEGATIVE[name], FuseFm(measure=False))
    assert not done.records and not done.nodes("fm")


def test_in_place_writes_are_respected():
    plain = rewrite(Lookups(PER_COLUMN["half after"]), (IDS,), FuseFm(measure=False))
    graph = copy_graph(plain.before)
    x, power = next(n for n in graph.nodes if n.name == "stack"), next(n for n in graph.nodes if n.name == "pow_2")
    Editor(graph, "test").call(torch.ops.aten.mul_.Tensor, x, 2.0, before=power, sources=[x])
    done = again(plain.shell, graph, plain.leaves, FuseFm(measure=False))
    (found,) = done.records
    assert found.status == "SKIPPED" and "is written to in place by mul_" in found.reason and not done.nodes("fm")


def test_a_sum_that_goes_over_the_batch_is_left_outside():
    done = fused(lambda m, rows, x: (x.sum(1) ** 2 - (x**2).sum(1)).sum(0), FuseFm(measure=False))
    assert len(done.nodes("fm")) == 1 and len(done.nodes("sum")) == 1


def test_without_shapes_nothing_is_found():
    assert not rewrite(Lookups(PER_COLUMN["half after"]), None, FuseFm(measure=False)).nodes("fm")


@pytest.mark.parametrize("gain, status", [(2.0, "APPLIED"), (0.5, "SKIPPED")])
def test_what_is_measured_decides(monkeypatch, gain, status):
    monkeypatch.setattr(measure, "_time", lambda modules, inputs: measure.Timing(gain * 1e-3, 1e-3, measure.ROWS))
    done = rewrite(Lookups(PER_COLUMN["half after"]), (IDS,), FuseFm())
    (found,) = done.records
    assert found.status == status and bool(done.nodes("fm")) == (status == "APPLIED")
    assert status == "APPLIED" or found.reason.startswith("measured on 2048 rows: the rewrite takes 1000 us and the plain ops 500 us")


def test_the_budget_is_kept():
    done = rewrite(Lookups(PER_COLUMN["half after"]), (IDS,), FuseFm(measure=False), budget=0)
    assert [r.status for r in done.records] == ["DISABLED"] and not done.nodes("fm")
