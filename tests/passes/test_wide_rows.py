"""Launches over low-precision tables whose readers widen them: one conversion, gradients in float32."""
from __future__ import annotations

import pytest
import torch
from pass_harness import again, rewrite
from tablewright.kernels.embedding.op import OP
from tablewright.passes.graph import value_of
from tablewright.passes.group_tables import GroupTables
from tablewright.passes.wide_rows import WideRows
from tablewright.rewriter.capture import attach
from tablewright.rewriter.verify import check_structure
from torch import nn
from torch.nn import functional as F


class Model(nn.Module):
    def __init__(self, read, dtype=torch.bfloat16):
        super().__init__()
        self.a, self.b = nn.Embedding(9, 4, dtype=dtype), nn.Embedding(9, 4, dtype=dtype)
        self.read = read

    def forward(self, ids):
        return self.read(F.embedding(ids, self.a.weight), F.embedding(ids, self.b.weight))


READS = {
    "each": (lambda a, b: a.float() * b.float(), 2, 0),
    "one only": (lambda a, b: a.float().sum(1) + b.sum(1).float(), 1, 1),
    "in both dtypes": (lambda a, b: a.float() + b.float() + a.sum(), 2, 1),
    "joined": (lambda a, b: torch.cat([a, b], 1).float(), 1, 0),
    "joined, parts too": (lambda a, b: (torch.cat([a, b], 1).float().sum(1), a.float(), b * 2), 2, 1),
    "through views": (lambda a, b: a.unsqueeze(1).float() + b.view(-1, 2, 2).flatten(1).unsqueeze(1).float(), 2, 0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", READS)
def test_values_gradients_and_casts(name, dtype):
    read, casts, back = READS[name]
    first = rewrite(Model(read, dtype), (torch.tensor([0, 8, 3, 3]),), GroupTables())
    check_structure(first.before, first.after, first.shell)
    done = again(first.shell, first.after, first.leaves, WideRows())
    check_structure(first.before, done.after, done.shell)
    (row,) = done.records
    assert (row.status, row.kind) == ("APPLIED", "wide rows") and row.detail.startswith(f"{casts} reads")
    (fused,) = done.nodes("embedding_bags")
    assert all(v.dtype == torch.float32 for v in fused.meta["val"])
    assert sum(value_of(n).dtype == dtype and value_of(n.args[0]).dtype == torch.float32 for n in done.nodes("to")) == back
    results = []
    for graph in (first.before, done.after):
        first.shell.zero_grad()
        out = attach(first.shell, graph)(*first.leaves)
        sum(o.float().sum() for o in out).backward()
        results.append([*out, first.shell.a.weight.grad, first.shell.b.weight.grad])
    for a, b in zip(*results):
        assert a.dtype == b.dtype and torch.equal(a, b)
    second = again(done.shell, done.after, [], WideRows())
    assert not second.of("APPLIED") and [n.name for n in second.after.nodes] == [n.name for n in done.after.nodes]


def test_float32_tables_and_rows_that_stay_low_are_left():
    done = rewrite(Model(lambda a, b: a + b, torch.float32), (torch.tensor([0, 8]),), GroupTables())
    assert not again(done.shell, done.after, [], WideRows()).records
    done = rewrite(Model(lambda a, b: a + b), (torch.tensor([0, 8]),), GroupTables())
    (row,) = again(done.shell, done.after, [], WideRows()).records
    assert row.status == "SKIPPED" and "stay bfloat16" in row.reason


def test_a_budget_of_none():
    first = rewrite(Model(READS["each"][0]), (torch.tensor([0, 8]),), GroupTables())
    done = again(first.shell, first.after, [], WideRows(), budget=0)
    assert done.of("DISABLED") and [n.name for n in done.after.nodes] == [n.name for n in first.after.nodes]


def test_extras_keep_their_bits():
    """A float32 vector that is joined to low rows is not rounded to them."""
    model = Model(lambda a, b: torch.cat([a, b], 1).float())
    first = rewrite(model, (torch.tensor([0, 8]),), GroupTables())
    (node,) = [n for n in first.after.nodes if n.target is OP]
    done = again(first.shell, first.after, first.leaves, WideRows())
    (wide,) = done.nodes("embedding_bags")
    extra = torch.full((2, 1), 1 + 2.0**-20)
    text = wide.args[5].replace('"extras":[]', '"extras":[{"slot":0,"column":8,"width":1}]').replace('"slots":[8]', '"slots":[9]')
    assert text != wide.args[5] != node.args[5]
    ids = first.leaves[0]
    (out,) = OP([model.a.weight, model.b.weight], [ids, ids], [None] * 2, [None] * 2, [extra], text)
    assert out.dtype == torch.float32 and torch.equal(out[:, 8:], extra) and torch.equal(out[:, :4], model.a.weight[ids].float())
    torch.library.opcheck(
        OP, ([model.a.weight, model.b.weight], [ids, ids], [None] * 2, [None] * 2, [extra], text), raise_exception=True,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
