"""``accumulate: n``: what the plain loop does that steps at every n-th batch, bit for bit."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
from small_models import Dot, dot_batch, untimed, weights_of
from tablewright.rewriter.accumulate import step_by_rounds

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def made(make, **plan):
    torch.manual_seed(0)
    model = Dot()
    return tw.optimize(model, {"version": 1, "passes": untimed(), **plan}, optimizer=make(model), sample_inputs=dot_batch())


def loss(opt, seed):
    return opt(*dot_batch(seed=seed)).square().sum()


def same(one, other):
    for (name, a), b in zip(weights_of(one).items(), weights_of(other).values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False], ids=["cleared before", "cleared after"])
def test_it_is_the_loop_that_steps_at_every_nth_batch(make, first):
    opt, optimizer = made(lambda m: make(m.parameters()), training={"accumulate": 3})
    plain, other = made(lambda m: make(m.parameters()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    slower = torch.optim.lr_scheduler.StepLR(other, 1, 0.5)
    for seed in range(7):  # the last round is incomplete
        if first:
            (opt if seed % 2 else optimizer).zero_grad()
        loss(opt, seed).backward(), loss(plain, seed).backward()
        optimizer.step()
        if not first:
            (opt if seed % 2 else optimizer).zero_grad()
        scheduler.step()
        if seed % 3 == 2:
            other.step(), other.zero_grad(), slower.step()
        same(opt, plain)
    assert opt.over[0].weight.grad is not None
    assert type(optimizer).__name__ == type(other).__name__ and optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]


def test_the_plans_own_optimizer_waits_too():
    plan = {"embedding_optimizer": {"rowwise_adagrad": {"lr": 0.1}}}
    opt, optimizer = made(lambda m: torch.optim.SGD(m.over.parameters(), lr=0.1), training={"accumulate": 2}, **plan)
    plain, other = made(lambda m: torch.optim.SGD(m.over.parameters(), lr=0.1), **plan)
    for seed in range(6):
        loss(opt, seed).backward(), loss(plain, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        opt.embedding_optimizer.step()
        opt.embedding_optimizer.zero_grad()
        if seed % 2:
            for each in (other, plain.embedding_optimizer):
                each.step(), each.zero_grad()
        same(opt, plain)
    assert all(int(s["step"]) == 3 for s in opt.embedding_optimizer.state.values())


def test_a_batch_cannot_be_dropped_in_the_middle():
    opt, optimizer = made(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), training={"accumulate": 3})
    loss(opt, 0).backward()
    optimizer.zero_grad()  # the first of a round can
    loss(opt, 0).backward()
    optimizer.step()
    loss(opt, 1).backward()
    for clear in (optimizer.zero_grad, opt.zero_grad):
        with pytest.raises(tw.InBackwardError, match="cannot be taken out again"):
            clear()


def test_what_cannot_wait_is_refused():
    with pytest.raises(tw.PlanError, match="in_backward: true and training.accumulate is 2"):
        tw.Plan(training={"accumulate": 2}, embedding_optimizer=tw.SGD(in_backward=True))
    with pytest.raises(tw.PlanError, match="tables.user.embedding_optimizer is in_backward: true"):
        tw.Plan(training={"accumulate": 2}, tables={"user": {"embedding_optimizer": {"sgd": {"in_backward": True}}}})
    with pytest.raises(tw.PlanError, match="tables.user is in tiers"):
        tw.Plan(training={"accumulate": 2}, tables={"user": {"storage": {"cache": "1MB", "path": "x"}}})
    with pytest.raises(tw.PlanError, match="1 or more"):
        tw.Plan(training={"accumulate": 0})
    with pytest.raises(tw.PlanError, match="LBFGS runs several backwards"):
        made(lambda m: torch.optim.LBFGS(m.parameters()), training={"accumulate": 2})
    opt, optimizer = made(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), training={"accumulate": 2})
    opt.__dict__["_sharded"] = object()
    with pytest.raises(tw.PlanError, match="over several ranks"):
        step_by_rounds(opt, optimizer, 2)
    opt.__dict__["_sharded"] = None
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(opt, 0)).backward()
    with pytest.raises(tw.InBackwardError, match="enabled GradScaler.*unscaled before"):
        scaler.step(optimizer)


def test_an_optimizer_that_is_not_there_is_asked_for():
    planned = {"embedding_optimizer": {"rowwise_adagrad": {"lr": 0.1}}}
    for more, optimizer in (({}, None), (planned, None)):
        torch.manual_seed(0)
        with pytest.raises(tw.PlanError, match="no optimizer that optimize.. was given holds"):
            tw.optimize(Dot(), {"version": 1, "training": {"accumulate": 2}, **more}, optimizer=optimizer, sample_inputs=dot_batch())
