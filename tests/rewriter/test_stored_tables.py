"""``tables: {glob: {dtype: bf16}}``: own storage, plain names and dtypes outside, float32 gradients and stochastic rounding inside."""
from __future__ import annotations

import copy
import io

import pytest
import tablewright as tw
import torch
from small_models import Dot, Tied, dot_batch, tied_batch, weights_of
from tablewright.rewriter.errors import PlanError
from torch import nn

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROWWISE = tw.RowwiseAdagrad(lr=0.1, in_backward=True)


def stored(dtype="bf16", model=None, glob="user", batch=None, **more):
    plan = tw.Plan(embedding_optimizer=ROWWISE, tables={glob: {"dtype": dtype}, "tags": {"dtype": dtype}} if glob == "user" else {glob: {"dtype": dtype}})
    return tw.optimize(model or Dot(), plan, sample_inputs=batch or dot_batch(), **more)


@pytest.mark.parametrize("dtype", LOW)
def test_storage_report_and_outputs(dtype):
    torch.manual_seed(0)  # of other weights, 2 in 100 have a ReLU that rounding the rows turns over
    plain = Dot()
    before = weights_of(plain)
    opt = stored(dtype, plain)
    assert opt.user.weight.dtype == opt.tags.weight.dtype == LOW[dtype] and opt.item.weight is plain.item.weight
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(before.values(), weights_of(plain).values()))
    rows = {r.subject: r.detail for r in opt.report.records if r.kind == "stored tables"}
    assert list(rows) == ["user.weight", "tags.weight"] and "160 bytes instead of 320" in rows["user.weight"]
    assert opt.report.copied_bytes == 160 + 240 and "stored tables" in str(opt.report) and "bytes" in opt.explain("user")
    assert opt.report.coverage["wide rows"] == (1, 1) and opt.report.coverage["lookups"] == (3, 3)
    for train in (True, False):
        plain.train(train), opt.train(train)
        for size in (5, 1, 0):
            out = opt(*dot_batch(size))
            assert out.dtype == torch.float32
            torch.testing.assert_close(out, plain(*dot_batch(size)), rtol=1e-2, atol=1e-2)
    assert opt.check(*dot_batch())


@pytest.mark.parametrize("dtype", LOW)
def test_training_follows_the_float32_model(dtype):
    torch.manual_seed(0)
    plain = Dot()
    low, full = stored(dtype, copy.deepcopy(plain)), tw.optimize(plain, tw.Plan(embedding_optimizer=ROWWISE), sample_inputs=dot_batch())
    losses = []
    for i in range(60):
        batch = dot_batch(64, seed=i % 3)
        for model in (low, full):
            loss = ((model(*batch) - (batch[1] % 3).float()) ** 2).mean()
            loss.backward()
            with torch.no_grad():
                for p in model.dense_parameters():
                    p -= 0.05 * p.grad
                    p.grad = None
            losses.append(loss.item())
    assert losses[-2] < 0.3 * losses[0] and abs(losses[-2] - losses[-1]) < 0.1 * losses[1]
    assert low.user.weight.dtype == LOW[dtype] and low.embedding_optimizer.state[low.user.weight]["sum"].dtype == torch.float32
    difference = (low.user.weight.float() - full.user.weight).abs().max() / full.user.weight.abs().max()
    assert 0 < difference < 0.15


def test_the_same_steps_give_the_same_bits():
    results = []
    for threads in (1, 3):
        torch.manual_seed(0)
        opt, before = stored(), torch.get_num_threads()
        torch.set_num_threads(threads)
        for i in range(4):
            opt(*dot_batch(32, seed=i)).square().sum().backward()
            opt.zero_grad()
        torch.set_num_threads(before)
        results.append(weights_of(opt))
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results)))


def test_state_dict_both_ways():
    plain = Dot()
    opt = stored(model=plain)
    state = opt.state_dict()
    assert list(state) == list(plain.state_dict()) and {v.dtype for v in state.values()} == {torch.float32}
    assert torch.equal(state["user.weight"], plain.user.weight.bfloat16().float())
    Dot().load_state_dict(state, strict=True)
    other = Dot()
    for assign in (False, True):
        given = other.state_dict()
        opt.load_state_dict(given, strict=True, assign=assign)
        assert opt.user.weight.dtype == torch.bfloat16 and given["user.weight"].dtype == torch.float32
        torch.testing.assert_close(opt(*dot_batch()), other(*dot_batch()), rtol=1e-2, atol=1e-2)
        before = weights_of(opt)
        opt(*dot_batch()).sum().backward()
        opt.zero_grad()
        assert not torch.equal(before["user.weight"], opt.user.weight), "the tables that were loaded are the ones that are trained"


def test_copies_and_the_way_back():
    opt = stored()
    twin = copy.deepcopy(opt)
    assert twin.user.weight.dtype == torch.bfloat16 and torch.equal(twin(*dot_batch()), opt(*dot_batch()))
    for model in (opt, twin):
        model(*dot_batch()).sum().backward()
        model.zero_grad()
    assert torch.equal(twin.user.weight, opt.user.weight)
    plain = opt.unoptimized()
    assert type(plain.user) is nn.Embedding and type(plain.tags) is nn.EmbeddingBag and plain.user.weight.dtype == torch.float32
    torch.testing.assert_close(plain(*dot_batch()), opt(*dot_batch()), rtol=1e-2, atol=1e-2)
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.user.weight.dtype == torch.bfloat16 and torch.equal(again(*dot_batch()), opt(*dot_batch()))


def test_tied_tables_are_stored_once():
    model = Tied()
    opt = stored(model=model, glob="document", batch=tied_batch())
    assert opt.query.weight is opt.document.weight and opt.query.weight.dtype == torch.bfloat16
    torch.testing.assert_close(opt(*tied_batch()), model(*tied_batch()), rtol=2e-2, atol=2e-2)
    back = opt.unoptimized()
    assert back.query.weight is back.document.weight


def test_frozen_tables_need_no_optimizer():
    plan = tw.Plan(tables={"user": {"dtype": "fp16", "trainable": False}})
    opt = tw.optimize(Dot(), plan, sample_inputs=dot_batch())
    opt(*dot_batch()).sum().backward()
    assert opt.user.weight.grad is None and opt.user.weight.dtype == torch.float16


def test_compiled_and_with_low_precision():
    plan = tw.Plan(precision="bf16", embedding_optimizer=ROWWISE, tables={"user": {"dtype": "bf16"}})
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        opt = tw.optimize(Dot(), plan, sample_inputs=dot_batch())
        run = torch.compile(opt, backend="aot_eager", fullgraph=True) if compiled else opt
        run(*dot_batch()).sum().backward()
        results.append(opt.user.weight.detach().clone())
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


class Own(nn.Embedding):
    pass


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.raw, self.out = Own(5, 3), nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 5, bias=False)
        self.tied = nn.Embedding(5, 3)
        self.out.weight = self.tied.weight

    def forward(self, ids):
        return self.out(self.own(ids) + self.raw[ids] + self.tied(ids))


class ReadsWeights(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.table, self.read = nn.Embedding(5, 3), read

    def forward(self, ids):
        return self.table(ids).sum() + self.read(self.table.weight, ids)


@pytest.mark.parametrize(
    "read",
    [lambda w, ids: w[ids], lambda w, ids: nn.functional.embedding(ids, w), lambda w, ids: torch.ones(2, 3) @ w.t(), lambda w, ids: w.norm()],
    ids=["rows", "lookup", "product", "norm"],
)
def test_other_reads_of_a_stored_table_are_refused(read):
    """They would see rows of another dtype."""
    with pytest.raises(PlanError, match="calling their modules|by calling their module"):
        tw.optimize(ReadsWeights(read), tw.Plan(tables={"table": {"dtype": "bf16", "trainable": False}}), sample_inputs=(torch.tensor([1, 2]),))


def test_what_cannot_be_stored_is_named():
    ids = torch.tensor([1, 2])
    for glob, words in (("own", "'own', a Own, holds it"), ("raw", "a Odd, holds it"), ("tied", "'out', a Linear, holds it")):
        with pytest.raises(PlanError, match=words):
            tw.optimize(Odd(), tw.Plan(tables={glob: {"dtype": "fp16", "trainable": False}}), sample_inputs=(ids,))
    with pytest.raises(PlanError, match="is torch.float64 in the plain model"):
        tw.optimize(Tied(), tw.Plan(tables={"wide": {"dtype": "fp16", "trainable": False}}), sample_inputs=tied_batch())
    for optimizer in (None, tw.Adagrad(lr=0.1)):
        plan = tw.Plan(embedding_optimizer=optimizer, tables={"user": {"dtype": "bf16"}})
        with pytest.raises(PlanError, match="in_backward: true, or trainable: false"):
            tw.optimize(Dot(), plan, sample_inputs=dot_batch())
    with pytest.raises(PlanError, match="dtype is 'int4'; it must be fp32"):
        tw.Plan(tables={"user": {"dtype": "int4"}})
    with pytest.raises(PlanError, match="no table matches 'usr'"):
        tw.optimize(Dot(), tw.Plan(tables={"usr": {"dtype": "bf16"}}), sample_inputs=dot_batch())
