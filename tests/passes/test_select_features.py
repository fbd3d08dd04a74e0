"""Constant features of a row, taken as whole rows; what is no such list stays."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.measure import Timing
from tablewright.passes.select_features import SelectFeatures
from torch import nn

TAKE = SelectFeatures(measure=False)


class Takes(nn.Module):
    """``of(x)`` of a trained ``[batch, 4, 3]``; a list of features is a buffer or stands in the code."""

    def __init__(self, of):
        super().__init__()
        self.line, self.of = nn.Linear(12, 12), of
        self.register_buffer("kept", torch.tensor([0, 2, 2, 1]))

    def forward(self, x):
        return self.of(self, self.line(x).tanh().view(-1, 4, 3))


HOWS = {
    "buffer": (lambda m, x: x[:, m.kept], 1),
    "list": (lambda m, x: x[:, [3, 3, 0]] * x[:, [1, 0, 0]].sqrt().nan_to_num(), 2),
    "last dimension": (lambda m, x: x[:, :, [2, 0]], 1),
    "made of a buffer": (lambda m, x: x.sum(2)[:, m.kept + 1], 1),
    "int32": (lambda m, x: x[:, m.kept.int()], 1),
    "none": (lambda m, x: torch.cat([x[:, m.kept[:0]], x], 1), 1),
}


@pytest.mark.parametrize("rows", [5, 1, 0])
@pytest.mark.parametrize("name", HOWS)
def test_spellings(name, rows):
    of, count = HOWS[name]
    torch.manual_seed(0)
    done = rewrite(Takes(of), (torch.randn(rows, 12),), TAKE)
    assert len(done.nodes("index_select")) == len(done.of("APPLIED")) == len(done.records) == count and not done.nodes("index")
    assert_sound(done)


@pytest.mark.parametrize(
    "of",
    [
        lambda m, x: x[m.kept],
        lambda m, x: x[:, m.kept, m.kept[:1]],
        lambda m, x: x[:, m.kept.view(2, 2)],
        lambda m, x: x[:, [-1, 0]],
        lambda m, x: x[:, m.kept > 0],
        lambda m, x: x[:, x.detach()[0, 0].abs().long()],
        lambda m, x: m.kept.expand(5, 4)[:, [0, 1]] + x.sum((1, 2))[:, None],
    ],
    ids=["rows", "two lists", "a table of places", "from the end", "a mask", "of the data", "integers"],
)
def test_look_alikes_stay(of):
    done = rewrite(Takes(of), (torch.randn(5, 12),), TAKE)
    assert not done.records and not done.nodes("index_select")
    assert not rewrite(Takes(HOWS["buffer"][0]), None, TAKE).records


def test_a_place_that_becomes_negative_is_an_error():
    model = Takes(HOWS["buffer"][0])
    done = rewrite(model, (torch.randn(5, 12),), TAKE)
    (node,) = done.nodes("index_select")
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        node.target(torch.randn(5, 4, 3), node.args[1], torch.tensor([0, -1]))


def test_budget_and_what_is_not_faster(monkeypatch):
    model, x = Takes(HOWS["list"][0]), (torch.randn(5, 12),)
    assert len(rewrite(model, x, TAKE, budget=1).of("DISABLED")) == 1
    monkeypatch.setattr("tablewright.passes.measure.time_both", lambda *args: Timing(1.0, 1.0, 5))
    done = rewrite(model, x, SelectFeatures())
    assert len(done.of("SKIPPED")) == 2 and "must be 1.05x faster" in done.records[0].reason and not done.nodes("index_select")
