"""Maxima over a sequence and ``nn.EmbeddingBag(mode="max")``: the plain numbers, gradients, ties and steps, in every spelling."""
from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from pass_harness import assert_sound, rewrite
from tablewright.kernels.max_pool.op import OP
from tablewright.passes.pool_sequences import PoolSequences
from torch import nn
from torch.nn import functional as F
from torch.optim import Adagrad

ROWS, DIM, LENGTH = 20, 4, 5


class Pooled(nn.Module):
    """``how(e(ids), ids)``; some rows are equal, so that several values are the largest."""

    def __init__(self, how, padding_idx=None, **options):
        super().__init__()
        self.e = nn.Embedding(ROWS, DIM, padding_idx=padding_idx, **options)
        nn.init.normal_(self.e.weight)
        with torch.no_grad():
            self.e.weight[5:8] = self.e.weight[4]
        self.how = how

    def forward(self, ids):
        return self.how(self.e(ids), ids) * 1.5


def batch(size=6, seed=0):
    """Padded with 0; one sequence is nothing but padding, one only of equal rows."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, ROWS, (size, LENGTH), generator=g)
    lengths = torch.randint(1, LENGTH + 1, (size, 1), generator=g)
    ids = ids * (torch.arange(LENGTH) < lengths)
    ids[0], ids[-1] = 0, torch.tensor([7, 6, 5, 4, 4])
    return ids


def mask(ids):
    return (ids != 0).unsqueeze(2)


SPELLINGS = {
    "max": lambda e, i: e.max(1)[0],
    "max, values, kept": lambda e, i: torch.max(e, dim=-2, keepdim=True).values,
    "amax": lambda e, i: e.amax(dim=1),
    "amax of a list": lambda e, i: torch.amax(e, [1], keepdim=True).squeeze(1),
    "of the transposed": lambda e, i: e.transpose(1, 2).max(-1).values,
    "of the permuted": lambda e, i: e.permute(1, 0, 2).contiguous().amax(0),
    "masked_fill": lambda e, i: e.masked_fill(~mask(i), -1e9).max(1)[0],
    "masked_fill, eq, amax": lambda e, i: e.masked_fill((i == 0)[:, :, None], -1e9).amax(1),
    "masked_fill, expanded": lambda e, i: e.masked_fill(~mask(i).expand_as(e), -1e9).amax(1),
    "masked_fill, by length": lambda e, i: e.masked_fill(torch.arange(LENGTH)[None, :, None] >= (i != 0).sum(1)[:, None, None], -7.0).amax(1),
    "where, scalar": lambda e, i: torch.where(mask(i), e, -1e9).max(dim=1)[0],
    "where, tensor": lambda e, i: torch.where(mask(i), e, torch.full_like(e, -1e9)).amax(1),
    "where, inverted": lambda e, i: torch.where((i == 0).unsqueeze(-1), torch.full_like(e, -3.0), e).amax(1),
    "lowered (DeepCTR, RecBole)": lambda e, i: torch.max(e - (1 - mask(i).float()) * 1e9, dim=1, keepdim=True)[0],
    "lowered, repeated": lambda e, i: (e - (1 - torch.repeat_interleave(mask(i).float(), DIM, dim=2)) * 1e9).max(1)[0],
    "raised": lambda e, i: ((mask(i).float() - 1) * 1e9 + e).amax(1),
    "times the mask": lambda e, i: (e * mask(i)).max(1)[0],
    "filled with zeros": lambda e, i: e.masked_fill(~mask(i), 0.0).amax(1),
    "mean and max": lambda e, i: torch.cat([e.mean(1), e.max(1)[0]], -1),
    "masked sum and max": lambda e, i: torch.cat([(e * mask(i)).sum(1), e.masked_fill(~mask(i), -1e9).amax(1)], -1),
    "max of two kinds": lambda e, i: e.max(1)[0] * e.amax(1),
}


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("how", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(how, padding_idx):
    done = rewrite(Pooled(how, padding_idx), (batch(),), PoolSequences())
    assert done.nodes("embedding_max") and not done.nodes("embedding") and not done.of("SKIPPED")
    assert {r.kind for r in done.of("APPLIED")} == {"pooled", "lookups"}
    assert_sound(done)


@pytest.mark.parametrize("size", [0, 1, 9])
def test_another_batch(size):
    model = Pooled(SPELLINGS["masked_fill"], 0)
    opt = tw.optimize(model, optimizer=None, sample_inputs=(batch(),))
    ids = batch(size, 3) if size > 1 else torch.randint(0, ROWS, (size, LENGTH))
    torch.testing.assert_close(opt(ids), model(ids))
    longer = torch.randint(0, ROWS, (3, LENGTH + 2))
    torch.testing.assert_close(opt(longer), model(longer))


def test_sequences_of_sequences():
    ids = torch.randint(0, ROWS, (3, 2, 4))
    for how in (lambda e, i: e.amax(2), lambda e, i: e.max(1)[0], lambda e, i: e.masked_fill((i == 0).unsqueeze(3), -9.0).amax(1)):
        done = rewrite(Pooled(how), (ids,), PoolSequences())
        assert_sound(done)
        assert done.nodes("embedding_max")


def test_negative_ids_of_an_indexed_table():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(ROWS, DIM))

        def forward(self, ids):
            return self.w[ids].amax(1) + self.w[ids - ROWS].max(1)[0]

    done = rewrite(Indexed(), (batch(),), PoolSequences())
    assert len(done.nodes("embedding_max")) == 2
    assert_sound(done)


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, DIM, mode="max", **options)

    def forward(self, ids, *offsets):
        return self.bag(ids, *offsets) * 2


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("with_offsets", [False, True])
def test_embedding_bags(padding_idx, with_offsets):
    ids = batch()
    ids[2] = ROWS - 1
    given = (ids,) if not with_offsets else (ids.flatten(), torch.tensor([0, 0, 4, 25, 25]))
    done = rewrite(Bags(padding_idx=padding_idx), given, PoolSequences())
    assert len(done.nodes("embedding_max")) == 1 and not done.nodes("embedding_bag")
    assert [r.kind for r in done.of("APPLIED")] == ["lookups"]
    assert_sound(done)


def test_last_offset_included():
    done = rewrite(Bags(include_last_offset=True), (torch.arange(10), torch.tensor([0, 3, 3, 10])), PoolSequences())
    assert done.nodes("embedding_max")
    assert_sound(done)


class Sizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(ROWS, DIM))

    def forward(self, ids):
        _, _, sizes, _ = torch.embedding_bag(self.w, ids.flatten(), torch.arange(0, ids.numel(), ids.shape[1]), mode=2)
        return F.embedding_bag(ids, self.w, mode="max", max_norm=None) + sizes[:, None]


def test_bag_sizes_are_read():
    done = rewrite(Sizes(), (batch(),), PoolSequences())
    assert len(done.nodes("embedding_bag")) == 1 and len(done.nodes("embedding_max")) == 1
    assert_sound(done)


@pytest.mark.parametrize("how", ["mean and max", "masked_fill, eq, amax", "lowered (DeepCTR, RecBole)"])
def test_three_steps(how):
    """The user's AdaGrad becomes a row-wise one: the maximum's gradient arrives as rows, beside that of the mean."""
    plain = Pooled(SPELLINGS[how], 0)
    other = copy.deepcopy(plain)
    optim = Adagrad(other.parameters(), lr=0.1)
    opt, optim = tw.optimize(other, optimizer=optim, sample_inputs=(batch(),))
    assert any(n.target is OP and n.args[9] == "sparse" for v in opt._variants for n in v.graph.nodes) or opt.report.coverage["updates"] == (1, 1)
    reference = Adagrad(plain.parameters(), lr=0.1)
    for step in range(3):
        ids = batch(8, step)
        for model, optimizer in ((plain, reference), (opt, optim)):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
        assert other.e.weight.grad.is_sparse
    torch.testing.assert_close(other.e.weight, plain.e.weight)


def test_an_update_inside_the_backward_is_refused():
    plan = tw.Plan(embedding_optimizer=tw.Adagrad(lr=0.1, in_backward=True))
    model = Pooled(SPELLINGS["mean and max"])
    with pytest.raises(tw.PlanError, match="also read by embedding_max"):
        tw.optimize(model, plan, sample_inputs=(batch(),))
