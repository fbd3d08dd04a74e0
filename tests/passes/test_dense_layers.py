"""Every dot interaction is in the report, and nothing is changed."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.dense_layers import FindDenseLayers
from torch import nn


def found(model, *args):
    done = rewrite(model, args, FindDenseLayers())
    assert not done.of("APPLIED") and [n.name for n in done.after.nodes] == [n.name for n in done.before.nodes]
    assert_sound(done, exact=True)
    return [(r.kind, r.subject, r.reason) for r in done.of("SKIPPED")]


class Gram(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(x)


@pytest.mark.parametrize(
    ("how", "count"),
    [
        (lambda x: torch.bmm(x, x.permute(0, 2, 1)), 1),
        (lambda x: x @ x.transpose(-1, -2), 1),
        (lambda x: x @ x.mT, 1),
        (lambda x: x @ (x + 1).mT, 0),
        (lambda x: x.mT @ x, 1),
        (lambda x: torch.einsum("bie,bje->bij", x, x), 1),
        (lambda x: torch.einsum("bie,bje->bij", x, x + 1), 0),
    ],
    ids=["bmm", "matmul", "mT", "two things", "transposed first", "einsum", "einsum of two things"],
)
def test_forms_of_the_interaction(how, count):
    assert len(found(Gram(how), torch.randn(2, 3, 4))) == count
