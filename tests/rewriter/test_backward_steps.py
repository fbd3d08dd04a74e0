"""``in_backward: all``: the plain loop's numbers bit for bit, gradients freed at once, and loops it cannot follow refused."""
from __future__ import annotations

import copy
import pickle

import pytest
import tablewright as tw
import torch
from small_models import Dot, Tied, dot_batch, tied_batch, untimed, weights_of
from torch import nn
from torch.utils.checkpoint import checkpoint

ALL = {"version": 1, "training": {"in_backward": "all"}, "passes": untimed()}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def made(make=OPTIMIZERS["momentum"], model=Dot, batch=dot_batch, plan=ALL):
    """A model trained by the plan, and one by its plain loop: the same but for the plan's ``training``."""
    pairs = []
    for training in (plan, {k: v for k, v in plan.items() if k != "training"}):
        torch.manual_seed(0)
        plain = model()
        pairs.append(tw.optimize(plain, training, optimizer=make(plain.parameters()), sample_inputs=batch()))
    return pairs


def train(opt, optimizer, steps, batch=dot_batch, scheduler=None):
    for seed in range(steps):
        optimizer.zero_grad()
        opt(*batch(seed=seed)).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(one, other):
    for (name, a), b in zip(weights_of(one).items(), weights_of(other).values()):
        assert torch.equal(a, b), name


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["state"][key][name]) if isinstance(value, torch.Tensor) else value == other["state"][key][name], name


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_five_steps_are_the_plain_loops(make):
    (opt, optimizer), (plain, other) = made(make)
    for o, p in ((opt, optimizer), (plain, other)):
        train(o, p, 5, scheduler=torch.optim.lr_scheduler.StepLR(p, 2, 0.5))
    same(opt, plain)
    equal_states(optimizer, other)
    assert opt.report.coverage["dense updates"] == (7, 7)


def test_a_parameter_used_twice_and_tables_that_are_tied():
    (opt, optimizer), (plain, other) = made(OPTIMIZERS["adagrad"], Tied, tied_batch)
    for o, p in ((opt, optimizer), (plain, other)):
        train(o, p, 5, tied_batch)
    same(opt, plain)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.item, self.layer = nn.Embedding(20, 4), nn.Linear(4, 4)

        def forward(self, ids):
            return self.layer(self.layer(self.item(ids)).sigmoid()) @ self.item.weight.t()

    batch = lambda rows=5, seed=0: (torch.randint(0, 20, (rows,), generator=torch.Generator().manual_seed(seed)),)  # noqa: E731
    (opt, optimizer), (plain, other) = made(OPTIMIZERS["adam"], Twice, batch)
    for o, p in ((opt, optimizer), (plain, other)):
        train(o, p, 5, batch)
    same(opt, plain)


def test_two_forwards_penalties_and_parameters_without_gradient():
    (opt, optimizer), (plain, other) = made(OPTIMIZERS["adam"])
    for o, p in ((opt, optimizer), (plain, other)):
        o.over[0].bias.requires_grad_(False)
        for seed in range(5):
            p.zero_grad()
            loss = (o(*dot_batch(seed=seed)) - o(*dot_batch(seed=seed + 9))).square().sum()
            (loss + 0.1 * sum(w.square().sum() for w in o.over.parameters())).backward()
            p.step()
    same(opt, plain)


def test_gradients_are_gone_before_the_next_one_comes():
    (opt, optimizer), _ = made(OPTIMIZERS["adam"])
    held: list[int] = []
    optimizer.zero_grad()
    for weight in opt.parameters():
        weight.register_post_accumulate_grad_hook(lambda _: held.append(sum(p.grad is not None for p in opt.parameters())))
    opt(*dot_batch()).square().sum().backward()
    assert len(held) == 7 and max(held) == 1  # hooks of the loop's own run before ours
    assert all(p.untyped_storage().nbytes() == 4 for p in (q.grad for q in opt.parameters()))


def test_with_tables_updated_in_the_backward_too():
    plan = {**ALL, "embedding_optimizer": {"adagrad": {"lr": 0.1, "in_backward": True}}}
    pairs = []
    for training in (plan, {k: v for k, v in plan.items() if k != "training"}):
        torch.manual_seed(0)
        plain = Dot()
        pairs.append(tw.optimize(plain, training, optimizer=torch.optim.AdamW(plain.over.parameters()), sample_inputs=dot_batch()))
    (opt, optimizer), (plain, other) = pairs
    for o, p in pairs:
        for seed in range(5):
            o(*dot_batch(seed=seed)).square().sum().backward()
            p.step()
            o.zero_grad()
    same(opt, plain)
    assert opt.report.coverage["dense updates"] == (4, 4)


def test_checkpointed_calls():
    (opt, optimizer), (plain, other) = made()
    for o, p in ((opt, optimizer), (plain, other)):
        for seed in range(3):
            checkpoint(o, *dot_batch(seed=seed), use_reentrant=False).square().sum().backward()
            p.step()
            p.zero_grad()
    same(opt, plain)


def test_the_state_goes_both_ways_and_the_original_optimizer_shares_it():
    (opt, optimizer), (plain, other) = made(OPTIMIZERS["adam"])
    train(opt, optimizer, 2)
    train(plain, other, 2)
    other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(opt, optimizer, 3)
    train(plain, other, 3)
    same(opt, plain)
    assert isinstance(optimizer, torch.optim.Adam) and type(copy.deepcopy(optimizer)) is torch.optim.Adam


def test_closures_and_zeros_in_place_of_none():
    (opt, optimizer), (plain, other) = made()
    for o, p in ((opt, optimizer), (plain, other)):
        for seed in range(4):

            def closure(o=o, p=p, seed=seed):
                if seed % 2:
                    p.zero_grad(set_to_none=False)
                else:
                    o.zero_grad(set_to_none=False)
                loss = o(*dot_batch(seed=seed)).square().sum() if seed != 2 else o.over[0](torch.ones(2, 17)).sum() + 0 * o(*dot_batch()).sum()
                loss.backward()
                return loss

            p.step(closure)
    same(opt, plain)


def test_the_plain_models_own_backward_is_as_ever():
    torch.manual_seed(0)
    plain = Dot()
    opt, optimizer = tw.optimize(plain, ALL, optimizer=torch.optim.SGD(plain.parameters(), lr=0.1), sample_inputs=dot_batch())
    before = weights_of(plain)
    plain(*dot_batch()).square().sum().backward()
    assert all(torch.equal(before[n], p) and p.grad is not None for n, p in plain.named_parameters())
    assert not any(p._post_accumulate_grad_hooks for p in plain.parameters())
    optimizer.step()
    assert not torch.equal(before["over.0.weight"], plain.over[0].weight)


def test_a_compiled_model_is_stepped_in_step():
    (opt, optimizer), (plain, other) = made(OPTIMIZERS["adam"])
    run = torch.compile(opt, backend="eager")
    for seed in range(3):
        optimizer.zero_grad(), other.zero_grad()
        run(*dot_batch(seed=seed)).square().sum().backward(), plain(*dot_batch(seed=seed)).square().sum().backward()
        optimizer.step(), other.step()
    same(opt, plain)
    torch._dynamo.reset()


# --- refused -----------------------------------------------------------------------------------------------------------------


def _loss(opt, seed=0):
    return opt(*dot_batch(seed=seed)).square().sum()


def _twice(opt, optimizer):
    _loss(opt).backward()
    before = weights_of(opt)
    try:
        _loss(opt).backward()
    finally:
        assert all(torch.equal(before[n], p) for n, p in opt.named_parameters())


def _never_cleared(opt, optimizer):
    _loss(opt).backward()
    optimizer.step()
    _loss(opt).backward()


def _clipped(opt, optimizer):
    _loss(opt).backward()
    nn.utils.clip_grad_norm_(opt.parameters(), 1.0)


def _clipped_tables_apart(opt, optimizer):
    _loss(opt).backward()
    nn.utils.clip_grad_value_(list(opt.dense_parameters()), 1.0)


def _scaled(opt, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(_loss(opt)).backward()


def _half(opt, optimizer):
    with torch.autocast("cpu", dtype=torch.float16):
        opt(*dot_batch())


def _dropped(opt, optimizer):
    _loss(opt).backward()
    optimizer.zero_grad()


def _dropped_by_the_model(opt, optimizer):
    _loss(opt).backward()
    opt.zero_grad()
    optimizer.step()


def _other_rate(opt, optimizer):
    _loss(opt).backward()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()


def _written(opt, optimizer):
    _loss(opt).backward()
    opt.over[0].weight.grad = torch.ones_like(opt.over[0].weight)
    optimizer.step()


def _added(opt, optimizer):
    _loss(opt).backward()
    opt.over[3].bias.sum().backward()  # one number: torch adds to what stands there
    optimizer.step()


def _recorded(opt, optimizer):
    _loss(opt).backward(create_graph=True)


REFUSED = {
    _twice: "gradients are being accumulated.*Nothing was changed", _never_cleared: "zero_grad.. was not called", _clipped: "used up in the backward",
    _clipped_tables_apart: "used up in the backward", _scaled: "enabled GradScaler.*Nothing was changed", _half: "Use bf16 autocast",
    _dropped: "between backward.. and step", _dropped_by_the_model: "was cleared between", _other_rate: "options of SGD .lr.. changed",
    _written: "'over.0.weight' was written", _added: "'over.3.bias' was written", _recorded: "create_graph",
}  # fmt: skip


@pytest.mark.parametrize("loop", REFUSED, ids=lambda f: f.__name__.strip("_"))
def test_loops_that_it_cannot_follow(loop):
    (opt, optimizer), _ = made()
    with pytest.raises(tw.InBackwardError, match=REFUSED[loop]):
        loop(opt, optimizer)


def test_a_gradient_in_parts():
    class Parted(nn.Module):
        def __init__(self):
            super().__init__()
            self.item, self.scale = nn.Embedding(20, 4), nn.Parameter(torch.ones(4))

        def forward(self, ids):
            return self.item(ids) * self.scale

    ids = (torch.arange(5),)
    model = Parted()
    opt, optimizer = tw.optimize(model, ALL, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=ids)
    x = opt(*ids).sum() * checkpoint(lambda s: s.sum(), model.scale, use_reentrant=True)
    before = weights_of(opt)
    try:
        x.backward()
        optimizer.step()
    except tw.InBackwardError as error:
        assert "in parts" in str(error)
    else:  # the part came first: one step with the whole gradient
        plain = copy.deepcopy(model)
        plain.load_state_dict(before)
        (plain(*ids).sum() * plain.scale.sum()).backward()
        torch.optim.SGD(plain.parameters(), lr=0.1).step()
        torch.testing.assert_close(plain.scale, opt.scale)


class _Mine(torch.optim.SGD):
    pass


UNFIT = {
    "lbfgs": (lambda p: torch.optim.LBFGS(p), "LBFGS may need all gradients at once"),
    "mine": (lambda p: _Mine(p, lr=0.1), "_Mine may need all gradients"),
    "capturable": (lambda p: torch.optim.Adam(p, capturable=True), "Adam runs with capturable set"),
    "differentiable": (lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True), "differentiable"),
}


@pytest.mark.parametrize(("make", "said"), UNFIT.values(), ids=UNFIT)
def test_optimizers_that_are_not_taken(make, said):
    model = Dot()
    with pytest.raises(tw.PlanError, match=f"{said}.*Take training.in_backward out"):
        tw.optimize(model, ALL, optimizer=make(model.parameters()), sample_inputs=dot_batch())


def test_what_the_plan_may_say():
    with pytest.raises(tw.PlanError, match="in_backward: all and accumulate: 2"):
        tw.Plan.from_dict({"version": 1, "training": {"in_backward": "all", "accumulate": 2}})
    with pytest.raises(tw.PlanError, match="embedding_optimizer is in_backward: false"):
        tw.Plan(training={"in_backward": "all"}, embedding_optimizer=tw.SGD())
    with pytest.raises(tw.PlanError, match="training has no key 'acumulate' .did you mean 'accumulate'"):
        tw.Plan(training={"acumulate": 2})
    with pytest.raises(tw.PlanError, match="tables | all"):
        tw.Plan(training={"in_backward": True})
    plan = tw.Plan(training={"in_backward": "all", "checkpoint": ["over*"]}, numerics="approximate", pipeline={"staleness": 3})
    assert tw.Plan.from_dict(plan.to_dict()) == plan and "in_backward: all" in str(plan)
    off = {p.cls.name: p.reason for p in tw.Plan(training={"in_backward": "all"}).make_passes() if hasattr(p, "cls")}
    assert "frees gradients one by one" in off["fuse_mlp"]
    assert "fuse_mlp" in {p.name for p in tw.Plan(training={"in_backward": "all"}, passes={"fuse_mlp": True}).make_passes() if hasattr(p, "name")}
    opt = tw.optimize(Dot(), ALL, sample_inputs=dot_batch())
    assert all("no optimizer was given" in r.reason for r in opt.report.skipped("in_backward")) and opt.report.skipped("in_backward")


def test_after_a_backward_that_failed_half_way_the_loop_can_go_on():
    (opt, optimizer), (plain, _) = made()
    failing = opt.get_parameter(opt.table_names()[0]).register_hook(lambda grad: (_ for _ in ()).throw(MemoryError("none left")))
    with pytest.raises(MemoryError):
        opt(*dot_batch()).square().sum().backward()
    failing.remove()
    with pytest.raises(tw.InBackwardError, match="the last backward failed after [0-9]+ parameters had been stepped"):
        optimizer.step()
    assert not any(p._post_accumulate_grad_hooks for p in opt.parameters())
    opt.load_state_dict(plain.state_dict())
    optimizer.zero_grad()
    opt(*dot_batch()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(next(opt.dense_parameters()), next(plain.dense_parameters()))


def test_two_models_share_an_optimizer():
    torch.manual_seed(0)
    models = Dot(), Dot()
    optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], lr=0.1)
    opts = []
    for model in models:
        opt, optimizer = tw.optimize(model, ALL, optimizer=optimizer, sample_inputs=dot_batch())
        opts.append(opt)
    before = [{n: p.detach().clone() for n, p in o.named_parameters()} for o in opts]
    for opt in opts:
        opt(*dot_batch()).square().sum().backward()
    optimizer.step()
    for opt, old in zip(opts, before):
        assert not any(torch.equal(p, old[n]) for n, p in opt.named_parameters() if n.startswith("over"))


def test_clipping_says_the_way_out_of_this_plan():
    (opt, optimizer), _ = made()
    opt(*dot_batch()).square().sum().backward()
    with pytest.raises(tw.InBackwardError, match="in_backward: all"):
        tw.clip_grad_norm_(opt, 1.0)
    optimizer.step()
