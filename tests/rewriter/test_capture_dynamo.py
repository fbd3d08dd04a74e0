"""The third door: dynamo in one graph, in pieces, else the plain model; always the plain model's numbers, and its contract."""
import copy
import io
import logging
import warnings

import numpy as np
import pytest
import tablewright as tw
import torch
from tablewright.rewriter.errors import CaptureError, PlanError
from torch import nn


class Batch:
    """Inputs of a class that nobody registered anywhere."""

    def __init__(self, **columns):
        self.columns = columns

    def __getitem__(self, name):
        return self.columns[name]


class OneGraph(nn.Module):
    """What the first two doors do not take, dynamo does: an unknown input class, numpy, a result left on the module."""

    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(30, 4), nn.Embedding(40, 4)
        self.offsets = np.array([0, 20])
        self.top = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1))

    def forward(self, batch):
        items = self.item(batch["item"] + batch["item"].new_tensor(self.offsets))
        x = torch.cat([self.user(batch["user"]), items.flatten(1)], 1)
        self.size = x.pow(2).sum()
        return self.top(x).squeeze(-1)


class Pieces(OneGraph):
    """A branch on data between two captured parts; each reads a table, and both read one."""

    def forward(self, batch):
        x = self.user(batch["user"])
        if x.sum() > 1000:
            x = -x
        items = self.item(batch["item"]) + self.user(batch["user"]).unsqueeze(1)
        return self.top(torch.cat([x, items.flatten(1)], 1)).squeeze(-1)


class Outside(OneGraph):
    """One table is read where nothing is captured."""

    def forward(self, batch):
        items = self.item(batch["item"])
        torch._dynamo.graph_break()
        return self.top(torch.cat([self._hidden(batch["user"]), items.flatten(1)], 1)).squeeze(-1)

    @torch._dynamo.disable
    def _hidden(self, ids):
        return self.user(ids)


def batch(rows=6):
    return Batch(user=torch.randint(0, 30, (rows,)), item=torch.randint(0, 20, (rows, 2)))


def steps_agree(model, optimizer=torch.optim.Adagrad, door=None, count=3, **settings):
    """Three training steps of plain and optimized model with their own optimizers, at several batch sizes; then eval mode."""
    plain = copy.deepcopy(model)
    theirs = optimizer(plain.parameters(), lr=0.1)
    opt, mine = tw.optimize(model, optimizer=optimizer(model.parameters(), lr=0.1), sample_inputs=(batch(),), **settings)
    if door is not None:
        assert opt.report.door == door, opt.report
    for rows in [6, 9, 1, 4][:count]:
        given = batch(rows)
        for each, optim in ((plain, theirs), (opt, mine)):
            torch.manual_seed(rows)
            optim.zero_grad()
            each(given).square().sum().backward()
            optim.step()
        for (name, a), b in zip(plain.named_parameters(), opt.parameters()):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    plain.eval(), opt.eval()
    with torch.no_grad():
        given = batch(5)
        torch.testing.assert_close(opt(given), plain(given))
    return opt, plain, mine


def test_one_graph():
    opt, plain, _ = steps_agree(OneGraph(), door="dynamo", count=4)
    assert opt.report.pieces == 1 and opt.report.coverage["lookups"] == (2, 2) and opt.report.coverage["updates"] == (2, 2)
    assert "captured by dynamo in one graph" in str(opt.report)
    given = batch(3)
    opt(given), plain(given)
    torch.testing.assert_close(opt.size, plain.size)


def test_pieces_share_a_table():
    opt, _, _ = steps_agree(Pieces(), door="dynamo, in pieces", count=4)
    assert opt.report.pieces == 2 and opt.report.coverage["lookups"] == (3, 3)
    assert "test_capture_dynamo.py:" in opt.report.notes[0] and "runs plainly" in opt.report.notes[0]


def test_a_table_read_outside_of_the_pieces_is_said():
    opt, _, _ = steps_agree(Outside(), door="dynamo, in pieces")
    skipped = [r for r in opt.report.skipped() if r.kind == "lookups"]
    assert [r.subject for r in skipped] == ["user"] and "outside" in skipped[0].reason


def test_what_dynamo_does_not_follow_either_runs_plainly(monkeypatch):
    from tablewright.rewriter.capture import program_check

    monkeypatch.setattr(program_check, "_compare", lambda *_, **__: "made to fail")
    opt, _, _ = steps_agree(Pieces(), door="none", count=2)
    assert opt.report.pieces == 0 and opt.report.notes[0].startswith("NOT captured, it runs plainly")
    assert opt.report.coverage["lookups"] == (0, 2)
    with pytest.raises(PlanError, match="2 lookups were not fused"):
        tw.optimize(Pieces(), sample_inputs=(batch(),), on_skip="error")


@pytest.mark.parametrize("cls", [OneGraph, Pieces])
def test_the_contract_of_optimized_models(cls):
    model = cls()
    opt = tw.optimize(model, sample_inputs=(batch(),))
    given = batch(7)
    model.eval(), opt.eval()
    torch.testing.assert_close(opt(given), model(given))
    assert opt.state_dict().keys() == model.state_dict().keys()
    other = cls().eval()
    opt.load_state_dict(other.state_dict(), assign=True)  # other parameter objects: the pieces must read those
    torch.testing.assert_close(opt(given), other(given))
    twin, expected = copy.deepcopy(opt), opt(given)
    with torch.no_grad():
        opt.user.weight.zero_()
    torch.testing.assert_close(twin(given), expected)
    assert not torch.equal(twin(given), opt(given))
    torch.testing.assert_close(opt.unoptimized()(given), opt(given))
    assert opt.check(given), str(opt.check(given))
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(given), opt(given))


def test_one_class_many_modules():
    """Dynamo compiles a function once for all modules of a class: each must still read its own parameters."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 4)

        def forward(self, ids):
            x = self.table(ids)
            if float(x.detach().numpy().sum()) > 1000:
                x = -x
            return x * 2 + self.table(ids)

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, ids):
            return torch.stack([block(ids) for block in self.blocks], 1)

    model = Many()
    ids = torch.randint(0, 20, (5,))
    opt = tw.optimize(model, sample_inputs=(ids,))
    assert opt.report.door == "dynamo, in pieces"
    torch.testing.assert_close(opt(ids), model(ids))
    with torch.no_grad():
        model.blocks[1].table.weight.add_(1)
    torch.testing.assert_close(opt(ids), model(ids))


def test_an_attribute_changed_on_the_users_model_is_seen():
    class Scaled(Pieces):
        scale = 1.0

        def forward(self, batch):
            return super().forward(batch) * self.scale * self.factor

    model = Scaled().eval()
    model.factor = 2.0
    opt = tw.optimize(model, sample_inputs=(batch(),))
    given = batch()
    torch.testing.assert_close(opt(given), model(given))
    model.factor = 3.0
    torch.testing.assert_close(opt(given), model(given))
    opt.factor = 5.0
    torch.testing.assert_close(opt(given), model(given) * 5 / 3)


def test_state_that_changes_at_every_call_ends_in_the_plain_model():
    class Counting(OneGraph):
        calls = 0

        def forward(self, batch):
            self.calls = self.calls + 1
            return super().forward(batch) * self.calls

    model = Counting().eval()
    plain = copy.deepcopy(model)
    opt = tw.optimize(model, sample_inputs=(batch(),))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(22):
            given = batch()
            torch.testing.assert_close(opt(given), plain(given))
    assert sum("from now on it runs plainly" in str(each.message) for each in said) == 1


def test_in_the_backward_only_in_one_graph():
    plan = tw.Plan(embedding_optimizer=tw.RowwiseAdagrad(lr=0.1, in_backward=True))
    with pytest.raises(PlanError, match="updated inside the backward, which needs the whole model in one graph"):
        tw.optimize(Pieces(), plan, sample_inputs=(batch(),))
    model = OneGraph().eval()
    opt = tw.optimize(model, plan, sample_inputs=(batch(),))
    given, before = batch(), model.user.weight.detach().clone()
    opt(given).sum().backward()
    changed = (model.user.weight != before).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= set(given["user"].tolist()) and len(changed)


def test_frozen_tables_of_a_plan_need_one_graph():
    plan = tw.Plan(tables={"user": tw.TablePlan(trainable=False)}) if hasattr(tw, "TablePlan") else tw.Plan.from_dict(
        {"version": 1, "tables": {"user": {"trainable": False}}})
    with pytest.raises(PlanError, match="needs the whole model in one graph"):
        tw.optimize(Pieces(), plan, sample_inputs=(batch(),))


def test_the_plans_optimizer_steps_tables_of_pieces():
    plan = tw.Plan(embedding_optimizer=tw.Adagrad(lr=0.1))
    model = Pieces().eval()
    plain = copy.deepcopy(model)
    theirs = torch.optim.Adagrad([plain.user.weight, plain.item.weight], lr=0.1)
    opt = tw.optimize(model, plan, sample_inputs=(batch(),))
    for _ in range(2):
        given = batch()
        opt(given).square().sum().backward()
        opt.embedding_optimizer.step()
        opt.zero_grad()
        plain(given).square().sum().backward()
        theirs.step()
        plain.zero_grad()
    torch.testing.assert_close(opt.user.weight, plain.user.weight, atol=1e-5, rtol=1e-4)


def test_nothing_of_the_users_model_changes():
    model = Pieces()
    model.history = []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = batch()
    state, keys = torch.get_rng_state(), set(model.__dict__)
    tw.optimize(model, sample_inputs=(given,))
    assert set(model.__dict__) == keys and model.history == [] and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_logged_of_ops_whose_shapes_torch_cannot_tell():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.item, self.place, self.attention = nn.Embedding(30, 8), nn.Embedding(5, 8), nn.MultiheadAttention(8, 2)

        def forward(self, ids):
            places = np.tile(np.arange(ids.shape[1]), [ids.shape[0], 1])
            x = (self.item(ids) + self.place(torch.tensor(places))).transpose(0, 1)
            later = ~torch.tril(torch.ones((ids.shape[1], ids.shape[1]), dtype=torch.bool))
            return self.attention(x, x, x, attn_mask=later)[0]

    log, said = logging.getLogger("torch._subclasses.fake_tensor"), []
    handler = logging.Handler()
    handler.emit = said.append
    log.addHandler(handler)
    try:
        model, ids = Attention(), torch.randint(0, 30, (6, 5))
        opt = tw.optimize(model, sample_inputs=(ids,))
        torch.testing.assert_close(opt(ids[:4]), model(ids[:4]))
    finally:
        log.removeHandler(handler)
    assert not [each for each in said if each.levelno >= logging.ERROR] and not log.disabled


def test_custom_gradients_are_kept():
    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return -grad

    class Reversing(OneGraph):
        def forward(self, batch):
            return super().forward(Batch(user=batch["user"], item=batch["item"])) + Reverse.apply(self.user(batch["user"])).sum(1)

    steps_agree(Reversing())


def test_switches_of_gradients_are_kept():
    class Switching(OneGraph):
        def forward(self, batch):
            with torch.no_grad():
                fixed = self.user(batch["user"])
            return super().forward(batch) + (fixed * self.user(batch["user"])).sum(1)

    steps_agree(Switching())


def test_the_plain_models_own_error_comes_through():
    opt = tw.optimize(Pieces(), sample_inputs=(batch(),))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        opt(Batch(user=torch.tensor([99]), item=torch.zeros(1, 2, dtype=torch.long)))
    given = batch()
    opt(given)
    with pytest.raises(CaptureError, match="the plain model fails on the sample inputs"):
        tw.optimize(Pieces(), sample_inputs=(Batch(),))
