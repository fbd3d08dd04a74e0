"""The measurement behind ``tablewright coverage``: what it finds, and that it sees a wrong rewrite."""
from __future__ import annotations

import copy
import math

import pytest
import torch
from small_models import Dot, Tied, dot_batch, tied_batch
from tablewright.rewriter import coverage
from tablewright.rewriter.coverage import Case, measure, without_dropout
from torch import nn


class Failing(nn.Module):
    def forward(self, x):
        raise KeyError("no such feature")


class Bent(nn.Module):
    """Uses its batch norm bias for nothing: the linear bias before it has a gradient that is rounding only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, ids):
        return self.layers(self.table(ids))


def dot_case(**options) -> Case:
    torch.manual_seed(0)
    return Case(Dot(**options), [dot_batch(5), dot_batch(9, seed=1)])


def test_a_rewritten_model_is_found_equal_and_its_rewrites_are_counted():
    row = measure("dot", dot_case(dropout=0.5))
    assert row.ok and row.state == "one graph" and row.kinds["lookups"] == (3, 3)
    assert max(row.outputs, row.gradients, row.steps) < 1e-5
    assert not row.why and row.door in ("fx", "export") and row.seconds > 0


def test_the_model_given_is_not_changed():
    case = dot_case(dropout=0.5)
    before = copy.deepcopy(case.model.state_dict())
    measure("dot", case, speed=True, seconds=0.01)
    assert all(torch.equal(before[n], w) for n, w in case.model.state_dict().items())
    assert case.model.over[2].p == 0.5 and all(p.grad is None for p in case.model.parameters())
    assert not any(m.sparse for m in case.model.modules() if isinstance(m, nn.Embedding))


def test_tied_tables_and_two_dtypes():
    assert measure("tied", Case(Tied(), [tied_batch(6), tied_batch(9, seed=1)], all_batches=True)).ok


@pytest.mark.parametrize("part", ["outputs", "gradients", "steps"])
def test_wrong_numbers_are_seen(monkeypatch, part):
    real = coverage._optimized

    def broken(model, case, plan):
        opt, optim = real(model, case, plan)
        if part == "outputs":
            opt.register_forward_hook(lambda m, args, out: out + 1e-3)
        elif part == "gradients":
            opt.get_parameter("item.weight").register_hook(lambda g: g * 1.01)
        else:
            optim.param_groups[0]["lr"] *= 1.01
        return opt, optim

    monkeypatch.setattr(coverage, "_optimized", broken)
    row = measure("dot", dot_case())
    assert not row.ok and row.wrong
    said = " ".join(row.wrong)
    assert {"outputs": "output 0", "gradients": "gradient of item.weight", "steps": "after three steps"}[part] in said


def test_a_batch_size_that_was_baked_in_is_seen(monkeypatch):
    real = coverage._optimized

    def broken(model, case, plan):
        opt, optim = real(model, case, plan)
        opt.register_forward_hook(lambda m, args, out: out * (5 / len(out)))
        return opt, optim

    monkeypatch.setattr(coverage, "_optimized", broken)
    row = measure("dot", dot_case())
    assert row.wrong and all("batch 9" in w for w in row.wrong if w.startswith("output"))


def test_a_difference_that_is_rounding_only_is_excused(monkeypatch):
    monkeypatch.setattr(coverage, "EPS", 1e-10)  # so that AdaGrad moves by the whole learning rate on a gradient of 1e-9
    torch.manual_seed(0)
    plain = Bent()
    case = Case(plain, [(torch.randint(0, 20, (6,)),), (torch.randint(0, 20, (9,)),)])
    noise = coverage._sensitivity(case)[2]
    assert max(e for e, _ in noise) > coverage.STEPS
    assert measure("bent", case).ok


def test_a_model_that_does_not_run_is_told_apart_from_one_that_cannot_be_captured():
    row = measure("failing", Case(Failing(), [torch.zeros(3)]))
    assert row.state == "does not run" and not row.ok and "no such feature" in row.why
    assert "test_coverage.py" in row.why


def test_an_error_of_optimize_becomes_the_row(monkeypatch):
    def refuse(*args, **kwargs):
        raise coverage.TablewrightError("cannot")

    monkeypatch.setattr(coverage, "optimize", refuse)
    row = measure("dot", dot_case())
    assert row.state == "not captured" and "cannot" in row.why and not row.ok


def test_speed_has_both_sides():
    row = measure("dot", dot_case(), check=False, speed=True, seconds=0.05)
    assert math.isnan(row.outputs)
    s = row.speed
    assert s["dense_ratio"] == pytest.approx(s["plain_ms"] / s["ours_ms"]) and s["sparse_ratio"] > 0


def test_dropout_is_set_to_zero_wherever_its_rate_is_kept():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout_rate, self.dropouts, self.drop, self.p = 0.3, (0.1, 0.2), nn.Dropout(0.4), 2.0

    model = without_dropout(Own())
    assert (model.dropout_rate, model.dropouts, model.drop.p, model.p) == (0.0, (0.0, 0.0), 0.0, 2.0)


def test_a_model_that_needs_its_dropout_to_be_trained_keeps_it():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.bias = nn.Embedding(20, 8), nn.Embedding(20, 1)
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5))

        def forward(self, ids):
            x = self.layers(self.table(ids))
            x += self.bias(ids)  # of the ReLU's own result, where dropout is 0 or the mode is eval
            return x

    row = measure("in place", Case(InPlace(), [torch.arange(6), torch.arange(9)]))
    assert row.ok and row.state == "one graph" and max(row.outputs, row.gradients, row.steps) < 1e-5, row
    assert any("its dropout" in note for note in row.notes)


def test_the_worst_capture_says_how_a_model_runs():
    assert coverage.state_of(["fx"], 1) == ("one graph", 1)
    assert coverage.state_of(["dynamo, in pieces"], 1) == ("pieces", 1)
    assert coverage.state_of(["export", "none"], 1) == ("plain", 0)
