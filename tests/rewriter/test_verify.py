"""The check after each pass, on graphs whose shapes are not all known beforehand."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
from tablewright.passes.graph import Editor, is_op
from tablewright.rewriter.capture import capture, clone_shell
from tablewright.rewriter.errors import VerifyError
from tablewright.rewriter.verify import check_structure, copy_graph
from torch import nn


class Pairs(nn.Module):
    """A masked_select, whose size depends on data, and a Fourier transform, which fake tensors refuse."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, 4) for _ in range(3))
        self.register_buffer("mask", torch.triu(torch.ones(3, 3), 1).bool())
        self.head = nn.Linear(3, 1)

    def forward(self, ids):
        x = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
        gram = x @ x.transpose(1, 2)
        pairs = torch.masked_select(gram, self.mask).view(-1, 3)
        return self.head(pairs) + torch.view_as_real(torch.fft.fft(x, dim=-1)).sum((1, 2, 3)).unsqueeze(1)


def test_an_op_whose_shape_depends_on_data_hinders_no_pass():
    torch.manual_seed(0)
    model, ids = Pairs(), torch.randint(20, (5, 3))
    opt = tw.optimize(model, sample_inputs=(ids,))
    assert opt.report.coverage["lookups"] == (3, 3)
    assert not [r for r in opt.report.records if r.status == "REJECTED"]
    torch.testing.assert_close(opt(ids), model(ids))


def _captured():
    shell = clone_shell(Pairs())
    return shell, capture(shell, (torch.randint(20, (5, 3)),), {}).graph


def test_a_wrong_new_node_is_still_refused():
    shell, graph = _captured()
    after = copy_graph(graph)
    linear = next(n for n in after.nodes if is_op(n, torch.ops.aten.linear.default))
    wrong = Editor(after, "test").call(
        torch.ops.aten.matmul.default, linear, linear.args[1], before=linear.next, sources=[linear]
    )  # fmt: skip
    select = next(n for n in after.nodes if is_op(n, torch.ops.aten.masked_select.default))
    bad = Editor(after, "test").call(torch.ops.aten.matmul.default, select.args[0], linear.args[1], before=select, sources=[select])
    select.args = (bad, select.args[1])
    assert wrong.users == {}
    with pytest.raises(VerifyError, match="does not run on its own shapes"):
        check_structure(graph, after, shell)


class Unused(nn.Module):
    """A dropout of probability 0 that nobody reads keeps its branch alive in the captured graph."""

    def __init__(self):
        super().__init__()
        self.table, self.used, self.unused = nn.Embedding(20, 4), nn.Linear(4, 1), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.0)

    def forward(self, ids):
        x = self.table(ids).sum(1)
        self.drop(self.unused(x))
        return self.used(self.drop(x))


def test_a_branch_that_nobody_reads_may_go():
    model, ids = Unused(), torch.randint(20, (5, 3))
    opt = tw.optimize(model, sample_inputs=(ids,))
    assert opt.report.coverage["dropouts"] == (2, 2)
    torch.testing.assert_close(opt(ids), model(ids))
    opt(ids).sum().backward()
    assert model.unused.weight.grad is None and model.used.weight.grad is not None


def test_an_assertion_about_a_value_may_not_go():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 4)

        def forward(self, ids):
            x = self.table(ids)
            return x * 2 if bool((ids > 100).any()) else x

    shell = clone_shell(Branch())
    graph = capture(shell, (torch.randint(20, (5, 3)),), {}).graph
    after = copy_graph(graph)
    assertion = next(n for n in after.nodes if n.target is torch.ops.aten._assert_scalar.default)
    after.erase_node(assertion)
    with pytest.raises(VerifyError, match="an assertion about data is gone"):
        check_structure(graph, after, shell)
