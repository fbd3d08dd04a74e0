"""Columns of one matrix of ids are cut out at once where there are many."""
from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from pass_harness import assert_sound, rewrite
from tablewright.passes.id_columns import IdColumns
from torch import nn

ROWS, DIM, FIELDS = 20, 4, 13
FORMS = {
    "select, cast": lambda x, i: x[:, i].long(),
    "select and a type": lambda x, i: x[:, i].to(torch.int32),
    "slice, cast, squeeze": lambda x, i: x[:, i : i + 1].long().squeeze(1),
    "slice, squeeze, cast": lambda x, i: x[:, i : i + 1].squeeze(-1).long(),
    "counted from the end": lambda x, i: x[:, -1 - i].long(),
}


class Columns(nn.Module):
    def __init__(self, form, fields=FIELDS):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(ROWS, DIM) for _ in range(fields))
        self.form = form

    def forward(self, x):
        return torch.cat([table(self.form(x, i)) for i, table in enumerate(self.tables)], -1) * 2


def batch(size=6, width=FIELDS + 3, seed=0):
    return torch.randint(0, ROWS, (size, width), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(form, dtype):
    done = rewrite(Columns(form), (batch().to(dtype),), IdColumns())
    assert_sound(done, exact=True)
    assert len(done.of("APPLIED")) == FIELDS and len(done.nodes("unbind")) == 1
    assert not done.nodes("select") and not done.nodes("slice")


def test_columns_that_are_ids_already():
    done = rewrite(Columns(lambda x, i: x[:, i]), (batch(),), IdColumns())
    assert_sound(done, exact=True)
    assert len(done.of("APPLIED")) == FIELDS and not done.nodes("select")


def test_few_columns_stay():
    done = rewrite(Columns(FORMS["select, cast"], 4), (batch().float(),), IdColumns())
    assert "4 of 16 columns" in done.of("SKIPPED")[0].reason and not done.of("APPLIED")
    done = rewrite(Columns(FORMS["select, cast"]), (batch(width=40).float(),), IdColumns())
    assert "13 of 40 columns" in done.of("SKIPPED")[0].reason
    done = rewrite(Columns(FORMS["select, cast"], 4), (batch(width=4).float(),), IdColumns(least=2))
    assert len(done.of("APPLIED")) == 4


def test_a_column_read_by_two_tables_and_another_reader():
    class Shared(Columns):
        def forward(self, x):
            again = self.tables[0](self.form(x, 1))
            return super().forward(x).sum(1) + again.sum(1) + self.form(x, 2)

    done = rewrite(Shared(FORMS["select, cast"]), (batch().float(),), IdColumns())
    assert_sound(done, exact=True)
    assert len(done.nodes("unbind")) == 1


def test_a_matrix_written_in_place_stays():
    class Written(Columns):
        def forward(self, x):
            x = x.clone()
            x[:, 0] = 1
            return super().forward(x)

    done = rewrite(Written(FORMS["select, cast"]), (batch().float(),), IdColumns())
    assert_sound(done)
    assert not done.of("APPLIED")


def test_through_optimize():
    plain = Columns(FORMS["slice, cast, squeeze"])
    opt = tw.optimize(copy.deepcopy(plain), sample_inputs=(batch().float(),), verify="numerics")
    assert opt.report.coverage["id columns"] == (FIELDS, FIELDS) and "id columns cut at once" in str(opt.report)
    for size in (1, 4, 0):
        assert torch.equal(opt(batch(size, seed=1).float()), plain(batch(size, seed=1).float()))
