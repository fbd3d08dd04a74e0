"""Softmax of short rows: where it is taken, and where the rows are long or not the last dimension."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.short_softmax import ShortSoftmax
from torch import nn
from torch.nn import functional as F

FUSE = ShortSoftmax(measure=False)


class Attention(nn.Module):
    """Over fields, over a sequence with a last dimension of 1, and over experts. (A bias before a softmax has no gradient but rounding.)"""

    def __init__(self):
        super().__init__()
        self.score, self.gate = nn.Linear(8, 1, bias=False), nn.Linear(8, 3)

    def forward(self, x):
        fields = torch.bmm(x, x.transpose(1, 2)).softmax(-1) @ x
        pooled = (F.softmax(self.score(fields), dim=1) * fields).sum(1)
        return pooled * F.softmax(self.gate(pooled), 1)[:, :1]


@pytest.mark.parametrize("rows", [5, 1, 0])
def test_attention(rows):
    torch.manual_seed(0)
    done = rewrite(Attention(), (torch.randn(rows, 6, 8),), FUSE)
    assert len(done.of("APPLIED")) == 3 and len(done.nodes("softmax_rows")) == 3 and not done.nodes("softmax")
    assert_sound(done)


class Over(nn.Module):
    def __init__(self, dim, dtype=None):
        super().__init__()
        self.dim, self.dtype = dim, dtype

    def forward(self, x):
        return torch.softmax(x, self.dim, dtype=self.dtype)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Over(-1), torch.randn(4, 65)),
        (Over(1), torch.randn(4, 5, 2)),
        (Over(0), torch.randn(4, 5)),
        (Over(-1, torch.float64), torch.randn(4, 5)),
        (Over(-1), torch.randn(4, 5, dtype=torch.bfloat16)),
    ],
    ids=["long rows", "columns", "over the batch", "casts first", "bfloat16"],
)
def test_look_alikes_stay(model, x):
    done = rewrite(model, (x,), FUSE)
    assert not done.records and not done.nodes("softmax_rows")


def test_a_size_that_was_1_by_accident():
    """Traced on a last dimension of 1, run on another: what is behind ``dim`` is looked at in each call."""
    done = rewrite(Over(1), (torch.randn(4, 5, 1),), FUSE)
    (node,) = done.nodes("softmax_rows")
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(node.target(x, *node.args[1:]), torch.softmax(x, 1))


def test_budget_and_missing_inputs():
    assert len(rewrite(Attention(), (torch.randn(4, 6, 8),), FUSE, budget=1).of("DISABLED")) == 2
    assert not rewrite(Attention(), None, FUSE).records
