"""Bounded staleness: lookups run exactly k updates late, in memory and in tiers, and everything else is synchronous."""
from __future__ import annotations

import time

import pytest
import tablewright as tw
import torch
from small_models import Dot, dot_batch, untimed
from tablewright.kernels import tiers
from tablewright.kernels.embedding import given
from tablewright.kernels.embedding.op import call
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table
from tablewright.rewriter.errors import PlanError
from tier_training import Model, batch
from torch import nn
from torch.utils.checkpoint import checkpoint

STEPS = 12


def plan(staleness, **more):
    return {"version": 1, "numerics": "approximate", "pipeline": {"prefetch": 2, "staleness": staleness}, "passes": untimed(), **more}


def made(staleness, **more):
    torch.manual_seed(0)
    model = Dot()
    return tw.optimize(model, plan(staleness, **more), optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=dot_batch())


def late_by(k, opt, optimizer, batches, loss):
    """The meaning of staleness: each batch sees tables as they were k updates before, and its gradients go to those of today."""
    history = []
    for one in batches:
        tables = [opt.get_parameter(n) for n in opt.table_names()]
        now = [t.detach().clone() for t in tables]
        history.append(now)
        for table, old in zip(tables, history[max(0, len(history) - 1 - k)]):
            table.data.copy_(old)
        loss(opt, one).backward()
        for table, new in zip(tables, now):
            table.data.copy_(new)
        optimizer.step()
        optimizer.zero_grad()


def train(line, opt, optimizer, loss):
    for one in line:
        loss(opt, one).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name


def dot_loss(opt, one):
    return opt(*one).square().sum()


@pytest.mark.parametrize("k", [0, 1, 3])
def test_lookups_are_exactly_so_many_updates_late(k):
    opt, optimizer = made(k)
    plain, other = made(0)
    line = tw.pipeline([dot_batch(seed=s) for s in range(STEPS)], opt)
    train(line, opt, optimizer, dot_loss)
    late_by(k, plain, other, [dot_batch(seed=s) for s in range(STEPS)], dot_loss)
    same(opt, plain)
    report = line.report
    assert report.latest == k and report.lateness == sum(min(k, n) for n in range(STEPS)) and report.looked_ahead == STEPS * (k > 0)
    assert k == 0 or (f"{k} updates late at most (of {k} allowed)" in str(report) and not report.not_ahead)
    assert opt._variants[0].run.__class__.__name__ != "_Run"  # nothing is left behind


def test_slow_lookups_are_waited_for_and_not_overtaken(monkeypatch):
    """The update of batch n comes after the lookups of batch n + k however long these take."""
    read = given.read
    monkeypatch.setattr(given, "read", lambda *args: (time.sleep(0.02), read(*args))[1])
    opt, optimizer = made(2)
    plain, other = made(0)
    train(tw.pipeline([dot_batch(seed=s) for s in range(STEPS)], opt), opt, optimizer, dot_loss)
    late_by(2, plain, other, [dot_batch(seed=s) for s in range(STEPS)], dot_loss)
    same(opt, plain)


def test_updates_in_the_backward_wait_too():
    inside = {"embedding_optimizer": {"adagrad": {"lr": 0.1, "in_backward": True}}}
    outside = {"embedding_optimizer": {"adagrad": {"lr": 0.1}}}
    pairs = []
    for settings, staleness in ((inside, 2), (outside, 0)):
        torch.manual_seed(0)
        model = Dot()
        pairs.append(tw.optimize(model, plan(staleness, **settings), optimizer=torch.optim.SGD(model.over.parameters(), lr=0.1), sample_inputs=dot_batch()))
    (opt, optimizer), (plain, other) = pairs
    train(tw.pipeline([dot_batch(seed=s) for s in range(STEPS)], opt), opt, optimizer, dot_loss)

    class Both:
        def step(self):
            other.step(), plain.embedding_optimizer.step()

        def zero_grad(self):
            plain.zero_grad()

    late_by(2, plain, Both(), [dot_batch(seed=s) for s in range(STEPS)], dot_loss)
    for (name, a), b in zip(opt.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.skipif(bool(tiers.available()), reason=f"NOT TESTED: {tiers.available()}")
def test_tables_in_tiers(tmp_path):
    """A cache that rows leave all the time, against a table in memory."""
    loss = lambda opt, one: ((opt(*one[:2]) - one[2]) ** 2).mean()  # noqa: E731
    pairs = []
    for k, tables in ((2, {"item": {"storage": {"cache": 40_000, "path": str(tmp_path / "item")}}}), (0, {})):
        torch.manual_seed(0)
        model = Model()
        pairs.append(tw.optimize(model, plan(k, tables=tables), optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=batch(0)[:2]))
    (opt, optimizer), (plain, other) = pairs
    assert not list(tw.pipeline([], plain))  # batches are counted anew in each pipeline
    line = tw.pipeline([batch(s) for s in range(30)], opt, inputs=lambda b: b[:2])
    train(line, opt, optimizer, loss)
    late_by(2, plain, other, [batch(s) for s in range(30)], loss)
    same(opt, plain)
    assert line.report.latest == 2 and line.report.ahead == line.report.looked_ahead == 30 and opt.tiers["item.weight"].written
    assert line.report.hits and line.report.misses and "rows were in the caches" in str(line.report)


def test_other_tensors_are_looked_up_at_once():
    """Evaluation between, tensors that were changed in place or made anew, batches that are skipped, a loop that ends early."""
    opt, optimizer = made(2)
    plain, other = made(0)
    batches = [dot_batch(seed=s) for s in range(STEPS)]
    line = tw.pipeline(batches, opt)
    fresh = 0
    for n, one in enumerate(line):
        if n == 9:
            break
        opt.eval()
        with torch.no_grad():
            torch.testing.assert_close(opt(*dot_batch(seed=99)), opt.unoptimized()(*dot_batch(seed=99)))
        opt.train()
        if n == 4:
            one = tuple(x.clone() for x in one)
        if n == 5:
            one[1].add_(1).remainder_(20)
        if n in (4, 5):
            torch.testing.assert_close(opt(*one), opt.unoptimized()(*one))
            fresh += 1
        if n == 6:
            continue
        dot_loss(opt, one).backward()
        optimizer.step(), optimizer.zero_grad()
    assert line.report.looked_ahead == 9 - fresh - 1 and line.report.latest == 2 and "not called with the tensors of some batches" in line.report.not_ahead
    train(batches, opt, optimizer, dot_loss)
    assert plain is not None and other is not None


def test_two_forwards_of_one_batch_and_a_checkpointed_one_see_the_same_rows():
    runs = []
    for wrapped in (False, True):
        opt, optimizer = made(2)
        for one in tw.pipeline([dot_batch(seed=s) for s in range(6)], opt):
            y = checkpoint(opt, *one, use_reentrant=False) if wrapped else opt(*one)
            y.square().sum().backward()
            optimizer.step(), optimizer.zero_grad()
        runs.append(opt)
    same(*runs)


def test_bad_ids_are_an_error_of_their_batch_and_parameters_in_weights_keep_a_lookup_back():
    opt, optimizer = made(1)
    bad = dot_batch(seed=2)
    bad[1][0] = 1000
    seen = []
    with pytest.raises(IndexError, match="user"):
        for one in tw.pipeline([dot_batch(seed=0), dot_batch(seed=1), bad], opt):
            seen.append(dot_loss(opt, one))
    assert len(seen) == 2

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.scale = nn.EmbeddingBag(20, 4, mode="sum"), nn.Parameter(torch.rand(4, 3))

        def forward(self, ids):
            return self.bag(ids, per_sample_weights=self.scale)

    ids = (torch.randint(0, 20, (4, 3)),)
    weighted = tw.optimize(Weighted(), plan(1), sample_inputs=ids)
    line = tw.pipeline([ids] * 3, weighted)
    for (one,) in line:
        weighted(one).sum().backward()
    assert line.report.latest == 0 and "depend on the parameter scale" in line.report.not_ahead


def test_given_rows_and_extras():
    torch.manual_seed(0)
    table, ids, extra = nn.Parameter(torch.randn(10, 4)), torch.tensor([1, 1, 9]), torch.randn(3, 2, requires_grad=True)
    spec = GroupSpec((Table("t", 10, 4, "sparse"),), (Lookup(0, "t", "none", 0, 2),), (6,), (Extra(0, 0, 2),)).encode()
    args = ([table], [ids], [None], [None])
    wanted = call(*args, [extra], spec)[0]
    waited = []
    held = given.Given(given.read(*args, spec), lambda: waited.append(1))
    for _ in range(2):  # the second time as in a checkpoint
        (out,) = given.given_bags(held, *args, [extra], spec)
        assert torch.equal(out, wanted)
    grads = [torch.autograd.grad(y.square().sum(), [table, extra]) for y in (out, wanted)]
    assert waited and torch.equal(grads[0][0].to_dense(), grads[1][0].to_dense()) and torch.equal(grads[0][1], grads[1][1])
    (first,) = given.given_bags(held := given.Given(given.read(*args, spec), lambda: None), *args, [extra], spec)
    with torch.no_grad():
        first.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        given.given_bags(held, *args, [extra], spec)


def test_the_plan_has_to_allow_it():
    with pytest.raises(PlanError, match="staleness is 1, which is approximate, and the plan allows reassociated"):
        tw.Plan(pipeline={"staleness": 1})
    with pytest.raises(PlanError, match="0 or more"):
        tw.Plan(numerics="approximate", pipeline={"staleness": -1})
    opt, _ = made(1)
    opt.__dict__["_sharded"] = object()
    with pytest.raises(PlanError, match="runs over several ranks.*Say staleness: 0"):
        tw.pipeline([], opt)
    assert tw.Plan(pipeline={"prefetch": 4}).to_dict()["pipeline"] == {"prefetch": 4}


def test_a_batch_that_is_asked_again_after_its_step_is_looked_up_again():
    opt, optimizer = made(1)
    batches = [dot_batch(seed=s) for s in range(5)]
    for one in tw.pipeline(batches, opt, inputs=lambda b: b):
        opt(*one).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert torch.equal(opt(*one), opt(*(t.clone() for t in one)))


def test_another_form_of_input_in_mid_loop(tmp_path):
    if tiers.available():
        pytest.skip(f"NOT TESTED: {tiers.available()}")
    torch.manual_seed(0)
    model = Model()
    the_plan = plan(1, embedding_optimizer={"adagrad": {"lr": 0.1}}, tables={"user": {"storage": {"cache": "1MB", "path": str(tmp_path / "rows")}}})
    opt, optimizer = tw.optimize(model, the_plan, optimizer=torch.optim.SGD([p for n, p in model.named_parameters() if n.startswith("top")], lr=0.1), sample_inputs=batch(0)[:-1])
    batches = [tuple(batch(s)[:-1]) for s in range(5)]
    batches[2] = tuple(t.int() if t.dtype == torch.int64 else t for t in batches[2])
    for one in tw.pipeline(batches, opt, inputs=lambda b: b):
        opt(*one).sum().backward()
        optimizer.step()
        opt.embedding_optimizer.step()
        opt.zero_grad()


def test_a_model_in_pieces_is_not_looked_up_ahead():
    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.item, self.top = nn.Embedding(50, 8), nn.Linear(8, 1)

        def forward(self, ids):
            rows = self.item(ids).sum(1)
            if rows.detach().numpy().sum() > 1e9:
                rows = rows * 2
            return self.top(rows)

    torch.manual_seed(0)
    model, ids = Pieces(), torch.randint(0, 50, (6, 3))
    opt, optimizer = tw.optimize(model, plan(1), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), sample_inputs=(ids,))
    line = tw.pipeline([torch.randint(0, 50, (6, 3)) for _ in range(3)], opt, inputs=lambda b: (b,))
    train(line, opt, optimizer, lambda m, b: m(b).sum())
    assert line.report.batches == 3 and "in pieces or plainly" in line.report.not_ahead


def test_updates_of_a_method_that_is_not_ahead_wait_for_lookups(monkeypatch):
    """The lookups of the next batch read tables as they were, however long they take."""
    from tablewright.rewriter import staleness

    class Two(Dot):
        def score(self, *given):
            return self.forward(*given).square().sum()

    def run(seconds):
        read = staleness.StaleLookups._read
        monkeypatch.setattr(staleness.StaleLookups, "_read", lambda self, *args: (time.sleep(seconds), read(self, *args))[1])
        torch.manual_seed(0)
        model = Two()
        opt, optimizer = tw.optimize(
            model, plan(1, training={"in_backward": "all"}), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), methods=["score"],
            sample_inputs={"forward": dot_batch(), "score": dot_batch()})  # fmt: skip
        seen = []
        for one in tw.pipeline([dot_batch(seed=s) for s in range(5)], opt, inputs=lambda b: b):
            with torch.no_grad():
                seen.append(opt(*one))
            opt.score(*one).backward()
            optimizer.step()
            optimizer.zero_grad()
        monkeypatch.undo()
        return seen

    for a, b in zip(run(0), run(0.05)):
        assert torch.equal(a, b)
