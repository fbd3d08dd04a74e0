"""Passes that are wrong: rolled back and reported, or a named error. And the record that each step leaves."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import tablewright as tw
import torch
from small_models import Dot, dot_batch
from tablewright import passes as registry
from tablewright.passes.graph import Editor, aten, is_op
from tablewright.passes.records import APPLIED, record
from tablewright.passes.rule import Context, Pass, Rule
from tablewright.rewriter import plan as plan_module

assert plan_module.registry is registry


@dataclass
class Wrong(Pass):
    """Finds the linear layers and does something wrong to the graph."""

    name: ClassVar[str] = "wrong"
    kind: ClassVar[str] = "mlps"
    numerics: ClassVar[str] = "exact"

    def run(self, context: Context):
        editor = Editor(context.graph, self.name)
        rows = []
        for node in [n for n in context.graph.nodes if is_op(n, aten.linear.default)]:
            assert context.allowed()
            rows.append(record(self.name, self.kind, APPLIED, node))
            self.harm(context, editor, node)
        return rows

    def harm(self, context, editor, node):
        raise NotImplementedError


class Shapes(Wrong):
    """A wrong shape of the output."""

    def harm(self, context, editor, node):
        (out,) = (n for n in context.graph.nodes if n.op == "output")
        value = out.args[0][0]
        flat = editor.call(aten.unsqueeze.default, value, 0, before=out, sources=[value])
        out.args = ((flat,),)


class Dtypes(Wrong):
    def harm(self, context, editor, node):
        (out,) = (n for n in context.graph.nodes if n.op == "output")
        out.args = ((editor.call(aten.to.dtype, out.args[0][0], torch.float64, before=out, sources=[node]),),)


class NoOrigin(Wrong):
    def harm(self, context, editor, node):
        with context.graph.inserting_after(node):
            new = context.graph.call_function(aten.relu.default, (node,))
        node.replace_all_uses_with(new)
        new.args = (node,)


class LosesAWeight(Wrong):
    def harm(self, context, editor, node):
        editor.replace(node, editor.call(aten.linear.default, node.args[0], node.args[1], before=node, sources=[node]))
        editor.remove_dead()


class WrongOrder(Wrong):
    def harm(self, context, editor, node):
        node.args[0].append(node.args[1])  # the weight is now read before ...
        next(iter(node.users)).append(node)  # ... and the layer runs after its own reader


class DoesNotRun(Wrong):
    def harm(self, context, editor, node):
        wrong = editor.call(aten.linear.default, node.args[0], node.args[2], before=node, sources=[node])
        editor.replace(node, editor.call(aten.add.Tensor, wrong, node, before=node.next, sources=[node])) if False else None
        node.replace_input_with(node.args[0], editor.call(aten.mm.default, node.args[0], node.args[0], before=node, sources=[node]))
        del wrong


class DropsAnInput(Wrong):
    def harm(self, context, editor, node):
        first = next(n for n in context.graph.nodes if n.op == "placeholder")
        first.target = "renamed"


class Numbers(Wrong):
    """Right shapes, other numbers."""

    def harm(self, context, editor, node):
        double = editor.call(aten.mul.Tensor, node, 2, before=node.next, sources=[node])
        node.replace_all_uses_with(double, delete_user_cb=lambda user: user is not double)


class Gradients(Wrong):
    """Right outputs, other gradients."""

    def harm(self, context, editor, node):
        cut = editor.call(aten.detach.default, node.args[0], before=node, sources=[node])
        node.replace_input_with(node.args[0], cut)


class Breaks(Wrong):
    def harm(self, context, editor, node):
        raise KeyError("a bug in the pass")


def optimize_with(monkeypatch, cls, **more):
    """``optimize`` with ``cls`` run between the lookups' pass and the rest."""
    default = registry.DEFAULT
    monkeypatch.setattr(registry, "DEFAULT", (*default[:2], cls, *default[2:]))
    torch.manual_seed(0)
    model = Dot()
    return model, tw.optimize(model, sample_inputs=dot_batch(), **more)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Shapes, "output 0 was"),
        (Dtypes, "torch.float64"),
        (NoOrigin, "has no origin"),
        (LosesAWeight, "the graph no longer reads over.0.bias, over.3.bias"),
        (WrongOrder, "not well formed"),
        (DoesNotRun, "does not run on its own shapes"),
        (DropsAnInput, "the inputs changed from"),
    ],
)
def test_a_wrong_pass_is_rejected_and_the_model_still_runs(monkeypatch, cls, words):
    model, opt = optimize_with(monkeypatch, cls)
    rejected = [r for r in opt.report.records if r.status == "REJECTED"]
    assert len(rejected) == 2 and {r.rule for r in rejected} == {"wrong"}
    assert words in rejected[0].reason and "rolled back" in rejected[0].reason
    assert "2 of mlps REJECTED" in str(opt.report)
    step = next(s for s in opt.steps if s.name == "wrong")
    assert step.status == "REJECTED" and step.after is step.before and step.op_delta == {} and step.made == 0
    assert opt.report.coverage["lookups"] == (3, 3), "what other passes did stays"
    torch.testing.assert_close(opt(*dot_batch(7, seed=1)), model(*dot_batch(7, seed=1)))


@pytest.mark.parametrize(("cls", "words"), [(Numbers, "DIFFERENT: output 0"), (Gradients, "DIFFERENT: gradient of")])
def test_numeric_verification_catches_what_structure_cannot(monkeypatch, cls, words):
    _, opt = optimize_with(monkeypatch, cls)
    assert not opt.report.skipped("wrong"), "structure alone lets it pass"
    monkeypatch.undo()
    model, opt = optimize_with(monkeypatch, cls, verify="numerics")
    reasons = {r.reason for r in opt.report.records if r.status == "REJECTED"}
    assert len(reasons) == 1 and words in reasons.pop()
    torch.testing.assert_close(opt(*dot_batch()), model(*dot_batch()))
    assert opt.check(*dot_batch())


def test_a_pass_that_breaks_is_a_named_error(monkeypatch):
    with pytest.raises(tw.PassError) as error:
        optimize_with(monkeypatch, Breaks)
    text = str(error.value)
    assert "pass 'wrong' broke (KeyError: 'a bug in the pass')" in text
    assert "passes run before it: remove_zero_dropout, fuse_fm" in text and "passes: {wrong: false}" in text
    assert isinstance(error.value.__cause__, KeyError)


def test_a_pass_that_breaks_can_be_turned_off(monkeypatch):
    with pytest.raises(tw.PassError):
        optimize_with(monkeypatch, Breaks)
    opt = tw.optimize(Dot(), tw.Plan(passes={"wrong": False}), sample_inputs=dot_batch())
    assert opt.report.coverage["lookups"] == (3, 3)


def test_verify_must_be_known():
    with pytest.raises(tw.PlanError, match="verify is one of"):
        tw.optimize(Dot(), sample_inputs=dot_batch(), verify="numbers")


def test_steps_say_what_each_pass_did():
    opt = tw.optimize(Dot(), sample_inputs=dot_batch())
    steps = {s.name: s for s in opt.steps}
    assert list(steps) == [p.name for p in registry.DEFAULT]
    assert all(s.status == "ran" and s.seconds > 0 for s in opt.steps)
    assert steps["remove_zero_dropout"].op_delta == {"dropout": -1} and steps["remove_zero_dropout"].made == 1
    delta = steps["group_tables"].op_delta
    assert delta["embedding"] == -2 and delta["embedding_bag"] == delta["cat"] == -1 and delta["embedding_bags"] == 1
    assert steps["fuse_dot_interaction"].op_delta == {}
    for before, after in zip(opt.steps, opt.steps[1:]):
        assert before.after is after.before


def test_code_before_and_after_each_pass():
    opt = tw.optimize(Dot(), sample_inputs=dot_batch())
    assert "aten.embedding.default" in opt.code("group_tables", before=True)
    assert "aten.embedding.default" not in opt.code("group_tables") and "tablewright.embedding_bags" in opt.code("group_tables")
    assert opt.code() == opt.graph_module.code
    with pytest.raises(KeyError, match="no pass 'group' ran; the passes were remove_zero_dropout, "):
        opt.code("group")


class TwiceRelu(Rule):
    name = "twice_relu"
    kind = "relus"
    numerics = "approximate"

    def pattern(self, op, x):
        return op.relu(x)

    def rewrite(self, op, match, x):
        return op.call(aten.gelu.default, x, before=match.anchor, sources=[match.anchor])


def test_an_approximate_pass_needs_leave(monkeypatch):
    model, opt = optimize_with(monkeypatch, TwiceRelu)
    assert "approximate, and the plan allows reassociated" in str(opt.report)
    torch.testing.assert_close(opt(*dot_batch()), model(*dot_batch()))
    opt = tw.optimize(model, tw.Plan(numerics="approximate"), sample_inputs=dot_batch())
    assert opt.report.coverage["relus"] == (1, 1)
    assert not torch.allclose(opt(*dot_batch()), model(*dot_batch()))
