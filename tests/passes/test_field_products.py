"""Products with a matrix for each field: turned around with the same numbers, at any batch; other products stay."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.field_products import FieldProducts
from torch import nn

TURN = FieldProducts(measure=False)
FIELDS, DIM, OUT = 4, 3, 5


class Model(nn.Module):
    def __init__(self, how, shape=(FIELDS, DIM, OUT)):
        super().__init__()
        self.w, self.how = nn.Parameter(torch.randn(shape)), how

    def forward(self, x):
        return self.how(x * 2, self.w)


SPELLINGS = {
    "a row each (FmFM)": lambda x, w: torch.matmul(x.unsqueeze(2), w).squeeze(2),
    "as heads, a view of the weight (FinalMLP)": lambda x, w: (x.unsqueeze(-2) @ w.view(FIELDS, DIM, -1)).view(-1, FIELDS * OUT),
    "several rows each": lambda x, w: torch.matmul(x.unsqueeze(2).repeat(1, 1, 3, 1), w).sum(2),
    "a scaled weight": lambda x, w: x[:, :, None] @ (w * 0.5),
}


KERNELS = {
    "outer products (pytorch-fm)": lambda x, k: (x.unsqueeze(1) * k).sum(dim=-1).permute(0, 2, 1) * 2,
    "turned in place (DeepCTR)": lambda x, k: torch.sum(torch.mul((x + 0).unsqueeze_(dim=1), k), dim=-1).transpose(2, 1),
    "a kernel with a batch axis (RecBole)": lambda x, k: torch.sum(torch.mul(k.unsqueeze(0), x[:, None]), dim=3).flatten(1),
}


@pytest.mark.parametrize("size", [6, 1])
@pytest.mark.parametrize("how", KERNELS.values(), ids=KERNELS)
def test_kernels(how, size):
    torch.manual_seed(0)
    done = rewrite(Model(how, (OUT, FIELDS, DIM)), (torch.randn(size, FIELDS, DIM),), TURN)
    assert len(done.of("APPLIED")) == 1 and len(done.nodes("bmm")) == 1 and not done.nodes("sum")
    assert_sound(done)


KERNELS_LOOK_ALIKES = {
    "over fields": lambda x, k: (x.unsqueeze(1) * k).sum(2),
    "over two axes": lambda x, k: (x.unsqueeze(1) * k).sum((2, 3)),
    "kept": lambda x, k: (x.unsqueeze(1) * k).sum(3, keepdim=True),
    "read again": lambda x, k: (y := x.unsqueeze(1) * k).sum(3) + y.amax(3),
    "read before it is turned": lambda x, k: (y := x + 0).sum() + (y.unsqueeze_(1) * k).sum(3) + y.sum(),
    "columns": lambda x, k: (x.unsqueeze(1) * k[:, :, :1]).sum(3),
}


@pytest.mark.parametrize("how", KERNELS_LOOK_ALIKES.values(), ids=KERNELS_LOOK_ALIKES)
def test_kernels_that_stay(how):
    torch.manual_seed(0)
    done = rewrite(Model(how, (OUT, FIELDS, DIM)), (torch.randn(6, FIELDS, DIM),), TURN)
    assert not done.of("APPLIED")
    assert_sound(done)


@pytest.mark.parametrize("size", [6, 1, 0])
@pytest.mark.parametrize("how", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(how, size):
    torch.manual_seed(0)
    if size == 0 and how is SPELLINGS["as heads, a view of the weight (FinalMLP)"]:
        pytest.skip("the plain model cannot view no rows")
    done = rewrite(Model(how), (torch.randn(size, FIELDS, DIM),), TURN)
    assert len(done.of("APPLIED")) == 1 and len(done.nodes("bmm")) == 1 and not done.nodes("matmul")
    assert_sound(done)


def test_another_batch():
    model = Model(SPELLINGS["a row each (FmFM)"])
    opt = tw.optimize(model, tw.Plan(passes={"field_products": {"measure": False}}), sample_inputs=(torch.randn(6, FIELDS, DIM),))
    assert opt.report.coverage["interactions"] == (1, 1)
    for size in (1, 9):
        x = torch.randn(size, FIELDS, DIM)
        torch.testing.assert_close(opt(x), model(x))


@pytest.mark.parametrize(
    ("how", "shape"),
    [
        (lambda x, w: x.unsqueeze(2) @ w[0], (FIELDS, DIM, OUT)),
        (lambda x, w: x.unsqueeze(2) @ w, (1, DIM, OUT)),
        (lambda x, w: x.unsqueeze(1).unsqueeze(1)[:, :, :, 0] @ w, (FIELDS, DIM, OUT)),
        (lambda x, w: x.unsqueeze(2) @ (w[None] + x.mean()), (FIELDS, DIM, OUT)),
        (lambda x, w: x.unsqueeze(2) @ (w + x.mean()), (FIELDS, DIM, OUT)),
        (lambda x, w: w @ x.unsqueeze(-1), (FIELDS, OUT, DIM)),
    ],
    ids=["one matrix", "one field", "one row for all", "a matrix each row", "matrices of the batch", "from the left"],
)
def test_other_products_stay(how, shape):
    torch.manual_seed(0)
    done = rewrite(Model(how, shape), (torch.randn(6, FIELDS, DIM),), TURN)
    assert not done.records and not done.of("APPLIED")
    assert_sound(done)


def test_budget_and_missing_inputs():
    how = SPELLINGS["a row each (FmFM)"]
    assert rewrite(Model(how), (torch.randn(6, FIELDS, DIM),), TURN, budget=0).of("DISABLED")
    assert not rewrite(Model(how), None, TURN).records
