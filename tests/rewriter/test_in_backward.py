"""Updates inside the backward: one per table after all its contributions; refused where the loop does what they cannot follow."""
from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from small_models import DIM, ROWS, Dot, Tied, assert_close, dot_batch, tied_batch, weights_of
from torch import nn
from torch.utils.checkpoint import checkpoint

KINDS = {
    "sgd": tw.SGD(lr=0.1, in_backward=True),
    "adagrad": tw.Adagrad(lr=0.1, in_backward=True),
    "rowwise": tw.RowwiseAdagrad(lr=0.1, in_backward=True),
    "adam": tw.Adam(lr=0.1, in_backward=True),
    "decay": tw.Adagrad(lr=0.1, weight_decay=0.1, in_backward=True),
}


def three(make, batch, chosen=KINDS["adagrad"]):
    """The same model updated in the backward and, as the reference, by ``embedding_optimizer.step()``."""
    torch.manual_seed(0)
    model = make()
    stepped = {**chosen.settings(), "in_backward": False}
    reference = tw.optimize(copy.deepcopy(model), tw.Plan(embedding_optimizer=type(chosen)(**stepped)), sample_inputs=batch)
    opt = tw.optimize(model, tw.Plan(embedding_optimizer=chosen), sample_inputs=batch)
    assert opt.report.coverage["updates"] == (len(opt.table_names()), len(opt.table_names()))
    return opt, reference


def train(model, loss, steps=3):
    for seed in range(steps):
        model.zero_grad()
        loss(model, seed).backward()
        if not model.embedding_optimizer.param_groups[0]["in_backward"]:
            model.embedding_optimizer.step()
    model.zero_grad()


@pytest.mark.parametrize("chosen", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("make", "batch"), [(Dot, dot_batch), (Tied, tied_batch)])
def test_same_as_one_step_after_the_backward(make, batch, chosen):
    """Tied is one table under two names, and tables of two dtypes, so two launches."""
    opt, reference = three(make, batch(), chosen)
    before = weights_of(opt)
    for model in (opt, reference):
        train(model, lambda m, seed: m(*batch(seed=seed)).square().sum())
    assert_close(weights_of(reference), weights_of(opt))
    for name in opt.table_names():
        assert not torch.equal(before[name], weights_of(opt)[name])


LOSSES = {
    "two forwards in one loss": lambda m, s: (m(*dot_batch(seed=s)) - m(*dot_batch(seed=s + 9))).square().sum(),
    "the same batch twice": lambda m, s: m(*dot_batch(seed=s)).square().sum() + m(*dot_batch(seed=s)).sum(),
    "checkpointed": lambda m, s: checkpoint(m, *dot_batch(seed=s), use_reentrant=False).square().sum(),
    "checkpointed, reentrant": lambda m, s: checkpoint(
        m, dot_batch(seed=s)[0].requires_grad_(), *dot_batch(seed=s)[1:], use_reentrant=True
    ).square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_one_update_after_all_contributions(loss):
    """Adagrad is not linear in the gradient: two updates instead of one would show."""
    opt, reference = three(Dot, dot_batch())
    for model in (opt, reference):
        train(model, loss)
    assert_close(weights_of(reference), weights_of(opt))
    steps = {int(s["step"]) for s in opt.embedding_optimizer.state.values()}
    assert steps == {3}


def test_retain_graph_updates_at_each_backward():
    opt, reference = three(Dot, dot_batch())
    loss = opt(*dot_batch()).square().sum()
    loss.backward(retain_graph=True)
    once = weights_of(opt)
    train(reference, lambda m, s: m(*dot_batch()).square().sum(), steps=1)
    assert_close(weights_of(reference), once)
    opt.zero_grad()
    loss.backward()
    assert not torch.equal(once["user.weight"], opt.user.weight)


def test_tables_of_the_plan_only():
    plan = tw.Plan(tables={"user": tw.TablePlan(embedding_optimizer=KINDS["sgd"])})
    model = Dot()
    rest = [p for n, p in model.named_parameters() if n != "user.weight"]
    opt, optim = tw.optimize(model, plan, sample_inputs=dot_batch(), optimizer=torch.optim.SGD(rest, lr=0.1))
    plain = opt.unoptimized()
    mine = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        optim.zero_grad(), mine.zero_grad()
        opt(*dot_batch()).square().sum().backward(), plain(*dot_batch()).square().sum().backward()
        optim.step(), mine.step()
    assert_close(weights_of(plain), weights_of(opt))


def test_a_forward_without_gradient_updates_nothing():
    opt, _ = three(Dot, dot_batch())
    before = weights_of(opt)
    with torch.no_grad():
        opt(*dot_batch())
    opt.eval()(*dot_batch()).detach()
    assert_close(before, weights_of(opt))


def test_gradients_reach_the_dense_part_and_sample_weights():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(ROWS, DIM, mode="sum")
            self.scale = nn.Parameter(torch.rand(4, 3))

        def forward(self, ids):
            return self.bag(ids, per_sample_weights=self.scale)

    ids = (torch.randint(0, ROWS, (4, 3)),)
    opt, reference = three(Weighted, ids)
    opt(*ids).square().sum().backward()
    reference(*ids).square().sum().backward()
    torch.testing.assert_close(opt.scale.grad, reference.scale.grad)


# --- refused ------------------------------------------------------------------------------------------------------------------


def unchanged(opt, before):
    return all(torch.equal(before[n], weights_of(opt)[n]) for n in opt.table_names())


def test_accumulation_is_refused():
    opt, _ = three(Dot, dot_batch())
    opt(*dot_batch()).square().sum().backward()
    before = weights_of(opt)
    with pytest.raises(tw.InBackwardError, match="over.0.weight.*accumulated.*in_backward: false"):
        opt(*dot_batch()).square().sum().backward()
    assert unchanged(opt, before)
    opt.zero_grad()
    opt(*dot_batch()).square().sum().backward()
    assert not unchanged(opt, before)


def test_zero_grad_that_keeps_zeros_is_not_accumulation():
    opt, reference = three(Dot, dot_batch())
    for model in (opt, reference):
        for seed in range(3):
            model.zero_grad(set_to_none=False)
            model(*dot_batch(seed=seed)).square().sum().backward()
            if model is reference:
                model.embedding_optimizer.step()
    assert_close(weights_of(reference), weights_of(opt))


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_], ids=["norm", "value"])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_is_refused(clip, foreach):
    opt, _ = three(Dot, dot_batch())
    opt(*dot_batch()).square().sum().backward()
    with pytest.raises(tw.InBackwardError, match="clip.*dense_parameters|dense_parameters"):
        clip(opt.parameters(), 1.0, foreach=foreach)
    clip(list(opt.dense_parameters()), 1.0, foreach=foreach)
    with pytest.raises(tw.InBackwardError, match="dense_parameters"):
        tw.clip_grad_norm_(opt, 1.0)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), torch.optim.Adam, torch.optim.Adagrad])
def test_an_optimizer_that_holds_the_tables_is_refused(make):
    opt, _ = three(Dot, dot_batch())
    opt(*dot_batch()).square().sum().backward()
    before = weights_of(opt)
    with pytest.raises(tw.InBackwardError, match="already used up"):
        make(opt.parameters()).step()
    assert unchanged(opt, before)


def test_fp16_autocast_is_refused_and_bf16_is_not():
    opt, _ = three(Dot, dot_batch())
    before = weights_of(opt)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(tw.InBackwardError, match="bf16 autocast"):
        opt(*dot_batch())
    assert unchanged(opt, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = opt(*dot_batch()).square().sum()
    loss.backward()
    assert not unchanged(opt, before)


def test_a_grad_scaler_is_refused():
    opt, _ = three(Dot, dot_batch())
    before = weights_of(opt)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pytest.raises(tw.InBackwardError, match="GradScaler.*No table was changed"):
        scaler.scale(opt(*dot_batch()).square().sum()).backward()
    assert unchanged(opt, before)
    del scaler
    opt.zero_grad()
    opt(*dot_batch()).square().sum().backward()
    assert not unchanged(opt, before)


def test_a_grad_scaler_made_later_is_refused():
    opt, _ = three(Dot, dot_batch())
    for _ in range(3):
        opt.zero_grad()
        opt(*dot_batch()).square().sum().backward()
    before = weights_of(opt)
    scaler = torch.amp.GradScaler("cpu")
    opt.zero_grad()
    with pytest.raises(tw.InBackwardError, match="GradScaler"):
        scaler.scale(opt(*dot_batch()).square().sum()).backward()
    assert unchanged(opt, before)
    off = torch.amp.GradScaler("cpu", enabled=False)
    del scaler
    opt.zero_grad()
    off.scale(opt(*dot_batch()).square().sum()).backward()
    assert not unchanged(opt, before), "one that is not enabled scales nothing"


def test_eval_mode_is_watched_too():
    opt, _ = three(Dot, dot_batch())
    opt.eval()
    opt(*dot_batch()).square().sum().backward()
    before = weights_of(opt)
    with pytest.raises(tw.InBackwardError, match="accumulated"):
        opt(*dot_batch()).square().sum().backward()
    assert unchanged(opt, before)


@pytest.fixture
def compiled():
    """The model as ``torch.compile`` runs it: the start of its backward is not seen."""
    torch._dynamo.reset()
    opt, _ = three(Dot, dot_batch())
    yield opt, torch.compile(opt, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_compiled_loops_are_watched_too(compiled, set_to_none):
    opt, run = compiled
    for _ in range(3):
        opt.zero_grad(set_to_none=set_to_none)
        run(*dot_batch()).square().sum().backward()
        nn.utils.clip_grad_norm_(opt.dense_parameters(), 1.0)
    with pytest.raises(tw.InBackwardError, match="already used up"):
        nn.utils.clip_grad_norm_(opt.parameters(), 1.0)
    opt.zero_grad(set_to_none=set_to_none)
    run(*dot_batch()).square().sum().backward()
    before = weights_of(opt)
    with pytest.raises(tw.InBackwardError, match="accumulated.*No table was changed"):
        run(*dot_batch()).square().sum().backward()
    assert unchanged(opt, before)


def test_compiled_loss_scaling_is_refused(compiled):
    opt, run = compiled
    before = weights_of(opt)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(Exception, match="bf16 autocast"):
        run(*dot_batch())
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(tw.InBackwardError, match="GradScaler"):
        scaler.scale(run(*dot_batch()).square().sum()).backward()
    assert unchanged(opt, before)


def test_step_of_the_plans_optimizer_is_refused():
    opt, _ = three(Dot, dot_batch())
    with pytest.raises(RuntimeError, match="embedding_optimizer.step.. was called, but the plan updates every table inside"):
        opt.embedding_optimizer.step()


def test_a_failed_backward_changes_nothing():
    opt, reference = three(Dot, dot_batch())
    before = weights_of(opt)

    def fail(grad):
        raise ValueError("a hook of the user's")

    x = dot_batch()[0].requires_grad_()
    x.register_hook(fail)
    with pytest.raises(ValueError, match="a hook of the user's"):
        opt(x, *dot_batch()[1:]).square().sum().backward()
    assert unchanged(opt, before) and not opt.embedding_optimizer.state
    for model in (opt, reference):
        train(model, lambda m, seed: m(*dot_batch(seed=seed)).square().sum())
    assert_close(weights_of(reference), weights_of(opt))


def test_reading_the_gradient_of_an_updated_table_is_an_error_that_says_why():
    opt, _ = three(Dot, dot_batch())
    opt(*dot_batch()).square().sum().backward()
    grad = opt.user.weight.grad
    assert grad.shape == (ROWS, DIM) and grad.dtype == torch.float32
    for read in (lambda: grad.sum(), lambda: grad * 2, lambda: grad.norm(), lambda: float(grad[0, 0]), lambda: grad.to_dense()):
        with pytest.raises(tw.InBackwardError, match="updated inside the backward"):
            read()
    assert opt.over[0].weight.grad.sum() is not None


def test_grad_of_something_else_updates_too_and_once():
    """``torch.autograd.grad`` runs a backward: tables on its way are updated only if the backward reaches them."""
    opt, _ = three(Dot, dot_batch())
    before = weights_of(opt)
    x = dot_batch()[0].requires_grad_()
    torch.autograd.grad(opt(x, *dot_batch()[1:]).sum(), [x])
    steps = {int(s["step"]) for s in opt.embedding_optimizer.state.values()}
    assert unchanged(opt, before) if not steps else steps == {1}


class Weighted(nn.Module):
    """Two tables in one launch that may make gradients too."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.EmbeddingBag(ROWS, DIM, mode="sum"), nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.scale = nn.Parameter(torch.rand(4, 3))

    def forward(self, ids):
        return self.one(ids, per_sample_weights=self.scale) + self.two(ids)


def test_a_backward_of_some_of_a_launchs_tables_is_refused():
    ids = (torch.randint(0, ROWS, (4, 3)),)
    opt, reference = three(Weighted, ids)
    before = weights_of(opt)
    for table in (opt.one.weight, opt.two.weight):
        with pytest.raises(tw.InBackwardError, match="names some of the tables"):
            opt(*ids).square().sum().backward(inputs=[table, opt.scale])
        opt.zero_grad()
    opt(*ids).square().sum().backward(inputs=[opt.scale])
    assert unchanged(opt, before)
    opt.zero_grad()
    opt(*ids).square().sum().backward(inputs=list(opt.parameters()))
    reference(*ids).square().sum().backward()
    reference.embedding_optimizer.step()
    assert_close(weights_of(reference), weights_of(opt))


@pytest.mark.parametrize(("make", "batch", "name"), [(Dot, dot_batch(), "user"), (Weighted, (torch.zeros(4, 3, dtype=torch.int64),), "two")])
def test_the_gradient_of_an_updated_table_is_not_given(make, batch, name):
    opt, _ = three(make, batch)
    before = weights_of(opt)
    with pytest.raises(tw.InBackwardError, match="asked for the gradient of a table that is updated inside the backward.*in_backward: false"):
        torch.autograd.grad(opt(*batch).sum(), [getattr(opt, name).weight])
    assert unchanged(opt, before)


def test_several_models_do_not_mix():
    first, one = three(Dot, dot_batch())
    second, two = three(Tied, tied_batch())
    (first(*dot_batch()).square().sum() + second(*tied_batch()).square().sum()).backward()
    for model, batch in ((one, dot_batch()), (two, tied_batch())):
        model(*batch).square().sum().backward()
        model.embedding_optimizer.step()
    assert_close(weights_of(one), weights_of(first))
    assert_close(weights_of(two), weights_of(second))
