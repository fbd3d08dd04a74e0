"""``opt.bisect`` names the first rewrite that changes the outputs."""
from __future__ import annotations

from pathlib import Path

import tablewright as tw
import torch
from small_models import Dot, dot_batch, weights_of
from tablewright import passes as registry
from tablewright.passes import measure
from tablewright.passes.graph import aten
from tablewright.passes.rule import Rule


class Subtly(Rule):
    """Rewrites every relu rightly but the one that reads a tensor of 5 columns."""

    name = "subtly"
    kind = "relus"
    numerics = "exact"

    def pattern(self, op, x):
        return op.relu(x)

    def rewrite(self, op, match, x):
        wrong = x.meta["val"].shape[-1] == 5
        target = aten.gelu.default if wrong else aten.clamp_min.default
        return op.call(target, x, *([] if wrong else [0]), before=match.anchor, sources=[match.anchor])


class Three(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(9, 4)
        self.one, self.two, self.three = torch.nn.Linear(4, 4), torch.nn.Linear(4, 5), torch.nn.Linear(5, 4)

    def forward(self, ids):
        x = torch.relu(self.one(self.table(ids)))
        x = torch.relu(self.two(x))
        return torch.relu(self.three(x))


IDS = torch.arange(9)


def test_a_right_pipeline_has_no_first_difference():
    opt = tw.optimize(Dot(dropout=0.3), sample_inputs=dot_batch())
    before = weights_of(opt)
    made = sum(step.made for step in opt.steps)
    assert made and opt.bisect(*dot_batch()) == f"none of the {made} rewrites changes the outputs by more than 1e-05 of the largest"
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights_of(opt).values()))


def test_nothing_is_timed_again(monkeypatch):
    opt = tw.optimize(Dot(dropout=0.3), sample_inputs=dot_batch())
    made = sum(step.made for step in opt.steps)

    def again(*_):
        raise AssertionError("timed again: another outcome would make other rewrites")

    monkeypatch.setattr(measure, "_time", again)
    assert f"none of the {made} rewrites" in opt.bisect(*dot_batch())


def test_names_the_wrong_rewrite_among_right_ones(monkeypatch):
    monkeypatch.setattr(registry, "DEFAULT", (*registry.DEFAULT, Subtly))
    torch.manual_seed(0)
    opt = tw.optimize(Three(), sample_inputs=(IDS,))
    assert opt.report.coverage["relus"] == (3, 3)
    text = opt.bisect(IDS)
    assert text.startswith("rewrite 3 of 4, by subtly, changes the outputs first: "), text
    line = next(i for i, each in enumerate(Path(__file__).read_text().splitlines(), 1) if "torch.relu(self.two" in each)
    assert text.endswith(f"first: the model (test_bisect.py:{line})"), text


def test_names_a_wrong_pass_that_ran_first(monkeypatch):
    monkeypatch.setattr(registry, "DEFAULT", (Subtly, *registry.DEFAULT))
    torch.manual_seed(0)
    assert tw.optimize(Three(), sample_inputs=(IDS,)).bisect(IDS).startswith("rewrite 2 of 4, by subtly")


def test_works_for_a_plan_that_updates_inside_the_backward(monkeypatch):
    """With few rewrites allowed, tables are also read by plain lookups: no error then."""
    monkeypatch.setattr(registry, "DEFAULT", (*registry.DEFAULT, Subtly))
    torch.manual_seed(0)
    plan = tw.Plan(embedding_optimizer=tw.SGD(lr=0.1, in_backward=True))
    opt = tw.optimize(Three(), plan, sample_inputs=(IDS,))
    before = weights_of(opt)
    assert "by subtly" in opt.bisect(IDS)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights_of(opt).values()))
