"""Activation checkpointing by plan: the same bits, fewer saved bytes, and what may not run twice runs once."""
from __future__ import annotations

import copy

import pytest
import tablewright as tw
import torch
from small_models import Dot, dot_batch, untimed
from torch import nn

LOOP = {
    "user's optimizer": {},
    "tables in the backward": {"embedding_optimizer": {"adagrad": {"lr": 0.1, "in_backward": True}}},
    "all in the backward": {"training": {"in_backward": "all"}},
    "accumulated": {"training": {"accumulate": 2}},
}


class Towers(nn.Module):
    """Two towers with dropout, a layer used by both, and a batch norm between."""

    def __init__(self):
        super().__init__()
        self.item, self.user = nn.Embedding(50, 8), nn.EmbeddingBag(40, 8, mode="sum")
        self.left = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 32), nn.Sigmoid(), nn.Dropout(0.2))
        self.right = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.GELU())
        self.both = nn.Linear(32, 16)

    def forward(self, item, user):
        a, b = self.left(self.item(item)), self.right(self.user(user))
        return (self.both(a) * self.both(b)).sum(1)


def batch(rows=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (rows,), generator=g), torch.randint(0, 40, (rows, 3), generator=g)


def made(model, inputs, modules, plan=None, passes=None):
    plan = dict(plan or {})
    plan["training"] = {**plan.get("training", {}), "checkpoint": modules}
    inside = "embedding_optimizer" in plan
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    params = [p for n, p in model.named_parameters() if not inside or not n.startswith(("item", "user", "tags"))]
    return tw.optimize(model, {"version": 1, "passes": {**untimed(), **(passes or {})}, **plan}, optimizer=torch.optim.Adagrad(params, lr=0.1), sample_inputs=inputs())


def saved_bytes(opt, inputs):
    found = {}

    def pack(x):
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = opt(*inputs).square().sum()
    del loss
    return sum(found.values())


def train(opt, optimizer, inputs, steps=4):
    torch.manual_seed(1)
    losses = []
    for seed in range(steps):
        loss = opt(*inputs(seed=seed)).square().sum()
        loss.backward()
        losses.append(loss.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("plan", LOOP.values(), ids=LOOP)
def test_the_bits_are_those_of_the_run_that_keeps_everything(plan):
    torch.manual_seed(0)
    model = Towers()
    (opt, optimizer), (plain, other) = made(model, batch, ["left", "right*", "both"], plan), made(model, batch, [], plan)
    assert opt.report.coverage["checkpoints"] == (3, 3)
    a, b = train(opt, optimizer, batch), train(plain, other, batch)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    same(opt, plain)  # and the running statistics, counted once
    opt.eval(), plain.eval()
    with torch.no_grad():
        assert torch.equal(opt(*batch()), plain(*batch()))


def test_what_was_fused_is_checkpointed_whole_and_less_is_saved():
    torch.manual_seed(0)
    model = Dot(dropout=0.5)
    model.over = nn.Sequential(nn.Linear(17, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    passes = {"fuse_mlp": {"measure": False}}
    inputs = lambda seed=0: dot_batch(64, seed)  # noqa: E731
    (opt, optimizer), (plain, other) = made(model, inputs, ["over"], passes=passes), made(model, inputs, [], passes=passes)
    assert any("mlp" in str(n.target) for n in opt.graph_module.graph.nodes)
    assert all(torch.equal(x, y) for x, y in zip(train(opt, optimizer, inputs), train(plain, other, inputs)))
    same(opt, plain)
    most, least = saved_bytes(plain, inputs()), saved_bytes(opt, inputs())
    assert most - least >= 64 * 256 * 4  # an activation of the first layer at least


def test_nothing_is_folded_where_nothing_is_recorded_and_copies_fold_too():
    opt, _ = made(Towers(), batch, ["left"])
    twin = copy.deepcopy(opt)
    assert saved_bytes(twin, batch()) == saved_bytes(opt, batch())
    opt.eval().check(*batch()).raise_if_failed()
    run = torch.compile(opt, backend="eager")
    assert run(*batch()).shape == (6,)
    torch._dynamo.reset()


class Top(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, x):
        return self.layer(x).squeeze(1).add_(1.0)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.item, self.top = nn.Embedding(50, 8), Top()

    def forward(self, ids):
        return self.top(self.item(ids))


def test_what_is_refused_and_why():
    ids = lambda seed=0: (torch.arange(5),)  # noqa: E731
    opt, _ = made(InPlace(), ids, ["top", "item"])
    rows = {r.subject: r for r in opt.report.records if r.kind == "checkpoints"}
    assert "its lookups run once" in rows["item"].reason
    assert "add_ writes in place" in rows["top"].reason
    with pytest.raises(tw.PlanError, match="no module matches 'tpo'.*top"):
        made(InPlace(), ids, ["tpo"])


def test_writing_what_is_read_again_is_an_error():
    opt, _ = made(Towers(), batch, ["left"])
    loss = opt(*batch()).sum()
    with torch.no_grad():
        opt.left[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="recomputed_left_0.*written between|modified by an inplace operation"):
        loss.backward()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x, between):
        parts = torch.split(torch.relu(self.a(x)), 2, 1)
        parts = torch.split(torch.relu(self.b(between(parts))), 2, 1)
        return torch.cat([parts[5].sigmoid() * parts[0].tanh(), parts[1], parts[3] * parts[2], parts[4]], 1)


class Between(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, parts):
        q = torch.split(self.layer(torch.cat([parts[i] for i in (1, 0, 3, 2, 5, 4)], 1)), 2, 1)
        return torch.cat([q[5].tanh(), q[0], q[4], q[3] * 2, q[1], q[2]], 1)


class Interleaved(nn.Module):
    """``block`` lies in two parts, with ``between`` between; what folding the first puts in would take names of the second."""

    def __init__(self):
        super().__init__()
        self.item, self.block, self.between = nn.EmbeddingBag(50, 8, mode="sum"), Block(), Between()

    def forward(self, x, ids):
        return torch.cat([self.block(x, self.between), self.item(ids)], 1).sum(1)


def test_a_module_in_two_parts():
    torch.manual_seed(0)
    model, given = Interleaved(), (torch.randn(16, 12), torch.randint(0, 50, (16, 3)))
    plain = copy.deepcopy(model)
    opt = tw.optimize(model, {"version": 1, "training": {"checkpoint": ["block"]}, "passes": untimed()}, sample_inputs=given)
    weights = torch.randn(16)
    for each in (opt, plain):
        (each(*given) * weights).sum().backward()
    for (name, a), b in zip(opt.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad.to_dense() if a.grad.is_sparse else a.grad, b.grad, msg=name)
