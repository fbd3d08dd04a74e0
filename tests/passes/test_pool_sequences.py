"""Lookups summed over a sequence: every spelling becomes a bag with the same numbers; whatever is not one is left alone."""

from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from pass_harness import assert_sound, rewrite
from tablewright.kernels.embedding.pooled import POOL
from tablewright.passes.pool_sequences import PoolSequences
from torch import nn
from torch.optim import SGD, Adagrad

ROWS, DIM, LENGTH = 20, 4, 5


class Pooled(nn.Module):
    """``how(e(ids), ids)`` behind a layer; no row of the table is zero, that of ``padding_idx`` neither."""

    def __init__(self, how, padding_idx=None, dim=DIM, **options):
        super().__init__()
        self.e = nn.Embedding(ROWS, dim, padding_idx=padding_idx, **options)
        nn.init.normal_(self.e.weight)
        self.scale = nn.Parameter(torch.rand(LENGTH))
        self.how = how

    def forward(self, ids, *more):
        return self.how(self.e(ids), ids, *(self.scale if m is None else m for m in more)) * 1.5


def batch(size=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, ROWS, (size, LENGTH), generator=g)
    lengths = torch.randint(0, LENGTH + 1, (size, 1), generator=g)
    return ids * (torch.arange(LENGTH) < lengths)


def mask(ids):
    return ids != 0


SUMS = {
    "sum": lambda e, i: e.sum(1),
    "sum from the end, kept": lambda e, i: e.sum(-2, keepdim=True),
    "sum of a list of dims": lambda e, i: torch.sum(e, dim=[1]),
    "sum, dtype": lambda e, i: e.sum(1, dtype=torch.float32),
    "mean": lambda e, i: e.mean(dim=1),
    "mean, kept": lambda e, i: torch.mean(e, dim=1, keepdim=True),
    "sum of the transposed": lambda e, i: e.transpose(1, 2).sum(-1),
    "sum of the permuted": lambda e, i: e.permute(1, 0, 2).sum(0),
    "sum of a view": lambda e, i: e.unsqueeze(1).sum(2).squeeze(1),
    "sum of contiguous": lambda e, i: e.permute(0, 2, 1).contiguous().sum(2),
    "sum and mean": lambda e, i: torch.cat([e.sum(1), e.mean(1)], -1),
    "matrix of ones": lambda e, i: torch.bmm(torch.ones_like(i, dtype=e.dtype).unsqueeze(1), e).squeeze(1),
}
MASKS = {
    "one minus a cast mask, repeated": lambda e, i: (e * (1 - (i == 0).float().unsqueeze(2).repeat_interleave(DIM, 2))).sum(1),
    "mask": lambda e, i: (e * mask(i).unsqueeze(2)).sum(1),
    "mask, other side": lambda e, i: (mask(i)[:, :, None].float() * e).sum(dim=1),
    "above 0": lambda e, i: (e * (i > 0).unsqueeze(-1).float()).sum(1),
    "at least 1": lambda e, i: (e * (i >= 1).unsqueeze(-1).float()).sum(1),
    "not equal 0": lambda e, i: (e * (~(i == 0)).unsqueeze(-1)).sum(1),
    "logical not": lambda e, i: (e * torch.logical_not(i == 0).unsqueeze(-1).to(e.dtype)).sum(1),
    "1 - padding": lambda e, i: (e * (1 - (i == 0).float()).unsqueeze(-1)).sum(1),
    "integer mask": lambda e, i: (e * mask(i).long().unsqueeze(-1)).sum(1),
    "count and epsilon": lambda e, i: (e * mask(i).unsqueeze(2)).sum(1) / (mask(i).sum(1, keepdim=True) + 1e-8),
    "count, tensor epsilon": lambda e, i: torch.div(
        (e * mask(i).unsqueeze(2).expand_as(e)).sum(1), mask(i).float().sum(1, keepdim=True) + torch.tensor([1e-8])
    ),
    "count, clamped": lambda e, i: (e * mask(i).unsqueeze(2)).sum(1, keepdim=True) / mask(i).sum(1).clamp(min=1)[:, None, None],
    "expand": lambda e, i: (e * mask(i).unsqueeze(2).expand(-1, -1, DIM)).sum(1),
    "expand_as, float": lambda e, i: (e * mask(i).float().unsqueeze(2).expand_as(e)).sum(1),
    "type_as": lambda e, i: (e * mask(i).type_as(e).unsqueeze(2)).sum(1),
    "repeat_interleave": lambda e, i: (e * torch.repeat_interleave(mask(i).unsqueeze(2), e.shape[-1], dim=2).float()).sum(1),
    "repeat": lambda e, i: (e * mask(i).unsqueeze(2).repeat(1, 1, DIM).float()).sum(1),
    "transposed": lambda e, i: (e.transpose(1, 2) * mask(i).unsqueeze(1)).sum(2),
    "transposed mask": lambda e, i: (e * mask(i).unsqueeze(1).transpose(1, 2)).sum(1),
    "bmm": lambda e, i: torch.bmm(mask(i).unsqueeze(1).float(), e).squeeze(1),
    "bmm and count": lambda e, i: (
        torch.bmm(mask(i).unsqueeze(1).float(), e).squeeze(1) / (mask(i).float().sum(-1, keepdim=True) + 1e-16)
    ),
    "bmm, masks of one feature put side by side": lambda e, i: torch.bmm(torch.cat([mask(i).unsqueeze(1).float()], 1), e).squeeze(1),
    "matmul": lambda e, i: torch.matmul(mask(i).float().unsqueeze(1), e),
    "bmm, other side": lambda e, i: torch.bmm(e.transpose(1, 2), mask(i).float().unsqueeze(2)).squeeze(-1),
    "einsum": lambda e, i: torch.einsum("bl,bld->bd", mask(i).float(), e),
    "einsum, other side": lambda e, i: torch.einsum("nld,nl->nd", e, mask(i).float()),
    "where": lambda e, i: torch.where(mask(i).unsqueeze(-1), e, torch.zeros_like(e)).sum(1),
    "where a number": lambda e, i: torch.where(mask(i).unsqueeze(-1), e, 0.0).sum(1),
    "masked_fill": lambda e, i: e.masked_fill((i == 0).unsqueeze(-1), 0).mean(1),
    "masked_fill, inverted": lambda e, i: e.masked_fill(~mask(i).unsqueeze(-1), 0.0).sum(1),
}
WEIGHTS = {  # with a second input
    "lengths": (
        lambda e, i, n: (e * (torch.arange(LENGTH) < n.unsqueeze(1)).unsqueeze(2)).sum(1),
        torch.tensor([0, 1, 5, 2, 3, 4]),
    ),
    "weights": (lambda e, i, w: (e * w.unsqueeze(2)).sum(1), torch.rand(6, LENGTH)),
    "weights and mask": (lambda e, i, w: (e * w.unsqueeze(2) * mask(i).unsqueeze(2)).sum(1), torch.rand(6, LENGTH)),
    "weights by matrix": (lambda e, i, w: torch.bmm(w.unsqueeze(1), e)[:, 0], torch.rand(6, LENGTH)),
    "double weights": (lambda e, i, w: (e * w.float().unsqueeze(2)).sum(1), torch.rand(6, LENGTH).double()),
    "trained": (lambda e, i, w: (e * w.softmax(0)[None, :, None]).sum(1), None),
    "trained, by matrix": (lambda e, i, w: w @ e.permute(1, 0, 2).flatten(1), None),
    "another mask": (lambda e, i, m: (e * m.unsqueeze(2)).sum(1), torch.rand(6, LENGTH) < 0.5),
    "mask of two": (lambda e, i, m: (e * (m & mask(i)).unsqueeze(2)).sum(1), torch.rand(6, LENGTH) < 0.5),
    "mask made wide": (lambda e, i, m: (e * ~(m.unsqueeze(2).expand_as(e))).sum(1), torch.rand(6, LENGTH) < 0.5),
}


def pooled(how, padding_idx=None, inputs=None, **options):
    done = rewrite(Pooled(how, padding_idx, **options), inputs or (batch(),), PoolSequences())
    assert_sound(done)
    return done


@pytest.mark.parametrize("padding_idx", [None, 0, 3])
@pytest.mark.parametrize("how", SUMS.values(), ids=SUMS)
def test_sums(how, padding_idx):
    done = pooled(how, padding_idx)
    assert done.of("APPLIED") and not done.nodes("embedding") and not done.of("SKIPPED")


@pytest.mark.parametrize("padding_idx", [None, 0, 3])
@pytest.mark.parametrize("how", MASKS.values(), ids=MASKS)
def test_masks(how, padding_idx):
    done = pooled(how, padding_idx)
    assert len(done.of("APPLIED")) == 1 and not done.nodes("embedding")
    (bag,) = (n for n in done.after.nodes if n.target is POOL)
    dropped = bag.args[2] is None
    assert dropped == (padding_idx != 3), "a mask goes away where the bag can leave the row out by itself"
    assert bag.args[3:5] == ((0, False) if dropped else (3, True))


def test_a_sparse_gradient_keeps_the_masked_rows():
    (bag,) = (n for n in pooled(MASKS["mask"], sparse=True).after.nodes if n.target is POOL)
    assert bag.args[2] is not None, "the plain gradient names row 0, with zeros"
    (bag,) = (n for n in pooled(MASKS["mask"], 0, sparse=True).after.nodes if n.target is POOL)
    assert bag.args[2] is None


@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize(("how", "more"), [v for k, v in WEIGHTS.items() if k != "trained, by matrix"],
                         ids=[k for k in WEIGHTS if k != "trained, by matrix"])  # fmt: skip
def test_weights(how, more, padding_idx):
    done = pooled(how, padding_idx, (batch(), more))
    assert len(done.of("APPLIED")) == 1 and not done.nodes("embedding")


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_masks_from_values(padding_idx):
    """The rows that happen to sum to zero are found too, whatever their id."""

    def how(e, i):
        return e.sum(1) / ((e.sum(-1) != 0).float().sum(-1, keepdim=True) + 1e-12)

    model = Pooled(how, padding_idx)
    with torch.no_grad():
        model.e.weight[4] = torch.tensor([1.0, -1, 2, -2])
        model.e.weight[0] = 0
    done = rewrite(model, (torch.tensor([[4, 4, 1], [0, 4, 0], [7, 8, 9]]),), PoolSequences())
    assert_sound(done)
    assert done.of("APPLIED") and not done.nodes("embedding") and done.nodes("embedding_row_sums")


@pytest.mark.parametrize("how", [lambda e, i: e.sum(1), lambda e, i: e.squeeze(-1).sum(1), lambda e, i: e.sum(dim=(1, 2)),
                                 lambda e, i: e.view(e.size(0), -1).sum(1, keepdim=True), lambda e, i: e.sum(-1).sum(-1),
                                 lambda e, i: (e.squeeze(2) * mask(i)).sum(1)])  # fmt: skip
def test_one_column(how):
    assert pooled(how, dim=1).of("APPLIED")


@pytest.mark.parametrize("how", [lambda e, i: e.sum(2), lambda e, i: e.mean(1), lambda e, i: (e * mask(i).unsqueeze(3)).sum(-2),
                                 lambda e, i: e.sum((1, 2)), lambda e, i: e.sum(0), lambda e, i: e.mean((2, 0)),
                                 lambda e, i: torch.matmul(mask(i).float().unsqueeze(-2), e).squeeze(2),
                                 lambda e, i: torch.einsum("btl,btld->dtb", mask(i).float(), e)])  # fmt: skip
def test_sequences_of_sequences(how):
    ids = torch.randint(0, ROWS, (3, 2, 4))
    assert pooled(how, inputs=(ids,)).of("APPLIED")


class Offsets(nn.Module):
    """The first-order term of a factorization machine: one big table, an offset for each field."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Embedding(30, 1)
        self.offsets = torch.tensor([0, 10, 20])

    def forward(self, x):
        return torch.sum(self.fc(x + x.new_tensor([0, 10, 20]).unsqueeze(0)), dim=1)


def test_fields_with_offsets():
    done = rewrite(Offsets(), (torch.randint(0, 10, (4, 3)),), PoolSequences())
    assert_sound(done)
    assert done.of("APPLIED")


def test_lookups_by_index():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(ROWS, DIM))

        def forward(self, ids):
            return self.w[ids].sum(1) + self.w[ids - ROWS].mean(1)

    done = rewrite(Indexed(), (batch(),), PoolSequences())
    assert_sound(done)
    assert len(done.of("APPLIED")) == 2


# --- left alone --------------------------------------------------------------------------------------------------------------


SKIPS = {
    "read by another": (lambda e, i: e.sum(1) + e.relu().sum(1), "also read by relu"),
    "an FM": (lambda e, i: e.sum(1) ** 2 - (e * e).sum(1), "also read by mul"),
    "returned": (lambda e, i: torch.cat([e.flatten(1), e.sum(1)], 1), "also read by"),
    "attention": (lambda e, i: (e * (e @ torch.ones(DIM, 1)).softmax(1)).sum(1), "also read by matmul"),
    "places of the maximum": (lambda e, i: e.max(1)[0] + e.max(1)[1], "maximum over the sequence and something else"),
    "maximum of both axes": (lambda e, i: e.amax((1, 2)), "maximum over the sequence and something else"),
    "masked, read twice": (lambda e, i: (m := e.masked_fill((i == 0).unsqueeze(2), -1e9)).amax(1) + m.sum(1), "also read by sum"),
    "filled and shifted": (lambda e, i: (e.masked_fill((i == 0)[..., None], -9.0) - i[..., None]).amax(1) + e.amax(1), "changed by sub before"),
    "shifted by columns": (lambda e, i: (e - torch.rand(DIM)).amax(1) + e.amax(1), "changed by sub before"),
    "two columns of weights": (lambda e, i: e.sum(1) + (e * mask(i).unsqueeze(2)).cumsum(1)[:, -1], "also read by cumsum"),
    "both axes": (lambda e, i: e.sum((1, 2)), "columns at once"),
    "another dtype": (lambda e, i: e.sum(1, dtype=torch.float64), "float64"),
    "wide weights": (lambda e, i: (e * mask(i).double().unsqueeze(2)).sum(1), "float64"),
    "columns weighted": (lambda e, i: e.sum(1) + (e * torch.rand(DIM)).sum(1), "also read by mul"),
    "row sums elsewhere": (lambda e, i: e.sum(1) + e.sum(-1).sum(-1, keepdim=True), "also read by sum"),
}


@pytest.mark.parametrize(("how", "reason"), SKIPS.values(), ids=SKIPS)
def test_skipped_with_a_reason(how, reason):
    done = rewrite(Pooled(how), (batch(),), PoolSequences())
    assert not done.of("APPLIED") and done.of("SKIPPED")
    assert all(reason in r.reason for r in done.of("SKIPPED")), done.records
    assert [n.name for n in done.after.nodes] == [n.name for n in done.before.nodes]


@pytest.mark.parametrize("how", [lambda e, i: e.sum(-1), lambda e, i: e.sum(), lambda e, i: e @ torch.ones(DIM, 2),
                                 lambda e, i: e.relu().sum(1), lambda e, i: torch.bmm(torch.ones(6, 2, LENGTH), e)])  # fmt: skip
def test_what_is_no_pooling_is_not_reported(how):
    assert not rewrite(Pooled(how), (batch(),), PoolSequences()).records


def test_sums_over_the_batch_are_no_pooling():
    assert not rewrite(Pooled(lambda e, i: e.sum(0)), (torch.tensor([1, 2, 3]),), PoolSequences()).records


def test_tables_that_cannot_be_read_in_place():
    done = rewrite(Pooled(lambda e, i: e.sum(1), max_norm=1.0), (batch(),), PoolSequences())
    assert "max_norm" in done.of("SKIPPED")[0].reason
    done = rewrite(Pooled(lambda e, i: e.sum(1), scale_grad_by_freq=True), (batch(),), PoolSequences())
    assert "scale_grad_by_freq" in done.of("SKIPPED")[0].reason


def test_without_sample_inputs():
    done = rewrite(Pooled(lambda e, i: e.sum(1)), None, PoolSequences())
    assert "only with sample_inputs" in done.of("SKIPPED")[0].reason


def test_a_budget_of_none_changes_nothing():
    done = rewrite(Pooled(lambda e, i: e.sum(1)), (batch(),), PoolSequences(), budget=0)
    assert done.of("DISABLED") and done.nodes("embedding")


# --- through optimize() ------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Sequences pooled four ways beside a plain lookup, concatenated."""

    def __init__(self):
        super().__init__()
        self.user = nn.Embedding(ROWS, DIM)
        self.tables = nn.ModuleList(nn.Embedding(ROWS, DIM, padding_idx=p) for p in (None, 0, 0, None))
        self.out = nn.Linear(5 * DIM, 1)

    def forward(self, ids):
        a, b, c, d = (t(ids) for t in self.tables)
        m = mask(ids).float()
        parts = [
            self.user(ids[:, 0]),
            (a * m.unsqueeze(2)).sum(1) / (m.sum(1, keepdim=True) + 1e-8),
            b.sum(1) / ((b.sum(-1) != 0).float().sum(-1, keepdim=True) + 1e-12),
            torch.bmm(m.unsqueeze(1), c).squeeze(1),
            d.mean(1),
        ]
        return self.out(torch.cat(parts, 1))


@pytest.mark.parametrize("make", [lambda p: Adagrad(p, lr=0.1), lambda p: SGD(p, lr=0.1)], ids=["adagrad", "sgd"])
def test_three_steps(make):
    torch.manual_seed(0)
    plain = Model()
    model = copy.deepcopy(plain)
    opt, optim = tw.optimize(model, sample_inputs=(batch(),), optimizer=(his := make(model.parameters())), verify="numerics")
    mine = make(plain.parameters())
    assert opt.report.coverage["pooled"] == (4, 4) and opt.report.coverage["lookups"] == (5, 5)
    assert opt.report.coverage["updates"] == (5, 5) and opt.report.launches == 1
    assert "4/4 pooled sequences fused" in str(opt.report)
    for seed, size in enumerate((6, 9, 1)):
        for net, optimizer in ((plain, mine), (opt, optim)):
            optimizer.zero_grad()
            net(batch(size, seed)).square().sum().backward()
            optimizer.step()
    for (name, a), b in zip(plain.named_parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    del his


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    plain = Pooled(lambda e, i: (e * mask(i).unsqueeze(2)).sum(1) / (mask(i).sum(1, keepdim=True) + 1e-8), 0).to(dtype)
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=(batch(),))
    assert opt.report.coverage["pooled"] == (1, 1)
    torch.testing.assert_close(opt(batch(7, 1)), plain(batch(7, 1)), rtol=2e-2 if dtype != torch.float64 else 1e-12, atol=1e-2)


def test_compiled():
    plain = Pooled(MASKS["bmm and count"], 0)
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=(batch(),))
    compiled = torch.compile(opt, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch()), plain(batch()))


@pytest.mark.parametrize(
    "sample", [torch.tensor([[3]]), torch.tensor([[3, 0, 1, 0, 0]]), batch(5)], ids=["1 x 1", "1 x 5", "5 x 5"]
)
@pytest.mark.parametrize("how", ["count and epsilon", "transposed", "bmm, other side"])
def test_sizes_of_the_sample_are_not_baked_in(how, sample):
    plain = Pooled(MASKS[how], 3)
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=(sample,))
    assert opt.report.coverage["pooled"] == (1, 1)
    for ids in (batch(6), batch(2)[:, :1], batch(3)[:, :2], batch(0), torch.zeros(3, 0, dtype=torch.int64)):
        torch.testing.assert_close(opt(ids), plain(ids), equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}], ids=["plain", "decays"])
def test_a_masked_row_that_decays(options):
    """The plan's optimizers decay the rows that are looked up, and a masked row is."""
    model = Pooled(MASKS["mask"])
    before = model.e.weight.detach().clone()
    opt = tw.optimize(model, tw.Plan(embedding_optimizer=tw.RowwiseAdagrad(lr=0.5, eps=1e-3, **options)), sample_inputs=(batch(),))
    assert opt.report.coverage["pooled"] == (1, 1)
    opt(torch.tensor([[0, 1, 2]])).sum().backward()
    opt.embedding_optimizer.step()
    assert torch.equal(model.e.weight[0], before[0] * (1 - 0.5 * options.get("weight_decay", 0)))
    assert not torch.equal(model.e.weight[1], before[1]) and torch.equal(model.e.weight[3], before[3])


class NegativeIds(nn.Module):
    """``weight[ids]`` takes -1 as the last row, and a mask of ids sees -1."""

    def __init__(self, kept):
        super().__init__()
        self.weight, self.kept = nn.Parameter(torch.randn(ROWS, DIM)), kept

    def forward(self, ids):
        return (self.weight[ids] * self.kept(ids).unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("kept", [lambda i: i > 0, lambda i: i != 0, lambda i: i != ROWS - 1, lambda i: ~(i <= 0)])
def test_masks_of_negative_ids(kept):
    model, ids = NegativeIds(kept), torch.tensor([[1, -1, 0, 3], [-ROWS, 1 - ROWS, 2, 0], [ROWS - 1, -1, 5, 6]])
    done = rewrite(model, (ids,), PoolSequences())
    assert len(done.of("APPLIED")) == 1
    assert_sound(done)


class WrittenMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(ROWS, DIM)

    def forward(self, ids):
        kept = (ids != 0).float()
        kept[:, 0] = 0
        return (self.e(ids) * kept.unsqueeze(-1)).sum(1)


def test_a_mask_that_is_changed_in_place():
    done = rewrite(WrittenMask(), (batch(),), PoolSequences())
    assert "written to in place" in done.of("SKIPPED")[0].reason
    assert_sound(done)


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_mask_subtracted_more_than_once(alpha):
    done = pooled(lambda e, i: (e * torch.rsub((i == 0).float(), 1, alpha=alpha).unsqueeze(-1)).sum(1))
    (bag,) = (n for n in done.after.nodes if n.target is POOL)
    assert (bag.args[2] is None) == (alpha == 1)


def test_a_mask_by_no_id():
    assert pooled(lambda e, i: (e * (i != float("inf")).unsqueeze(-1)).sum(1)).of("APPLIED")
