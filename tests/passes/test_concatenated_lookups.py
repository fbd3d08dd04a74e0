"""Concatenations of looked-up rows: one form, made once, written in place by the launch; the same bits."""

from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from pass_harness import again, assert_same_numbers, assert_sound, rewrite
from tablewright.passes.concatenated_lookups import ConcatenatedLookups
from tablewright.passes.group_tables import GroupTables
from tablewright.passes.pool_sequences import PoolSequences
from torch import nn
from torch.optim import Adagrad

ROWS, DIM = 20, 4


class Fields(nn.Module):
    """``how(model, rows, X)``: four fields are columns of one float tensor, each looked up as ``[batch, 1, DIM]``."""

    def __init__(self, how):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, DIM) for _ in range(4))
        self.linear = nn.Linear(DIM, DIM)
        self.how = how

    def forward(self, x):
        rows = [table(x[:, i : i + 1].long()) for i, table in enumerate(self.tables)]
        result = self.how(self, rows, x)
        return [r * 1.5 for r in result] if isinstance(result, tuple) else result * 1.5


def batch(size=6, seed=0):
    return torch.randint(0, ROWS, (size, 6), generator=torch.Generator().manual_seed(seed)).float()


def squeezed(rows):
    return [r.squeeze(1) for r in rows]


FORMS = {  # how, cats left after the launch, slots
    "axis 1": (lambda m, r, x: torch.cat(r, 1), 0, (4 * DIM,)),
    "axis -2": (lambda m, r, x: torch.cat(r, dim=-2), 0, (4 * DIM,)),
    "last axis": (lambda m, r, x: torch.cat(r, -1), 0, (4 * DIM,)),
    "last axis, flat": (lambda m, r, x: torch.flatten(torch.cat(r, dim=-1), start_dim=1), 0, (4 * DIM,)),
    "both": (lambda m, r, x: (torch.cat(r, 1), torch.flatten(torch.cat(r, -1), 1)), 0, (4 * DIM,)),
    "squeezed": (lambda m, r, x: (torch.stack(squeezed(r), 1), torch.cat(squeezed(r), 1)), 0, (4 * DIM,)),
    "flattened": (lambda m, r, x: (torch.cat([e.flatten(1) for e in r], 1), torch.cat(r, 1)), 0, (4 * DIM,)),
    "a run of them": (lambda m, r, x: (torch.cat(r, 1), torch.cat(r[1:3], 1)), 0, (4 * DIM,)),
    "a run, made first": (lambda m, r, x: (torch.cat(r[:2], -1), torch.cat(r, 1)), 0, (4 * DIM,)),
    "with dense columns": (lambda m, r, x: torch.cat([torch.cat(r, -1).flatten(1), x[:, 4:]], 1), 0, (4 * DIM + 2,)),
    "another order": (lambda m, r, x: (torch.cat(r, 1), torch.cat(r[::-1], 1)), 1, (4 * DIM,)),
    "a stack with another tensor": (lambda m, r, x: torch.stack([*squeezed(r), x[:, :DIM]], 1), 0, (5 * DIM,)),
    "a stack with what is made of them": (lambda m, r, x: torch.stack([*squeezed(r), m.linear(r[0].squeeze(1))], 1), 1, (4 * DIM,)),
    "with another tensor": (lambda m, r, x: torch.cat([r[0], r[1], m.linear(r[2])], 1), 1, (2 * DIM, DIM)),
}


@pytest.mark.parametrize(("how", "cats", "slots"), FORMS.values(), ids=FORMS)
def test_forms(how, cats, slots):
    done = rewrite(Fields(how), (batch(),), ConcatenatedLookups())
    assert_sound(done, exact=True)
    if len(slots) == 1:
        assert done.of("APPLIED") and not done.of("SKIPPED")
    grouped = again(done.shell, done.after, done.leaves, GroupTables())
    assert_same_numbers(done.shell, done.before, grouped.after, done.leaves)
    assert grouped.specs[0].slots == slots and len(grouped.nodes("cat")) == cats


@pytest.mark.parametrize(
    "how",
    [
        lambda m, r, x: r[0] + r[1],
        lambda m, r, x: torch.cat([r[0], r[0]], 1),
        lambda m, r, x: torch.cat(r, 0),
        lambda m, r, x: torch.stack(r, 1),
        lambda m, r, x: torch.cat([r[0].relu(), r[1]], 1),
    ],
    ids=["no join", "one twice", "over the batch", "stack of three axes", "one lookup"],
)
def test_left_alone(how):
    done = rewrite(Fields(how), (batch(),), ConcatenatedLookups())
    assert not done.records
    assert [n.name for n in done.after.nodes] == [n.name for n in done.before.nodes]


def test_ids_that_only_the_sample_has_one_of():
    """A traced graph serves ids ``[batch, L]`` of any L: one of them on the sample says nothing."""

    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, DIM)

        def forward(self, i, j):
            return torch.cat([self.a(i), self.b(j)], 1)

    one = torch.tensor([[1], [2], [3]])
    done = rewrite(Sequences(), (one, one), ConcatenatedLookups())
    assert not done.records
    plain = Sequences()
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=(one, one))
    more = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(opt(more, more), plain(more, more))


def test_written_to_in_place():
    done = rewrite(Fields(lambda m, r, x: torch.cat(r, 1).mul_(2)), (batch(),), ConcatenatedLookups())
    assert_sound(done)


def test_returned_concatenations_share_no_memory():
    class Returned(Fields):
        def forward(self, x):
            rows = [table(x[:, i : i + 1].long()) for i, table in enumerate(self.tables)]
            return torch.cat(rows, 1), torch.cat(rows, -1).flatten(1)

    opt = tw.optimize(Returned(None), sample_inputs=(batch(),))
    first, second = opt(batch())
    before = second.clone()
    with torch.no_grad():
        first.mul_(2)
    assert torch.equal(before, second)
    done = rewrite(Returned(None), (batch(),), ConcatenatedLookups())
    assert "is returned" in done.of("SKIPPED")[0].reason
    assert_sound(done, exact=True)


def test_a_part_written_between_two_concatenations():
    """The inner concatenation read it before; it is not spliced into the outer one."""

    def how(m, r, x):
        dense = x[:, 4:] * 1
        inner = torch.cat([m.tables[0](x[:, 0].long()), m.tables[1](x[:, 1].long()), dense], 1)
        dense.view(-1).add_(1)
        return torch.cat([inner, x[:, :1]], 1)

    done = rewrite(Fields(how), (batch(),), ConcatenatedLookups())
    assert_sound(done, exact=True)


def test_columns_of_no_known_number():
    """Exported, the width of what stands beside the rows is a symbol."""

    class Beside(Fields):
        def forward(self, x, more):
            assert not more.is_complex()  # the FX door stops here
            return self.how(self, [t(x[:, :1].long()) for t in self.tables], more)

    x = batch()

    def how(m, r, more):
        flat = torch.cat([r[0][:, 0], r[1][:, 0], more], 1)
        return flat, torch.cat([r[0], r[1], more.unsqueeze(1)], -1), torch.cat(r, 1)

    plain = Beside(how)
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=(x, torch.rand(len(x), 5)))
    assert opt.report.door == "export"
    for width in (5, 3):
        more = torch.rand(len(x), width)
        assert all(map(torch.equal, opt(x, more), plain(x, more)))


def test_a_part_with_columns_of_no_fixed_number():
    """A sample of three columns says nothing of the next batch."""

    class Beside(Fields):
        def forward(self, x, more):
            return self.how(self, [t(x[:, 0].long()) for t in self.tables], more)

    def how(m, r, more):
        cats = torch.cat([r[0], r[1], more, r[2]], 1), torch.cat([r[0], r[1], more], 1), torch.cat(r[:2], 1)
        return [cat * 2 for cat in cats]

    x = batch()
    done = rewrite(Beside(how), (x, torch.rand(len(x), 3)), ConcatenatedLookups())
    assert len(done.nodes("cat")) == 2, "a cat that holds it stays whole; one of lookups alone is a part of another"
    for width in (3, 5):
        assert_same_numbers(done.shell, done.before, done.after, [x, torch.rand(len(x), width)])


def test_pooled_rows_join_plain_ones():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.user, self.items = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, DIM)

        def forward(self, x):
            items = self.items(x[:, 2:].long()).sum(1, keepdim=True)
            rows = [self.user(x[:, :1].long()), items]
            return torch.cat(rows, 1).relu(), torch.cat(rows, -1).flatten(1)

    done = rewrite(Mixed(), (batch(),), PoolSequences())
    assert_sound(done)  # and fills in the shapes
    joined = again(done.shell, done.after, done.leaves, ConcatenatedLookups())
    assert_same_numbers(done.shell, done.before, joined.after, done.leaves)
    grouped = again(done.shell, joined.after, done.leaves, GroupTables())
    assert_same_numbers(done.shell, done.before, grouped.after, done.leaves)
    assert grouped.specs[0].slots == (2 * DIM,) and not grouped.nodes("cat")


def test_a_budget_of_none_changes_nothing():
    done = rewrite(Fields(lambda m, r, x: torch.cat(r, 1)), (batch(),), ConcatenatedLookups(), budget=0)
    assert done.of("DISABLED") and not done.nodes("unflatten")


def test_three_steps():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fields = Fields(lambda m, r, x: (torch.cat(r, 1), torch.cat(r, -1).flatten(1)))
            self.out = nn.Linear(4 * DIM, 1)

        def forward(self, x):
            matrix, flat = self.fields(x)
            return self.out(flat) + (matrix.sum(1) ** 2 - (matrix**2).sum(1)).sum(1, keepdim=True)

    plain = Model()
    model = copy.deepcopy(plain)
    mine, his = (Adagrad(m.parameters(), lr=0.1) for m in (plain, model))
    opt, optim = tw.optimize(model, sample_inputs=(batch(),), optimizer=his, verify="numerics")
    assert opt.report.coverage["concatenations"] == (2, 2) and "2/2 concatenations merged" in str(opt.report)
    for seed, size in enumerate((6, 9, 1)):
        for net, optimizer in ((plain, mine), (opt, optim)):
            optimizer.zero_grad()
            net(batch(size, seed)).square().sum().backward()
            optimizer.step()
    for (name, a), b in zip(plain.named_parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
