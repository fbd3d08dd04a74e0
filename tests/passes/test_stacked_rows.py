"""Stacked lookups that are joined with dense vectors: written by the launch where all are rows of one width, else left as they are."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.group_tables import GroupTables
from torch import nn

IDS = torch.tensor([3, 1, 3, 7])


class Joined(nn.Module):
    """``forward`` is ``how(a(ids), b(ids), x)`` of three ``[4, 5]``, the last made after the lookups."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.bottom = nn.Embedding(9, 5), nn.Embedding(9, 5), nn.Linear(3, 5)
        self.how = how

    def forward(self, ids, x):
        return self.how(self.a(ids), self.b(ids + 1), self.bottom(x))


def joined(how):
    done = rewrite(Joined(how), (IDS, torch.randn(4, 3)), GroupTables())
    assert_sound(done)
    return done


def first(a, b, x):
    return torch.cat([x.unsqueeze(1), torch.stack([a, b], 1)], 1)


def between(a, b, x):
    return torch.cat([a.unsqueeze(1), torch.stack([x, b], -2), x.exp().unsqueeze(-2)], -2)


@pytest.mark.parametrize(("how", "width", "extras"), [(first, 15, 1), (between, 20, 2)])
def test_all_rows_are_written_by_the_launch(how, width, extras):
    done = joined(lambda *given: how(*given).transpose(1, 2))
    assert done.specs[0].slots == (width,) and len(done.specs[0].extras) == extras
    assert not done.nodes("cat") and not done.nodes("stack")
    assert all(f"{extras + 2} written straight" in r.detail for r in done.of("APPLIED"))


def read_twice(a, b, x):
    stack = torch.stack([a, b], 1)
    return torch.cat([x.unsqueeze(1), stack], 1), stack * 2


def written_between(a, b, x):
    x = x * 2
    stack = torch.stack([x, a], 1)
    x[:, 0] = 7
    return torch.cat([stack, b.unsqueeze(1)], 1), x


LEFT = {
    "a stack read twice": read_twice,
    "two dtypes": lambda a, b, x: torch.cat([x.double().unsqueeze(1), torch.stack([a, b], 1)], 1),
    "another dimension": lambda a, b, x: torch.cat([x.unsqueeze(2), torch.stack([a, b], 2)], 2),
    "written to between": written_between,
    "more than vectors": lambda a, b, x: torch.cat([(x * 2).view(4, 1, 5), torch.stack([a, b], 1)], 1),
    "no lookup": lambda a, b, x: torch.cat([x.unsqueeze(1), torch.stack([x, x.exp()], 1)], 1).sum() + a + b,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name):
    done = joined(LEFT[name])
    assert len(done.nodes("cat")) == 1 and not done.specs[0].extras


def test_rows_that_are_read_before_are_joined_as_they_are():
    done = joined(lambda a, b, x: (first(a, b, x), first(a, b, x * a.sum())))
    assert done.specs[0].slots and len(done.specs[0].lookups) == 2
