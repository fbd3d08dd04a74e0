"""The three shapes of a rewrite: how patterns bind, what checks may say, groups, budgets, origins."""
from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from pass_harness import again, assert_sound, rewrite
from tablewright.passes.graph import aten
from tablewright.passes.records import skip
from tablewright.passes.rule import GroupRule, Pass, Rule
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x, y):
        a = torch.relu(torch.relu(x))  # twice is once
        b = torch.add(x, x)  # the same twice
        c = torch.add(x, y)  # two things
        return a + b.sigmoid() + c * self.scale


BATCH = (torch.randn(3, 2), torch.randn(3, 2))


@dataclass
class ReluOfRelu(Rule):
    """relu(relu(x)) -> relu(x)."""

    name: ClassVar[str] = "relu_of_relu"
    kind: ClassVar[str] = "relus"

    def pattern(self, op, x):
        return op.relu(op.relu(x))

    def rewrite(self, op, match, x):
        assert len(match.nodes) == 2 and match.anchor is match.nodes[0]
        return op.call(aten.relu.default, x, before=match.anchor, sources=match.nodes)


@dataclass
class AddToItself(Rule):
    """x + x -> 2 * x, by a pattern that repeats a variable; ``limit`` is an option that its check reads."""

    limit: int = 10
    name: ClassVar[str] = "add_to_itself"
    kind: ClassVar[str] = "adds"

    def pattern(self, op, x):
        return op.add(x, x)

    def check(self, match):
        if len(match.bound["x"].users) > self.limit:
            return skip(f"x has more than {self.limit} readers", at=match.bound["x"])
        return None

    def rewrite(self, op, match, x):
        return op.call(aten.mul.Tensor, x, 2, before=match.anchor, sources=[match.anchor])


def test_pattern_binds_and_replaces():
    done = rewrite(Model(), BATCH, ReluOfRelu())
    (row,) = done.records
    assert (row.status, row.kind, row.rule) == ("APPLIED", "relus", "relu_of_relu")
    assert row.location.startswith("test_rule_engine.py:") or "/test_rule_engine.py:" in row.location
    assert len(done.nodes("relu")) == 1
    assert_sound(done, exact=True)


def test_a_repeated_variable_must_be_the_same_value():
    done = rewrite(Model(), BATCH, AddToItself())
    assert len(done.records) == 1, "x + y must not match x + x"
    assert done.nodes("mul")[0].args[1] == 2
    assert_sound(done)


def test_a_check_that_refuses_leaves_the_graph_and_says_why():
    done = rewrite(Model(), BATCH, AddToItself(limit=1))
    (row,) = done.records
    assert row.status == "SKIPPED" and row.reason == "x has more than 1 readers"
    assert row.nodes == (next(n.name for n in done.after.nodes if n.op == "placeholder"),), "the guilty node is named"
    assert [n.name for n in done.after.nodes] == [n.name for n in done.before.nodes]


def test_constants_in_a_pattern_match_by_value_and_type():
    class TimesTwo(AddToItself):
        def pattern(self, op, x):
            return op.mul(x, 2)

        def check(self, match):
            return None

        def rewrite(self, op, match, x):
            return op.call(aten.add.Tensor, x, x, before=match.anchor, sources=[match.anchor])

    class Multiplies(nn.Module):
        def forward(self, x):
            return x * 2 + x * 3 + x * True

    done = rewrite(Multiplies(), (torch.randn(3),), TimesTwo())
    assert len(done.of("APPLIED")) == 1
    assert_sound(done)


def test_matching_again_after_a_rewrite_does_not_see_erased_nodes():
    class Deep(nn.Module):
        def forward(self, x):
            return torch.relu(torch.relu(torch.relu(torch.relu(x))))

    done = rewrite(Deep(), (torch.randn(4),), ReluOfRelu())
    assert done.of("APPLIED") and len(done.nodes("relu")) < 4
    assert_sound(done, idempotent=False, exact=True)
    while len(done.nodes("relu")) > 1:
        done = again(done.shell, done.after, done.leaves, ReluOfRelu())
        assert done.of("APPLIED")


def test_read_elsewhere_names_the_node_that_something_outside_reads():
    class Reads(nn.Module):
        def forward(self, x):
            inner = torch.relu(x)
            return torch.relu(inner) + inner

    class Careful(ReluOfRelu):
        def check(self, match):
            other = match.read_elsewhere()
            return skip("the inner relu is read elsewhere", at=other) if other is not None else None

    done = rewrite(Reads(), (torch.randn(4),), Careful())
    assert done.of("SKIPPED")[0].nodes == (done.nodes("relu")[0].name,)
    assert rewrite(Model(), BATCH, Careful()).of("APPLIED")


@dataclass
class OneSum(GroupRule):
    """All sigmoids of one rank become one call on their concatenation; floats of more than two dimensions stay out."""

    name: ClassVar[str] = "one_sum"
    kind: ClassVar[str] = "sigmoids"

    def key(self, node, facts):
        assert facts.graph is node.graph
        if node.target is not aten.sigmoid.default:
            return None
        rank = node.meta["val"].dim()
        return skip(f"rank {rank}", at=node) if rank > 2 else rank

    def fuse(self, nodes, facts):
        from tablewright.passes.graph import Editor
        from tablewright.passes.records import APPLIED, record

        editor = Editor(facts.graph, self.name)
        last = nodes[-1]
        joined = editor.call(aten.cat.default, [n.args[0] for n in nodes], before=last, sources=nodes)
        whole = editor.call(aten.sigmoid.default, joined, before=last, sources=nodes)
        parts = editor.call(aten.chunk.default, whole, len(nodes), before=last, sources=nodes)
        rows = [record(self.name, self.kind, APPLIED, n, detail=f"{len(nodes)} in one") for n in nodes]
        for i, node in enumerate(nodes):
            editor.replace(node, editor.call(operator.getitem, parts, i, before=last, sources=[node]))
        return rows


class Sigmoids(nn.Module):
    def forward(self, x):
        a, b = x + 1, x + 2
        deep = x.unsqueeze(0).unsqueeze(0)
        return a.sigmoid(), b.sigmoid(), x[0].sigmoid(), deep.sigmoid()


def test_group_rule_fuses_what_has_equal_keys():
    done = rewrite(Sigmoids(), (torch.randn(3, 2),), OneSum())
    assert [r.detail for r in done.of("APPLIED")] == ["2 in one", "2 in one", "1 in one"]
    assert [r.reason for r in done.of("SKIPPED")] == ["rank 4"]
    assert len(done.nodes("sigmoid")) == 3
    assert_sound(done, idempotent=False, exact=True)


@pytest.mark.parametrize("budget", [0, 1, 2, None])
def test_budget_limits_rewrites_and_reports_the_rest(budget):
    class Three(nn.Module):
        def forward(self, x):
            return (x + x).sigmoid() + (x + x).relu()

    done = rewrite(Three(), (torch.randn(2),), AddToItself(), budget=budget)
    made = 2 if budget is None else min(budget, 2)
    assert len(done.of("APPLIED")) == made == done.context.made
    assert [r.reason for r in done.of("DISABLED")] == ["beyond the number of rewrites that were asked for"] * (2 - made)


def test_group_budget_counts_groups():
    done = rewrite(Sigmoids(), (torch.randn(3, 2),), OneSum(), budget=1)
    assert len(done.of("APPLIED")) == 2 and len(done.of("DISABLED")) == 1 and done.context.made == 1


def test_an_author_who_forgets_a_method_is_told():
    graph = torch.fx.Graph()
    for cls, method in ((Pass, "run"), (Rule, "pattern"), (GroupRule, "key")):
        made = type("Empty", (cls,), {"name": "empty", "kind": "none"})()
        with pytest.raises(TypeError, match=rf"Empty must define {method}\(\)"):
            if cls is GroupRule:
                graph.placeholder("x")
            from tablewright.passes.rule import Context

            made.run(Context(graph, nn.Module()))


def test_dead_code_is_removed_but_state_changes_and_random_draws_stay():
    class Effects(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen.add_(1)
            x = torch.relu(torch.relu(x))
            return torch.nn.functional.dropout(x, 0.5, self.training)

    done = rewrite(Effects(), (torch.randn(3),), ReluOfRelu())
    names = [n.target for n in done.after.nodes]
    assert aten.add_.Tensor in names and len(done.nodes("relu")) == 1 and len(done.nodes("dropout")) == 1
    assert_sound(done, exact=True)
