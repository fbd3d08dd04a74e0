"""Products of small matrices: the ways in which they are written, and what stays."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.small_products import SmallProducts
from torch import nn

FUSE = SmallProducts(measure=False)

FORMS = {
    "bmm": lambda q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v),
    "matmul": lambda q, k, v: (q @ k.mT).tanh() @ v,
    "heads": lambda q, k, v: ((_heads(q) @ _heads(k).transpose(-1, -2)) @ _heads(v)).transpose(1, 2).flatten(2),
    "einsum": lambda q, k, v: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k), v),
    "einsum, turned result": lambda q, k, v: torch.einsum("bji,bjd->bid", torch.einsum("bid,bjd->bji", q, k), v),
    "einsum of heads": lambda q, k, v: torch.einsum(
        "bhij,bjhd->bihd", torch.einsum("bihd,bjhd->bhij", *(t.unflatten(-1, (2, 4)) for t in (q, k))), v.unflatten(-1, (2, 4))
    ).flatten(2),
}


def _heads(x):
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.q, self.k, self.v = form, nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x):
        return self.form(self.q(x), self.k(x), self.v(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [5, 1, 0])
def test_attention(form, rows):
    torch.manual_seed(0)
    done = rewrite(Attention(FORMS[form]), (torch.randn(rows, 6, 8),), FUSE)
    assert len(done.of("APPLIED")) == 2 and len(done.nodes("small_products")) == 2
    assert not any(done.nodes(name) for name in ("bmm", "matmul", "einsum"))
    assert_sound(done)


class Other(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.form(x, self.weight)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, w: x @ w,
        lambda x, w: torch.einsum("bid,de->bie", x, w),
        lambda x, w: torch.einsum("bid,bjd->bijd", x, x) @ w,
        lambda x, w: torch.einsum("bid,bjd->ij", x, x),
        lambda x, w: torch.einsum("bid,bjd->bi", x, x),
        lambda x, w: torch.einsum("...id,...jd->...ij", x, x),
        lambda x, w: (x @ w).double() @ x.double().mT,
        lambda x, w: x.unsqueeze(1) @ x.mT.unsqueeze(1).repeat(1, 3, 1, 1),
        lambda x, w: torch.einsum("bid,bjd->bij", x[..., :1], x),
        lambda x, w: torch.cat([x] * 9, 1) @ torch.cat([x] * 43, 1).mT @ torch.cat([x @ w] * 43, 1).repeat(1, 1, 33),
    ],
    ids=["matrix", "einsum with a matrix", "outer", "summed batch", "a sum more", "ellipsis", "float64", "broadcast", "a sum over 1 and 8", "wide"],
)
def test_look_alikes_stay(form):
    done = rewrite(Other(form), (torch.randn(4, 6, 8),), FUSE)
    assert not done.records and not done.nodes("small_products")


@pytest.mark.parametrize(
    "form",
    [
        lambda x, w: (x @ w).bmm(x.mT).mul_(w[:6, :6]).add_(1).tanh(),
        lambda x, w: torch.einsum("bid,bjd->bji", x @ w, x).mul_(w[:6, :6]).add_(1).tanh(),
    ],
    ids=["bmm", "einsum, turned result"],
)
def test_a_result_that_is_written_to(form):
    """It is the op's own, so that writing to it is as in the plain model."""
    torch.manual_seed(0)
    model, x = Other(form), torch.randn(4, 6, 8)
    done = rewrite(model, (x,), FUSE)
    assert len(done.of("APPLIED")) == 1
    assert_sound(done)
    (a,) = torch.autograd.grad(model(x).sum(), model.weight)
    opt = tw.optimize(model, tw.Plan(passes={"small_products": {"measure": False}}), sample_inputs=(x,))
    (b,) = torch.autograd.grad(opt(x).sum(), model.weight)
    torch.testing.assert_close(a, b)
    assert opt.report.coverage["small products"] == (1, 1)


def test_budget_and_missing_inputs():
    assert len(rewrite(Attention(FORMS["bmm"]), (torch.randn(4, 6, 8),), FUSE, budget=1).of("DISABLED")) == 1
    assert not rewrite(Attention(FORMS["bmm"]), None, FUSE).records
