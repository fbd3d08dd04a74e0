"""The user's optimizer goes in and a real one comes out: same class, same state, same steps, touched rows only."""
from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from small_models import Dot, Tied, assert_close, dot_batch, tied_batch, weights_of
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop, SparseAdam
from torch.optim.optimizer import register_optimizer_step_pre_hook

EXACT = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd, maximize": lambda p: SGD(p, lr=0.1, maximize=True),
    "adagrad": lambda p: Adagrad(p, lr=0.1),
    "adagrad, all options": lambda p: Adagrad(p, lr=0.1, lr_decay=0.1, eps=1e-3, initial_accumulator_value=0.5),
}


def both(make, model_class=Dot, batch=None, plan="auto"):
    """A plain and an optimized model with the same weights, each with its optimizer."""
    torch.manual_seed(0)
    plain = model_class()
    model = copy.deepcopy(plain)
    mine, his = make(plain.parameters()), make(model.parameters())
    opt, optim = tw.optimize(model, plan, sample_inputs=batch or dot_batch(), optimizer=his)
    return plain, mine, opt, optim, his


def step(model, optimizer, batch, scale=1.0):
    optimizer.zero_grad()
    (model(*batch).square().sum() * scale).backward()
    optimizer.step()


def state_of(optimizer):
    return {f"{i}.{k}": v.clone() if isinstance(v, torch.Tensor) else torch.tensor(v)
            for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}  # fmt: skip


# --- what it is ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(("model", "batch"), [(Dot, dot_batch), (Tied, tied_batch)])
def test_three_steps_give_the_same_weights_and_state(make, model, batch):
    plain, mine, opt, optim, his = both(make, model, batch())
    assert isinstance(optim, type(his)) and isinstance(optim, torch.optim.Optimizer) and optim is not his
    assert opt.report.coverage["updates"][0] == len(opt.table_names())
    for seed in range(3):
        step(plain, mine, batch(seed=seed))
        step(opt, optim, batch(seed=seed))
    assert_close(weights_of(plain), weights_of(opt))
    assert_close(state_of(mine), state_of(optim))


def test_gradients_are_coalesced_sparse_rows_and_only_they_move():
    _, _, opt, optim, _ = both(EXACT["adagrad"])
    before = weights_of(opt)
    batch = dot_batch(12)
    opt(*batch).sum().backward()
    grad = opt.user.weight.grad
    assert grad.is_sparse and grad.is_coalesced()
    touched = sorted(set(batch[1].tolist()))
    assert grad.indices()[0].tolist() == touched and len(touched) < 12, "the batch has a duplicate"
    optim.step()
    rest = [r for r in range(20) if r not in touched]
    assert torch.equal(opt.user.weight[rest], before["user.weight"][rest])
    assert not torch.equal(opt.user.weight[touched], before["user.weight"][touched])


KEPT = {
    "momentum": (lambda p: SGD(p, lr=0.1, momentum=0.9), "SGD with momentum=0.9 moves rows that were not looked up"),
    "sgd decay": (lambda p: SGD(p, lr=0.1, weight_decay=0.1), "SGD with weight_decay=0.1 decays rows"),
    "adagrad decay": (lambda p: Adagrad(p, weight_decay=0.1), "Adagrad with weight_decay=0.1 decays rows"),
    "adagrad eps 0": (lambda p: Adagrad(p, eps=0), "Adagrad with eps=0 and no initial accumulator"),
    "adam": (lambda p: Adam(p), "Adam moves rows that were not looked up; `numerics: approximate` allows"),
    "adamw": (lambda p: AdamW(p), "AdamW moves rows that were not looked up"),
    "amsgrad": (lambda p: Adam(p, amsgrad=True), "Adam with amsgrad has no row-wise form"),
    "adam decay": (lambda p: Adam(p, weight_decay=0.1), "(not decoupled) has no row-wise form"),
    "rmsprop": (lambda p: RMSprop(p), "RMSprop is not torch's own SGD, Adagrad, SparseAdam, Adam or AdamW"),
    "adadelta": (lambda p: Adadelta(p), "Adadelta is not torch's own"),
    "a subclass": (lambda p: type("MySGD", (SGD,), {})(p, lr=0.1), "MySGD is not torch's own"),
    "differentiable": (lambda p: SGD(p, lr=0.1, differentiable=True), "differentiable or capturable"),
}


@pytest.mark.parametrize(("make", "reason"), KEPT.values(), ids=KEPT)
def test_optimizers_that_are_kept_with_the_reason(make, reason):
    plain, mine, opt, optim, his = both(make)
    assert optim is his
    rows = [r for r in opt.report.records if r.kind == "updates"]
    assert len(rows) == 3 and all(r.status == "SKIPPED" and reason in r.reason for r in rows), rows
    assert reason in str(opt.report)
    if "differentiable" in reason or "eps=0" in reason:
        return  # torch refuses the one and gives NaN for the other
    for seed in range(2):
        step(plain, mine, dot_batch(seed=seed))
        step(opt, optim, dot_batch(seed=seed))
    assert_close(weights_of(plain), weights_of(opt))


def test_groups_decide_one_by_one_and_a_hook_keeps_a_table():
    model = Dot()
    model.tags.weight.register_hook(lambda g: g * 2)
    rest = [p for n, p in model.named_parameters() if n not in ("user.weight", "item.weight", "tags.weight")]
    optimizer = SGD([{"params": [model.user.weight], "momentum": 0.5}, {"params": [model.item.weight, model.tags.weight, *rest]}], lr=0.1)
    opt, optim = tw.optimize(model, sample_inputs=dot_batch(), optimizer=optimizer)
    rows = {r.subject: r for r in opt.report.records if r.kind == "updates"}
    assert rows["item.weight"].status == "APPLIED" and "momentum=0.5" in rows["user.weight"].reason
    assert "hook" in rows["tags.weight"].reason
    opt(*dot_batch()).sum().backward()
    assert opt.item.weight.grad.is_sparse and not opt.user.weight.grad.is_sparse and not opt.tags.weight.grad.is_sparse
    optim.step()


def test_tables_the_optimizer_does_not_hold_are_left_alone():
    model = Dot()
    opt, optim = tw.optimize(model, sample_inputs=dot_batch(), optimizer=SGD(model.over.parameters(), lr=0.1))
    assert {r.reason for r in opt.report.records if r.kind == "updates"} == {"the SGD passed as optimizer= does not hold it"}
    opt(*dot_batch()).sum().backward()
    assert not opt.user.weight.grad.is_sparse


def test_two_optimizers_for_one_table_are_an_error():
    model = Dot()
    with pytest.raises(tw.PlanError, match="table 'user.weight' has two optimizers: the plan's sgd and the Adagrad"):
        tw.optimize(model, tw.Plan(embedding_optimizer=tw.SGD()), sample_inputs=dot_batch(), optimizer=Adagrad(model.parameters()))


# --- approximate --------------------------------------------------------------------------------------------------------------


class OneTable(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.table = nn.Embedding(20, 4, sparse=sparse)

    def forward(self, ids):
        return self.table(ids)


def test_approximate_adam_is_sparse_adam():
    torch.manual_seed(0)
    plain = OneTable(sparse=True)
    lazy, already = OneTable(), OneTable(sparse=True)
    for each in (lazy, already):
        each.load_state_dict(plain.state_dict())
    ids = [torch.tensor(i) for i in ([1, 2, 2], [2, 3, 19], [0, 1, 1])]
    reference = SparseAdam(plain.parameters(), lr=0.1)
    approximate = tw.Plan(numerics="approximate")
    opt, optim = tw.optimize(lazy, approximate, sample_inputs=(ids[0],), optimizer=Adam(lazy.parameters(), lr=0.1))
    exact, exact_optim = tw.optimize(already, sample_inputs=(ids[0],), optimizer=SparseAdam(already.parameters(), lr=0.1))
    assert opt.report.coverage["updates"] == exact.report.coverage["updates"] == (1, 1)
    for batch in ids:
        for model, optimizer in ((plain, reference), (opt, optim), (exact, exact_optim)):
            step(model, optimizer, (batch,))
    assert_close(weights_of(plain), weights_of(opt))
    assert_close(weights_of(plain), weights_of(exact))
    assert_close(state_of(reference), state_of(exact_optim))


# --- a real optimizer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [EXACT["sgd"], EXACT["adagrad, all options"]], ids=["sgd", "adagrad"])
def test_state_dicts_are_interchangeable(make):
    plain, mine, opt, optim, _ = both(make)
    for seed in range(2):
        step(plain, mine, dot_batch(seed=seed))
        step(opt, optim, dot_batch(seed=seed))
    assert optim.state_dict().keys() == mine.state_dict().keys()
    assert optim.state_dict()["param_groups"] == mine.state_dict()["param_groups"]
    saved, of_ours = copy.deepcopy(mine.state_dict()), copy.deepcopy(optim.state_dict())
    mine.load_state_dict(of_ours)
    optim.load_state_dict(saved)
    step(plain, mine, dot_batch(seed=5))
    step(opt, optim, dot_batch(seed=5))
    assert_close(weights_of(plain), weights_of(opt))
    assert_close(state_of(mine), state_of(optim))


def test_the_users_own_object_shares_groups_and_state():
    plain, mine, opt, optim, his = both(EXACT["adagrad"])
    optim.param_groups[0]["lr"] = 0.5
    assert his.param_groups[0]["lr"] == 0.5
    mine.param_groups[0]["lr"] = 0.5
    step(plain, mine, dot_batch())
    step(opt, optim, dot_batch())
    assert his.state is optim.state
    step(plain, mine, dot_batch(seed=1))
    step(opt, his, dot_batch(seed=1))  # stepping the original does the same, only slower
    assert_close(weights_of(plain), weights_of(opt))


def test_the_users_own_object_after_loading_a_state():
    plain, mine, opt, optim, his = both(EXACT["adagrad"])
    step(plain, mine, dot_batch())
    optim.load_state_dict(copy.deepcopy(mine.state_dict()))
    opt.load_state_dict(plain.state_dict())
    step(plain, mine, dot_batch(seed=1))
    step(opt, optim, dot_batch(seed=1))
    assert_close(weights_of(plain), weights_of(opt))


@pytest.mark.parametrize("on", ["before", "after"])
def test_schedulers(on):
    torch.manual_seed(0)
    plain = Dot()
    model = copy.deepcopy(plain)
    mine, his = SGD(plain.parameters(), lr=0.4), SGD(model.parameters(), lr=0.4)
    schedule = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
    first = schedule(mine)
    second = schedule(his) if on == "before" else None
    opt, optim = tw.optimize(model, sample_inputs=dot_batch(), optimizer=his)
    second = second or schedule(optim)
    for seed in range(3):
        step(plain, mine, dot_batch(seed=seed))
        step(opt, optim, dot_batch(seed=seed))
        first.step(), second.step()
    assert optim.param_groups[0]["lr"] == mine.param_groups[0]["lr"] == 0.05
    assert_close(weights_of(plain), weights_of(opt))


def test_hooks_run_once_and_a_closure_is_evaluated_once():
    _, _, opt, optim, _ = both(EXACT["sgd"])
    seen = []
    optim.register_step_pre_hook(lambda *_: seen.append("pre"))
    optim.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        optim.zero_grad()
        loss = opt(*dot_batch()).sum()
        loss.backward()
        seen.append("closure")
        return loss

    before = weights_of(opt)
    loss = optim.step(closure)
    assert seen == ["pre", "closure", "post"] and torch.is_tensor(loss)
    assert not torch.equal(before["user.weight"], opt.user.weight)


def test_a_global_hook_of_all_optimizers_runs_once():
    _, _, opt, optim, _ = both(EXACT["adagrad"])
    seen = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(type(optimizer)))
    try:
        step(opt, optim, dot_batch())
    finally:
        handle.remove()
    assert seen == [type(optim)]


def test_a_profiler_sees_what_torchs_own_optimizer_shows():
    model = Dot()
    opt, optim = tw.optimize(model, optimizer=Adagrad(model.parameters()), sample_inputs=dot_batch())
    opt(*dot_batch()).sum().backward()
    with torch.profiler.profile() as seen:
        optim.step()
        optim.zero_grad()
    names = {event.name for event in seen.events()}
    assert {"Optimizer.step#Adagrad.step", "Optimizer.zero_grad#Adagrad.zero_grad"} <= names


def test_accumulated_gradients():
    plain, mine, opt, optim, _ = both(EXACT["adagrad"])
    for model, optimizer in ((plain, mine), (opt, optim)):
        for seed in range(3):
            model(*dot_batch(seed=seed)).square().sum().backward()
        optimizer.step()
    assert_close(weights_of(plain), weights_of(opt))


def test_zero_grad_both_ways():
    for set_to_none in (True, False):
        plain, mine, opt, optim, _ = both(EXACT["adagrad"])
        for seed in range(2):
            for model, optimizer in ((plain, mine), (opt, optim)):
                optimizer.zero_grad(set_to_none=set_to_none)
                model(*dot_batch(seed=seed)).square().sum().backward()
                optimizer.step()
        assert_close(weights_of(plain), weights_of(opt))


def test_grad_scaler():
    plain, mine, opt, optim, _ = both(EXACT["adagrad"])
    for model, optimizer in ((plain, mine), (opt, optim)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for seed in range(2):
            optimizer.zero_grad()
            scaler.scale(model(*dot_batch(seed=seed)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_close(weights_of(plain), weights_of(opt))


@pytest.mark.parametrize("clip", [
    lambda p: nn.utils.clip_grad_norm_(p, 0.01), lambda p: nn.utils.clip_grad_norm_(p, 0.01, foreach=False),
    lambda p: nn.utils.clip_grad_value_(p, 1e-4), lambda p: nn.utils.clip_grad_value_(p, 1e-4, foreach=False),
], ids=["norm", "norm, one by one", "value", "value, one by one"])  # fmt: skip
def test_clipping_is_right_or_loud(clip):
    plain, mine, opt, optim, _ = both(EXACT["sgd"])
    for model in (plain, opt):
        model(*dot_batch()).square().sum().backward()
    clip(list(plain.parameters()))
    try:
        clip(list(opt.parameters()))
    except (RuntimeError, NotImplementedError):
        return
    mine.step(), optim.step()
    assert_close(weights_of(plain), weights_of(opt))


def test_clipping_by_the_norm_of_sparse_gradients():
    plain, mine, opt, optim, _ = both(EXACT["sgd"])
    for model in (plain, opt):
        model(*dot_batch()).square().sum().backward()
    assert any(p.grad.is_sparse for p in opt.parameters())
    norm = tw.clip_grad_norm_(opt, 0.01, error_if_nonfinite=True)
    torch.testing.assert_close(norm.float(), nn.utils.clip_grad_norm_(plain.parameters(), 0.01))
    mine.step(), optim.step()
    assert_close(weights_of(plain), weights_of(opt))
    next(p for p in opt.parameters() if not p.grad.is_sparse).grad.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="nothing was clipped"):
        tw.clip_grad_norm_(opt, 0.01, error_if_nonfinite=True)


def test_a_parameter_added_later_is_stepped():
    _, _, opt, optim, his = both(EXACT["sgd"])
    extra = nn.Parameter(torch.ones(2))
    optim.add_param_group({"params": [extra]})
    extra.sum().backward()
    optim.step()
    assert extra.tolist() == pytest.approx([0.9, 0.9]) and len(his.param_groups) == 2


@pytest.mark.parametrize("in_backward", [False, True])
def test_the_plans_optimizer_takes_no_group_later(in_backward):
    """A copy and a loaded state keep the groups that they came with."""
    optim = tw.optimize(Dot(), tw.Plan(embedding_optimizer=tw.Adagrad(in_backward=in_backward)), sample_inputs=dot_batch()).embedding_optimizer
    for each in (optim, copy.deepcopy(optim)):
        each.load_state_dict(each.state_dict())
        for given in (nn.Parameter(torch.ones(2)), ("over.0.weight", nn.Parameter(torch.ones(2)))):
            with pytest.raises(RuntimeError, match="said by the plan.*an optimizer of yours"):
                each.add_param_group({"params": [given]})


def test_copies_of_the_optimizer_step_their_own_model():
    _, _, opt, optim, _ = both(EXACT["adagrad"])
    step(opt, optim, dot_batch())
    model_and_optimizer = copy.deepcopy((opt, optim))
    kept = weights_of(opt)
    step(*model_and_optimizer, dot_batch(seed=1))
    assert_close(kept, weights_of(opt))
    step(opt, optim, dot_batch(seed=1))
    assert_close(weights_of(opt), weights_of(model_and_optimizer[0]))


# --- the plan's optimizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [tw.SGD(lr=0.1), tw.Adagrad(lr=0.1, eps=1e-10)], ids=["sgd", "adagrad"])
def test_the_plans_optimizer_is_torchs(chosen):
    torch.manual_seed(0)
    plain = Dot()
    model = copy.deepcopy(plain)
    opt = tw.optimize(model, tw.Plan(embedding_optimizer=chosen), sample_inputs=dot_batch())
    mine = (SGD if chosen.key == "sgd" else Adagrad)(plain.parameters(), lr=0.1)
    dense = type(mine)(opt.dense_parameters(), lr=0.1)
    assert isinstance(opt.embedding_optimizer, torch.optim.Optimizer)
    for seed in range(3):
        step(plain, mine, dot_batch(seed=seed))
        opt.embedding_optimizer.zero_grad()
        step(opt, dense, dot_batch(seed=seed))
        opt.embedding_optimizer.step()
    assert_close(weights_of(plain), weights_of(opt))
    state = copy.deepcopy(opt.embedding_optimizer.state_dict())
    again = tw.optimize(copy.deepcopy(plain), opt.plan, sample_inputs=dot_batch())
    again.embedding_optimizer.load_state_dict(state)
    for each in (opt, again):
        each.zero_grad()
        each(*dot_batch(seed=7)).square().sum().backward()
        each.embedding_optimizer.step()
    assert_close({"user": opt.user.weight.detach()}, {"user": again.user.weight.detach()})


def test_rowwise_adagrad_and_decay_by_hand():
    torch.manual_seed(0)
    model = OneTable()
    before = model.table.weight.detach().clone()
    plan = tw.Plan(embedding_optimizer=tw.RowwiseAdagrad(lr=0.1, eps=1e-3, weight_decay=0.5))
    opt = tw.optimize(model, plan, sample_inputs=(torch.tensor([1, 1, 4]),))
    opt(torch.tensor([1, 1, 4])).square().sum().backward()
    opt.embedding_optimizer.step()
    for row, times in ((1, 2), (4, 1), (2, 0)):
        g = 2 * before[row] * times
        moved = before[row] * (1 - 0.1 * 0.5) - 0.1 * g / (g.square().mean().sqrt() + 1e-3) if times else before[row]
        torch.testing.assert_close(model.table.weight[row].detach(), moved)
    assert opt.embedding_optimizer.state[opt.table.weight]["sum"].shape == (20,)
