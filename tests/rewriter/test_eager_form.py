"""What eager mode runs: ops called as torch's own functions, conversions and views that do nothing left out, the same results."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
from tablewright.kernels.library import DIRECT
from tablewright.rewriter.eager_form import without_idle_calls
from tablewright.rewriter.verify import copy_graph
from torch import nn

aten = torch.ops.aten
X, Y, S = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4).abs() + 0.5, torch.randn(2, 3, 4)
IDS = torch.tensor([2, 0, 1])
ARGS = {  # of every op of torch's that is called directly, arguments as graphs have them
    aten.abs.default: (X,), aten.add.Tensor: (X, Y), aten.add_.Tensor: (Y.clone(), 2), aten.addmm.default: (X[:, :3], X, X.t()),
    aten.baddbmm.default: (S[:, :, :3], S, S.transpose(1, 2)), aten.bmm.default: (S, S.transpose(1, 2)), aten.cat.default: ([X, Y], -1),
    aten.clamp_min.default: (X, 0.1), aten.clone.default: (X.t(),), aten.contiguous.default: (X.t(),), aten.cumsum.default: (X, 1),
    aten.div.Tensor: (X, 2.0), aten.eq.Scalar: (IDS, 0), aten.exp.default: (X,), aten.expand_as.default: (X[:, :1], X),
    aten.flatten.using_ints: (S, 1), aten.gather.default: (X, 1, IDS.unsqueeze(1)), aten.gt.Scalar: (X, 0), aten.index_select.default: (X, 0, IDS),
    aten.layer_norm.default: (X, [4], X[0], X[1], 1e-5), aten.linear.default: (X, Y, Y[:, 0]), aten.log.default: (Y,), aten.lt.Tensor: (X, Y),
    aten.masked_fill.Scalar: (X, Y > 1, -1.0), aten.matmul.default: (S, Y.t()), aten.mean.default: (X,), aten.mean.dim: (X, [-1], True),
    aten.mm.default: (X, Y.t()), aten.mul.Tensor: (X, 3), aten.ne.Scalar: (IDS, 0), aten.neg.default: (X,), aten.permute.default: (S, [2, 0, 1]),
    aten.relu.default: (X,), aten.reshape.default: (X.t(), [2, -1]), aten.rsub.Scalar: (X, 1), aten.select.int: (S, 1, 0),
    aten.sigmoid.default: (X,), aten.softmax.int: (X, -1), aten.sqrt.default: (Y,), aten.squeeze.default: (X[:, :1],),
    aten.squeeze.dim: (X.unsqueeze(1), 1), aten.stack.default: ([X, Y], 1), aten.sub.Tensor: (X, Y), aten.sum.default: (X,),
    aten.sum.dim_IntList: (S, [0, 2], True), aten.sym_size.int: (X, 1), aten.t.default: (X,), aten.tanh.default: (X,),
    aten.to.dtype: (IDS, torch.float16), aten.transpose.int: (S, 0, 2), aten.unflatten.int: (X, -1, [2, 2]), aten.unsqueeze.default: (X, 1),
    aten.view.default: (X, [4, 3]), aten.where.self: (Y > 1, X, Y), aten.batch_norm.default: (X, X[0], X[1], None, None, True, 0.1, 1e-5, False),
}  # fmt: skip


@pytest.mark.parametrize("op", [op for op in DIRECT if str(op).startswith("aten.")], ids=str)
def test_functions_read_the_arguments_of_the_op_as_it_does(op):
    plain, direct = op(*ARGS[op]), DIRECT[op](*ARGS[op])
    if op is aten.add_.Tensor:  # twice in the same memory
        assert plain is direct is ARGS[op][0]
    elif isinstance(plain, torch.Tensor):
        assert torch.equal(plain, direct) and plain.stride() == direct.stride() and plain.dtype == direct.dtype
        assert plain.requires_grad == direct.requires_grad and str(plain.grad_fn).split("object")[0] == str(direct.grad_fn).split("object")[0]
    else:
        assert plain == direct


class Features(nn.Module):
    """Written as models of data frames are: every feature converted, views that undo each other."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 4)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, ids, dense):
        rows = self.table(ids.long().to("cpu")).flatten(1)
        mask = (ids.to(torch.int64) != 0).to(dense.dtype).unsqueeze(1).squeeze(1)
        weights = self.scale.to(torch.float32) * dense.to(torch.float32)
        other = dense.unsqueeze(1).squeeze(0).sum(1)  # the second view undoes nothing
        return rows * weights + other + mask.sum(1, keepdim=True), rows.unflatten(-1, (2, 4)).flatten(1).unsqueeze(-1).squeeze(-2), mask.unsqueeze(-1).squeeze(-1)


def batch(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.randint(0, 30, (5, 2)), torch.randn(5, 8, dtype=dtype)


def lean(opt, guarded):
    graph = copy_graph(opt._variants[0].graph)
    without_idle_calls(graph, opt._shell, guarded)
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_idle_conversions_and_views_are_left_out_and_nothing_else_changes():
    plain = Features()
    opt = tw.optimize(plain, "auto", sample_inputs=batch())
    before, after = [n.target for n in opt._variants[0].graph.nodes], lean(opt, guarded=True)
    conversions = {aten.to.dtype, aten.to.dtype_layout, aten.to.device}
    assert sum(t in conversions for t in before) >= 4
    assert sum(t in conversions for t in after) == 2, "the mask becomes a number, and the parameter's dtype may change"
    assert before.count(aten.flatten.using_ints) > after.count(aten.flatten.using_ints) or aten.unflatten.int not in before
    # an output that is a view stays one: the caller may look at its base, or write to it
    assert after.count(aten.squeeze.dim) == 3 and before.count(aten.squeeze.dim) == 4
    for seed in (1, 2):
        for ours, theirs in zip(opt(*batch(seed)), plain(*batch(seed))):
            assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad
    assert sum(t in conversions for t in lean(opt, guarded=False)) == sum(t in conversions for t in before), "inputs may be of any dtype"


def test_parameters_of_another_dtype_are_still_converted():
    plain = Features()
    opt = tw.optimize(plain, "auto", sample_inputs=batch())
    opt(*batch())
    opt.double()
    assert opt(*batch())[0].dtype == plain.double()(*batch())[0].dtype == torch.float64  # the rows are double, scale.to(float32) is not
    torch.testing.assert_close(opt(*batch())[0], plain(*batch())[0])


def test_ids_of_other_dtypes_after_a_capture_without_samples():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(30, 4)

        def forward(self, ids):
            return self.table(ids.to(torch.int64)).sum(1)

    plain = Ids()
    opt = tw.optimize(plain, "auto")
    for dtype in (torch.int64, torch.float32, torch.int32, torch.int64):
        ids = torch.randint(0, 30, (4, 3)).to(dtype)
        assert torch.equal(opt(ids), plain(ids))
