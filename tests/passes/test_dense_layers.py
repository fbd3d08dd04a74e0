"""Every MLP and dot interaction is in the report, and nothing is changed."""
from __future__ import annotations

import pytest
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.dense_layers import FindDenseLayers
from torch import nn


class Towers(nn.Module):
    """Three layers, a dot interaction, and one layer more."""

    def __init__(self):
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 6))
        self.top = nn.Linear(4, 1)

    def forward(self, x):
        z = self.bottom(x).view(-1, 2, 3)
        return self.top(torch.bmm(z, z.transpose(1, 2)).flatten(1)).sigmoid()


def found(model, *args):
    done = rewrite(model, args, FindDenseLayers())
    assert not done.of("APPLIED") and [n.name for n in done.after.nodes] == [n.name for n in done.before.nodes]
    assert_sound(done, exact=True)
    return [(r.kind, r.subject, r.reason) for r in done.of("SKIPPED")]


def test_chains_and_interactions_are_named():
    rows = found(Towers(), torch.randn(5, 4))
    assert [(kind, subject) for kind, subject, _ in rows] == [("mlps", "bottom.0"), ("interactions", ""), ("mlps", "top")]
    assert [reason.split(" runs")[0] for *_, reason in rows] == [
        "a chain of 3 linear layers", "X times its own transpose", "a chain of 1 linear layers",
    ]  # fmt: skip


class Split(nn.Module):
    """The chain ends where two read its value."""

    def __init__(self):
        super().__init__()
        self.shared, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.shared(x).relu()
        return self.left(x) + self.right(x)


def test_every_linear_layer_is_in_exactly_one_chain():
    """Layers after a fork are counted too: nothing is silent."""
    rows = found(Split(), torch.randn(5, 4))
    layers = sum(int(reason.split()[3]) for kind, _, reason in rows if kind == "mlps")
    assert layers == 3


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
