"""A sample in which sizes happen to be equal, or 1, says nothing of batches in which they are not: those are captured anew."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
from torch import nn


class Ranker(nn.Module):
    """Separate ids of user and item; serving scores many items for one user."""

    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(30, 8), nn.Embedding(30, 8)

    def forward(self, user, item):
        u, v = self.user(user), self.item(item)
        return (u * v).sum(1) + (u + v).pow(2).sum(1)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 8)

    def forward(self, ids, weights):
        return (self.table(ids) * weights.unsqueeze(-1)).sum(1)


class Same(nn.Module):
    """How often each id of a row stands in it, times its rows: a product, not a pooled sum, unless the length is 1."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 8)

    def forward(self, ids):
        return torch.bmm((ids[:, :, None] == ids[:, None, :]).float(), self.table(ids)).sum(-1)


def ids(*shape):
    return torch.randint(30, shape)


@pytest.mark.parametrize("sample", [6, 1])
def test_one_user_and_many_items(sample):
    model = Ranker()
    opt = tw.optimize(model, sample_inputs=(ids(sample), ids(sample)))
    for users, items in ((6, 6), (1, 6), (4, 4), (1, 1), (1, 9), (6, 1), (0, 0)):
        batch = ids(users), ids(items)
        torch.testing.assert_close(opt(*batch), model(*batch))
    assert len(opt._variants) <= 4


@pytest.mark.parametrize("shapes", [((4, 5), (1, 5)), ((4, 5), (4, 1)), ((1, 5), (4, 5)), ((1, 1), (1, 1)), ((2, 7), (2, 7)), ((0, 5), (0, 5))])
@pytest.mark.parametrize("sample", [(4, 5), (1, 5), (4, 1), (5, 5)])
def test_weights_that_broadcast(sample, shapes):
    model = Masked()
    opt = tw.optimize(model, sample_inputs=(ids(*sample), torch.rand(sample)))
    batch = ids(*shapes[0]), torch.rand(shapes[1])
    torch.testing.assert_close(opt(*batch), model(*batch))


@pytest.mark.parametrize("sample", [(4, 1), (1, 1), (4, 4)])
def test_a_sequence_of_length_one(sample):
    model = Same()
    opt = tw.optimize(model, sample_inputs=(ids(*sample),))
    for shape in ((4, 4), (4, 1), (3, 5), (1, 2), (1, 1), (0, 3)):
        batch = ids(*shape)
        torch.testing.assert_close(opt(batch), model(batch))


class Wide(nn.Module):
    """A dense input of any width beside two lookups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(30, 8), nn.Embedding(30, 8)

    def forward(self, a, b, dense):
        return torch.cat([self.a(a), self.b(b), dense], 1)


def test_a_dense_input_of_another_width():
    model = Wide()
    opt = tw.optimize(model, sample_inputs=(ids(4), ids(4), torch.rand(4, 3)))
    for width in (3, 5, 3, 1):
        batch = ids(6), ids(6), torch.rand(6, width)
        torch.testing.assert_close(opt(*batch), model(*batch))
    assert len(opt._variants) == 3
