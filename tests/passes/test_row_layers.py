"""Layers over a sequence as one call: transformers' feed-forward layers, attention units, and what stays."""
from __future__ import annotations

import pytest
import torch
from pass_harness import again, assert_same_numbers, assert_sound, rewrite
from tablewright.passes import dense_chains
from tablewright.passes.dense_chains import DenseChains
from tablewright.passes.measure import Timing
from tablewright.passes.row_layers import RowLayers
from tablewright.rewriter.verify import check_structure
from torch import nn

FUSE = RowLayers(measure=False)


def names(done):
    return [n.args[3] for n in done.nodes("row_layers")]


SPELLINGS = {
    "gelu": (nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)), "gelu,none"),
    "gelu, tanh": (nn.Sequential(nn.Linear(6, 24), nn.GELU("tanh"), nn.Linear(24, 6)), "gelu_tanh,none"),
    "relu": (nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6, bias=False)), "relu,none"),
    "silu": (nn.Sequential(nn.Linear(6, 24), nn.SiLU(), nn.Linear(24, 6)), "silu,none"),
    "attention unit": (nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()), "sigmoid,tanh,sigmoid"),
    "nothing between": (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)), "none,none"),
}  # fmt: skip


@pytest.mark.parametrize("rows", [5, 1, 0])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name, rows):
    model, wanted = SPELLINGS[name]
    done = rewrite(model, (torch.randn(rows, 3, 6),), FUSE)
    assert names(done) == [wanted] and len(done.of("APPLIED")) == len(done.records) == 1
    assert not done.nodes("linear") and "some rows at a time" in done.records[0].detail
    assert_sound(done)


def test_behind_dense_chains(monkeypatch):
    """Which puts the activation into the call of its product, or says that an input is the result of a ReLU."""
    monkeypatch.setattr(dense_chains, "LEAST_WORK", 0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 24), nn.ReLU(), nn.Linear(24, 6), nn.GELU(), nn.Linear(6, 2))
    done = rewrite(model, (torch.randn(4, 3, 6),), DenseChains(measure=False))
    assert done.nodes("dense")
    done = again(done.shell, done.after, done.leaves, FUSE)
    assert names(done) == ["relu,relu,gelu,none"] and not done.nodes("dense")
    check_structure(done.before, done.after, done.shell)
    assert_same_numbers(done.shell, done.before, done.after, done.leaves)


class Reads(nn.Module):
    """The layer between is read twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        h = self.a(x).relu()
        return self.b(h), h


class Written(Reads):
    def forward(self, x):
        h = self.a(x)
        h.add_(1)
        return self.b(h)


class Residual(Reads):
    def forward(self, x):
        return self.b(self.a(x).sigmoid() + 1)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (SPELLINGS["gelu"][0], torch.randn(4, 6)),
        (nn.Linear(6, 8), torch.randn(4, 3, 6)),
        (Reads(), torch.randn(4, 3, 6)),
        (Written(), torch.randn(4, 3, 6)),
        (Residual(), torch.randn(4, 3, 6)),
        (SPELLINGS["gelu"][0], None),
    ],
    ids=["no sequence", "one layer", "read twice", "written to", "more between", "no inputs"],
)
def test_look_alikes_stay(model, x):
    done = rewrite(model, None if x is None else (x,), FUSE)
    assert not done.records and not done.nodes("row_layers")


def test_skips_and_budget():
    double = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).double()
    done = rewrite(double, (torch.randn(4, 3, 6, dtype=torch.float64),), FUSE)
    assert "not all float32" in done.of("SKIPPED")[0].reason and not done.nodes("row_layers")
    assert len(rewrite(SPELLINGS["gelu"][0], (torch.randn(4, 3, 6),), FUSE, budget=0).of("DISABLED")) == 1


def test_what_is_not_faster_is_left(monkeypatch):
    monkeypatch.setattr("tablewright.passes.measure.time_both", lambda *args: Timing(1.0, 1.0, 4))
    done = rewrite(SPELLINGS["gelu"][0], (torch.randn(4, 3, 6),), RowLayers())
    assert "must be 1.05x faster" in done.of("SKIPPED")[0].reason and not done.nodes("row_layers")
