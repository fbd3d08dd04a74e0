"""Equal computations of the inputs are made once; what trains, is random, is written or returned is not shared."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.share_repeats import ShareRepeats
from torch import nn


class Twice(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Embedding(20, 4), nn.Embedding(20, 1)
        self.register_buffer("offsets", torch.tensor([0, 5]))
        self.how = how

    def forward(self, x):
        return self.how(self, x)


def written(x):
    x[:, 0] = 1
    return x


X = torch.tensor([[1.0, 2], [3, 4], [1, 7]])


def test_columns_of_ids_and_masks():
    def how(m, x):
        first, second = (m.a(x[:, 1].long()), m.b(x[:, 1].long()))
        return (first * (x[:, 0:1] != 1)).sum() + (second * (x[:, 0:1] != 1)).sum()

    done = rewrite(Twice(how), (X,), ShareRepeats())
    assert_sound(done, exact=True)
    assert len(done.of("APPLIED")) == 2
    assert len(done.nodes("to")) == len(done.nodes("select")) == len(done.nodes("ne")) == len(done.nodes("slice")) == 1


def test_offsets_in_a_buffer():
    done = rewrite(Twice(lambda m, x: m.a(x.long() + m.offsets).sum() + m.b(x.long() + m.offsets).sum()), (X,), ShareRepeats())
    assert_sound(done, exact=True)
    assert len(done.nodes("add")) == 2, "one of ids, one of results"


@pytest.mark.parametrize(
    "how",
    [
        lambda m, x: m.a(x.long()).relu().sum() + m.a(x.long() + 1).relu().sum() * m.a.weight.exp().sum() * m.a.weight.exp().sum(),
        lambda m, x: torch.rand(3) + torch.rand(3) + m.a.weight.sum(),
        lambda m, x: written(x * 2) + (x * 2) + m.a.weight.sum(),
        lambda m, x: (x * 2, x * 2, m.a.weight.sum()),
        lambda m, x: (x * 2).sum() + (x * 2.0).sum() + m.a.weight.sum(),
    ],
    ids=["trained", "random", "written", "returned", "another type of number"],
)
def test_left_apart(how):
    done = rewrite(Twice(how), (X,), ShareRepeats())
    counts = [sum(n.op == "call_function" for n in g.nodes) for g in (done.before, done.after)]
    assert counts[0] - counts[1] in (0, len(done.of("APPLIED")))
    for name in ("exp", "rand", "mul"):
        assert len(done.nodes(name)) == sum(name in n.name.split("_") for n in done.before.nodes), name


def test_a_budget_of_none_changes_nothing():
    done = rewrite(Twice(lambda m, x: m.a(x.long()).sum() + m.b(x.long()).sum()), (X,), ShareRepeats(), budget=0)
    assert done.of("DISABLED") and len(done.nodes("to")) == 2


def test_a_value_written_between_two_readers():
    def how(m, x):
        y = x * 2
        first = y + 1
        y.view(-1).mul_(3)
        return first.sum() + (y + 1).sum() + m.a.weight.sum()

    done = rewrite(Twice(how), (X,), ShareRepeats())
    assert not done.of("APPLIED")
    assert_sound(done, exact=True)
