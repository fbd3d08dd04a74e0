"""What each table's backward gives: sparse rows, an update in the backward, nothing, or what it gave before; and why."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
import torch.nn.functional as F
from pass_harness import again, assert_same_numbers, assert_sound, graph_text, rewrite
from small_models import Dot, Tied, dot_batch, tied_batch
from tablewright.passes.group_tables import GroupTables
from tablewright.passes.table_gradients import CannotUpdate, Choice, TableGradients
from tablewright.rewriter.equivalence import without_in_backward
from torch import nn

TABLES = ("user.weight", "item.weight", "tags.weight")


def choose(model, args, tables, budget=None):
    """The pass on the grouped graph of ``model``, and the grouped graph."""
    grouped = rewrite(model, args, GroupTables())
    grouped.shell.__dict__["_tablewright_ticket"] = torch.zeros((), dtype=torch.int64)
    return again(grouped.shell, grouped.after, grouped.leaves, TableGradients(), tables, budget)


def grads(done):
    return {t.name: t.grad for spec in done.specs for t in spec.tables}


def assert_second_run_changes_nothing(done):
    second = again(done.shell, done.after, [], TableGradients(), done.context.tables)
    assert graph_text(second.after) == graph_text(done.after) and second.records == done.records


def test_sparse_gradients_are_the_same_gradients():
    done = choose(Dot(), dot_batch(), {n: Choice("sparse", detail="how") for n in TABLES})
    assert set(grads(done).values()) == {"sparse"}
    assert [(r.kind, r.subject, r.status, r.detail) for r in done.records] == [("updates", n, "APPLIED", "how") for n in TABLES]
    assert_sound(done, idempotent=False)
    assert_second_run_changes_nothing(done)


def test_each_table_has_its_own_choice():
    choices = {"user.weight": Choice("sparse"), "item.weight": Choice("keep", reason="so"), "tags.weight": Choice("none", detail="x")}
    done = choose(Dot(), dot_batch(), choices)
    assert grads(done) == {"user.weight": "sparse", "item.weight": "dense", "tags.weight": "none"}
    assert [(r.status, r.reason) for r in done.records] == [("APPLIED", ""), ("SKIPPED", "so"), ("APPLIED", "")]
    assert_second_run_changes_nothing(done)


def test_in_backward_tables_carry_a_ticket_and_their_owner():
    choices = {n: Choice("in_backward", owner=77, required=True) for n in TABLES[:2]}
    done = choose(Dot(), dot_batch(), choices)
    (node,) = done.nodes("embedding_bags")
    assert node.args[6].target == "_tablewright_ticket" and node.args[7] == 77
    assert node.args[6].meta["origin"].made_by == "table_gradients"
    assert grads(done) == {"user.weight": "in_backward", "item.weight": "in_backward", "tags.weight": "dense"}
    assert_same_numbers(done.shell, done.before, without_in_backward(done.after), done.leaves)
    assert_second_run_changes_nothing(done)


def test_a_launch_without_in_backward_tables_gets_no_ticket():
    done = choose(Tied(), tied_batch(), {"query.weight": Choice("in_backward", owner=3), "wide.weight": Choice("sparse")})
    assert sorted(len(n.args) for n in done.nodes("embedding_bags")) == [6, 8]


def test_a_tied_table_is_one_table():
    done = choose(Tied(), tied_batch(), {"query.weight": Choice("sparse"), "wide.weight": Choice("sparse")})
    assert grads(done) == {"query.weight": "sparse", "wide.weight": "sparse"} and len(done.of("APPLIED")) == 2
    assert_sound(done, idempotent=False)


class AlsoReadElsewhere(nn.Module):
    """A two-tower model that ties its item table with its output layer."""

    def __init__(self):
        super().__init__()
        self.items, self.users = nn.Embedding(9, 4), nn.Embedding(9, 4)

    def forward(self, ids):
        return F.linear(self.users(ids) + self.items(ids), self.items.weight)


class Masked(nn.Module):
    """A mask takes the dtype of rows that the fused lookup no longer makes: the table is asked."""

    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(9, 4, padding_idx=0)

    def forward(self, ids):
        rows = self.items(ids)
        mask = (ids != 0).to(rows.dtype).unsqueeze(2)
        return (rows * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("known", [True, False])
def test_a_table_whose_dtype_alone_is_read_elsewhere_gets_sparse_gradients(known):
    model, ids = Masked(), torch.tensor([[1, 2, 0], [3, 3, 8]])
    opt, _ = tw.optimize(model, optimizer=torch.optim.SGD(model.parameters()), sample_inputs=(ids,) if known else None)
    assert opt.report.coverage["updates"] == (1, 1)
    opt(ids).sum().backward()
    assert opt.items.weight.grad.is_sparse


IDS = (torch.tensor([1, 2, 1]),)
ELSEWHERE = "it is also read by linear, which is not a fused lookup"


def test_a_table_that_is_read_elsewhere_keeps_its_dense_gradient():
    done = choose(AlsoReadElsewhere(), IDS, {"items.weight": Choice("sparse"), "users.weight": Choice("sparse")})
    assert grads(done) == {"items.weight": "dense", "users.weight": "sparse"}
    assert [(r.subject, r.reason) for r in done.of("SKIPPED")] == [("items.weight", ELSEWHERE)]
    assert_sound(done, idempotent=False)


@pytest.mark.parametrize("grad", ["in_backward", "none"])
def test_a_plan_that_asks_the_impossible_of_it_is_an_error(grad):
    with pytest.raises(CannotUpdate, match=f"table 'items.weight' cannot be as told: {ELSEWHERE}"):
        choose(AlsoReadElsewhere(), IDS, {"items.weight": Choice(grad, detail="as told", required=True)})


def test_a_table_that_no_lookup_reads_is_skipped():
    done = choose(Dot(), dot_batch(), {"ghost.weight": Choice("sparse"), "user.weight": Choice("sparse")})
    assert [(r.subject, r.reason) for r in done.of("SKIPPED")] == [("ghost.weight", "the graph does not read it")]


def test_budget():
    done = choose(Dot(), dot_batch(), {n: Choice("sparse") for n in TABLES}, budget=2)
    assert len(done.of("APPLIED")) == 2 == done.context.made
    assert [r.reason for r in done.of("SKIPPED")] == ["beyond the number of rewrites that were asked for"]
