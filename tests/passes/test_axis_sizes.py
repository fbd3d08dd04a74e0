"""Sizes of the sample that are equal, or 1, by accident: what a pooled sequence does on batches where they are not."""

from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from pass_harness import rewrite
from tablewright.passes.axis_sizes import axis_source
from tablewright.passes.pool_sequences import PoolSequences
from torch import nn

ROWS, DIM = 20, 4


class Summed(nn.Module):
    """``how(e(ids), ids)``."""

    def __init__(self, how):
        super().__init__()
        self.e = nn.Embedding(ROWS, DIM)
        self.how = how

    def forward(self, ids, *more):
        return self.how(self.e(ids), ids, *more)


VIEWS_BY_ACCIDENT = {  # on a sample where all sizes are DIM, these do nothing to the rows
    "columns first": lambda e, i: e.reshape(i.shape[0], DIM, -1).sum(1),
    "batch and length": lambda e, i: e.reshape(i.shape[1], i.shape[0], DIM).sum(1),
    "length first": lambda e, i: e.reshape(-1, i.shape[0], DIM).sum(1),
    "squeezed, unless there are more": lambda e, i: e.squeeze(1).sum(1),
    "all squeezed": lambda e, i: e.squeeze().sum(1),
    "flat": lambda e, i: e.flatten(0, 1).view(DIM, -1, DIM).sum(1),
}
VIEWS = {  # and these never do
    "all named": lambda e, i: e.view(i.shape[0], i.size(1), DIM).sum(1),
    "its own sizes": lambda e, i: e.view(e.size(0), e.size(1), e.size(2)).sum(1),
    "the rest": lambda e, i: e.reshape(-1, i.shape[1], DIM).sum(1),
    "between": lambda e, i: e.reshape(i.shape[0], -1, DIM).unsqueeze(1).flatten(1, 2).sum(1),
    "one more": lambda e, i: e.reshape(i.shape[0], 1, -1, DIM).squeeze(1).sum(1),
}


def same_on_other_sizes(how, sample, *inputs):
    plain = Summed(how)
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=sample)
    for more in (sample, *inputs):
        torch.testing.assert_close(opt(*more), plain(*more))
    return opt.report.coverage.get("pooled")


def ids_of(*sizes):
    return torch.randint(0, ROWS, sizes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", VIEWS_BY_ACCIDENT.values(), ids=VIEWS_BY_ACCIDENT)
def test_views_that_the_sample_makes_look_harmless(how):
    others = [(ids_of(DIM, 2),), (ids_of(2, DIM),), (ids_of(3, 3),), (ids_of(DIM, 1),)]
    fit = [i for i in others if _works(how, i)]
    assert fit and not same_on_other_sizes(how, (ids_of(DIM, DIM),), *fit)


def _works(how, inputs):
    try:
        Summed(how)(*inputs)
    except (RuntimeError, IndexError):
        return False
    return True


@pytest.mark.parametrize("how", VIEWS.values(), ids=VIEWS)
def test_views_on_any_sizes(how):
    others = [(ids_of(*sizes),) for sizes in ((DIM, 2), (2, DIM), (3, 3), (DIM, 1), (1, 5))]
    assert same_on_other_sizes(how, (ids_of(DIM, DIM),), *others) == (1, 1)


def test_a_size_of_another_input():
    def how(e, i, other):
        return e.reshape(other.shape[0], -1, DIM).sum(1)

    assert not same_on_other_sizes(how, (ids_of(4, 3), ids_of(4)), (ids_of(4, 3), ids_of(2)))


def test_sizes_of_what_the_ids_are_made_from():
    class Fields(Summed):
        def forward(self, x):
            e = self.e(x[:, 1:].long() + x.new_tensor([[0, 10]]))
            return e.view(x.size(0), -1, e.size(-1)).sum(1)

    plain = Fields(None)
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=(ids_of(3, 3) % 10,))
    assert opt.report.coverage["pooled"] == (1, 1)
    torch.testing.assert_close(opt(ids_of(5, 3) % 10), plain(ids_of(5, 3) % 10))


def test_rows_that_a_weight_repeats():
    """A batch of one is weighted in many ways."""
    how, many = lambda e, i, w: (e * w.unsqueeze(-1)).sum(1), (ids_of(5, 3), torch.rand(5, 3))
    assert same_on_other_sizes(how, many, (ids_of(1, 3), torch.rand(5, 3)), (ids_of(5, 1), torch.rand(5, 3))) == (1, 1)
    assert not rewrite(Summed(how), (ids_of(1, 3), torch.rand(5, 3)), PoolSequences()).of("APPLIED")


def test_a_mask_of_the_first_position_and_no_positions():
    how = lambda e, i: (e * (i[:, :1] != 0)[:, :, None]).sum(1)  # noqa: E731
    assert same_on_other_sizes(how, (ids_of(4, 4),), (ids_of(3, 0),), (ids_of(3, 1),), (ids_of(0, 2),)) == (1, 1)


def test_bags_as_long_as_the_sample_is_wide():
    """Four ids a bag, whatever the width of the matrix they are in."""

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.EmbeddingBag(ROWS, DIM)

        def forward(self, ids):
            return self.e(ids.reshape(-1), torch.arange(0, 12, 4))

    plain = Bags()
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=(ids_of(3, 4),))
    for i in (ids_of(3, 4), ids_of(4, 3), ids_of(2, 6)):
        torch.testing.assert_close(opt(i), plain(i))


SOURCES = {  # (a value made of x [3, 5] and y [4], axis of the value, axis of x)
    "cast": (lambda x, y: x.float(), 1, 1),
    "column": (lambda x, y: x[:, 2], 0, 0),
    "row": (lambda x, y: x[2], 0, 1),
    "slice of the other": (lambda x, y: x[1:], 1, 1),
    "slice": (lambda x, y: x[1:], 0, None),
    "transposed": (lambda x, y: x.t(), 0, 1),
    "permuted": (lambda x, y: x[:, None].permute(2, 0, 1), 0, 1),
    "unsqueezed": (lambda x, y: x.unsqueeze(0) * 2, -1, 1),
    "put there": (lambda x, y: x.unsqueeze(0), 0, None),
    "sum with a row": (lambda x, y: x + x[0][None], 0, 0),
    "sum with itself": (lambda x, y: x + x[0][None], 1, None),
    "of two": (lambda x, y: x[:, :1] + y[None, :], 1, None),
    "outer": (lambda x, y: x[:, :, None] + y[None, None, :], 1, 1),
}


@pytest.mark.parametrize(("how", "axis", "expected"), SOURCES.values(), ids=SOURCES)
def test_where_a_size_comes_from(how, axis, expected):
    class Model(nn.Module):
        def forward(self, x, y):
            return how(x, y)

    graph = rewrite(Model(), (torch.ones(3, 5), torch.ones(4)), PoolSequences()).before
    x, *_ = graph.nodes
    (output,) = graph.find_nodes(op="output")
    (value,) = output.all_input_nodes
    source = axis_source(value, axis)
    assert source == (x, expected) if expected is not None else source[0] is not x
