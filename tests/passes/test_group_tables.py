"""Lookups that share a launch: what the graph becomes, where results go, what moves, and every reason to leave one alone."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pass_harness import assert_sound, graph_text, rewrite
from small_models import DIM, ROWS, Dot, Tied, dot_batch, tied_batch
from tablewright.passes.group_tables import GroupTables
from tablewright.rewriter.capture import attach
from torch import nn

IDS = torch.tensor([3, 1, 3, 7])


class Joined(nn.Module):
    """``forward`` is ``how(a(ids), b(ids), x)`` for two tables of DIM columns."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Embedding(ROWS, DIM), nn.Embedding(ROWS, DIM)
        self.how = how

    def forward(self, ids, x):
        return self.how(self.a(ids), self.b(ids + 1), x)


def joined(how, ids=IDS, x=None):
    done = rewrite(Joined(how), (ids, torch.randn(len(ids), 3) if x is None else x), GroupTables())
    assert len(done.of("APPLIED")) == 2 and len(done.specs) == 1
    assert_sound(done)
    return done


def test_graph_text(golden):
    torch.manual_seed(0)
    done = rewrite(Dot(), dot_batch(), GroupTables())
    golden("group_tables_dot", graph_text(done.before) + "\n\n--- after group_tables ---\n" + graph_text(done.after))
    assert_sound(done)


def test_graph_text_of_tied_tables(golden):
    done = rewrite(Tied(), tied_batch(), GroupTables())
    golden("group_tables_tied", graph_text(done.after))
    assert [len(s.tables) for s in done.specs] == [1, 1], "a table of another dtype has a launch of its own"
    assert [t.name for t in done.specs[0].tables] == ["query.weight"] and len(done.specs[0].lookups) == 2
    assert_sound(done)


# --- joins -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "slots", "extras"),
    [
        (lambda a, b, x: torch.cat([a, b], 1), (2 * DIM,), 0),
        (lambda a, b, x: torch.cat([x, a, b], dim=-1), (3 + 2 * DIM,), 1),
        (lambda a, b, x: torch.cat([a, b, x], dim=1), (2 * DIM + 3,), 1),
        (lambda a, b, x: torch.cat([a, x, b], dim=1), (2 * DIM + 3,), 1),
        (lambda a, b, x: torch.stack([a, b], 1), (2 * DIM,), 0),
        (lambda a, b, x: torch.stack([a, b], -2), (2 * DIM,), 0),
    ],
    ids=["cat", "dense first", "dense last", "dense between", "stack", "stack, counted from the end"],
)
def test_whole_joins_become_a_slot(how, slots, extras):
    done = joined(how)
    assert done.specs[0].slots == slots and len(done.specs[0].extras) == extras
    assert not done.nodes("cat") and not done.nodes("stack") and not done.nodes("narrow")
    assert all("2" in r.detail and "written straight" in r.detail for r in done.of("APPLIED"))


@pytest.mark.parametrize(
    ("how", "slots", "cats"),
    [
        (lambda a, b, x: torch.cat([a, b, (a * 2).relu()], 1), (2 * DIM,), 1),
        (lambda a, b, x: torch.cat([a.relu(), a, b], 1), (2 * DIM,), 1),
        (lambda a, b, x: torch.cat([a, a.relu(), b], 1), (DIM, DIM), 1),
        (lambda a, b, x: torch.cat([a, b, a], 1), (DIM, DIM), 1),
        (lambda a, b, x: torch.cat([a, b], 0), (DIM, DIM), 1),
        (lambda a, b, x: torch.stack([a, b, a.relu()], 1).sum(1), (DIM, DIM), 0),
        (lambda a, b, x: torch.stack([a, b], 0), (DIM, DIM), 0),
        (lambda a, b, x: a + b, (DIM, DIM), 0),
    ],
    ids=["run at the front", "run at the end", "no run", "one twice", "cat of rows", "part of a stack", "stack in front", "no join"],
)
def test_partial_and_unsuitable_joins(how, slots, cats):
    done = joined(how)
    assert done.specs[0].slots == slots and len(done.nodes("cat")) == cats


def test_a_lookup_read_by_its_join_and_by_others_is_written_once():
    done = joined(lambda a, b, x: (torch.cat([a, b], 1), a * 2, torch.cat([b, x], 1)))
    assert done.specs[0].slots == (2 * DIM,) and len(done.nodes("narrow")) == 2


def test_two_joins_share_nothing():
    done = joined(lambda a, b, x: (torch.cat([a, b], 1), torch.cat([b, a], 1)))
    assert done.specs[0].slots == (2 * DIM,) and len(done.nodes("cat")) == 1


def test_an_extra_made_after_the_launch_stays_in_the_cat():
    done = joined(lambda a, b, x: torch.cat([x * a.sum(), a, b], 1))
    assert done.specs[0].extras == () and done.specs[0].slots == (2 * DIM,)


def test_an_integer_extra_stays_in_the_cat():
    done = joined(lambda a, b, x: torch.cat([x, a, b], 1), x=torch.ones(4, 3, dtype=torch.int64))
    assert done.specs[0].extras == () and len(done.nodes("cat")) == 1


def test_a_wider_extra_keeps_its_bits_and_promotes():
    x = torch.randn(4, 3, dtype=torch.float64)
    done = joined(lambda a, b, x: torch.cat([x, a, b], 1), x=x)
    (out,) = (n for n in done.after.nodes if n.op == "output")
    assert out.args[0][0].meta["val"].dtype == torch.float64


def test_an_extra_that_the_forward_changes_afterwards_is_not_copied_early():
    def how(a, b, x):
        y = x * 2
        first = a.relu()
        y.add_(1)
        return torch.cat([y, first, b], 1) + 0 * a.sum()

    joined(how)


def test_joined_sequences_keep_their_leading_dimensions():
    done = joined(lambda a, b, x: torch.cat([a, b], 2), ids=torch.randint(0, 9, (4, 2)))
    assert done.specs[0].slots == (2 * DIM,)


# --- groups and order --------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """The ids of the second lookup come out of the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.free = nn.Embedding(9, 2), nn.Embedding(9, 3), nn.Embedding(9, 3)

    def forward(self, ids):
        found = self.first(ids)
        return self.second(found.argmax(-1)) + self.free(ids)


def test_lookups_that_need_each_other_are_in_later_launches():
    done = rewrite(Chain(), (IDS,), GroupTables())
    assert [[t.name for t in s.tables] for s in done.specs] == [["first.weight", "free.weight"], ["second.weight"]]
    assert_sound(done)


class Late(nn.Module):
    """The second table's ids are made after the first table's rows are read: they have to move up."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b = nn.Embedding(9, 2), nn.Embedding(9, 2)
        self.between = between

    def forward(self, ids):
        first = self.a(ids).relu()
        return first + self.b(self.between(ids))


def test_what_ids_depend_on_moves_ahead_of_the_first_reader():
    done = rewrite(Late(lambda ids: (ids * 2 + 1) % 9), (IDS,), GroupTables())
    assert len(done.specs) == 1 and len(done.specs[0].lookups) == 2
    assert_sound(done)


def test_max_tables_splits_launches():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(9, 2) for _ in range(5))

        def forward(self, ids):
            return torch.cat([t(ids) for t in self.tables], 1)

    done = rewrite(Many(), (IDS,), GroupTables(max_tables=2))
    assert sorted(len(s.tables) for s in done.specs) == [1, 2, 2]
    assert_sound(done)


def test_each_pooling_and_layout_shares_the_launch():
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(9, 2, padding_idx=1)
            self.matrix = nn.EmbeddingBag(9, 3, mode="mean", padding_idx=-1)
            self.ragged = nn.EmbeddingBag(9, 4, mode="sum", include_last_offset=True)
            self.plain = nn.Parameter(torch.randn(9, 5))

        def forward(self, ids, matrix, flat, offsets, weights):
            return torch.cat(
                [self.e(ids), self.matrix(matrix), self.ragged(flat, offsets, weights), self.plain[ids - 4],
                 self.plain.index_select(0, ids), F.embedding(ids, self.plain), F.embedding_bag(flat, self.plain, offsets[:-1])], 1,
            )  # fmt: skip

    batch = (
        IDS, torch.tensor([[8, 8], [1, 8], [2, 2], [0, 1]]), torch.tensor([1, 2, 2, 5]), torch.tensor([0, 1, 1, 3, 4]), torch.rand(4),
    )  # fmt: skip
    done = rewrite(Bags(), batch, GroupTables())
    assert len(done.specs) == 1 and len(done.of("APPLIED")) == 7
    pooled = {(k.pooling, k.padding_idx, k.include_last_offset, k.wrap_negative) for k in done.specs[0].lookups}
    assert pooled == {
        ("none", 1, False, False), ("mean", 8, False, False), ("sum", None, True, False), ("none", None, False, True),
        ("none", None, False, False), ("mean", None, False, False),
    }  # fmt: skip
    assert_sound(done)


def test_a_lookup_nobody_reads_is_not_counted():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(9, 2), nn.Embedding(9, 2)

        def forward(self, ids):
            self.b(ids)
            return self.a(ids)

    done = rewrite(Unused(), (IDS,), GroupTables())
    assert [r.subject for r in done.records] == ["a"]


def test_frozen_and_buffer_tables_have_no_gradient():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Embedding.from_pretrained(torch.randn(9, 2), freeze=True)
            self.register_buffer("b", torch.randn(9, 2))
            self.c = nn.Embedding(9, 2, sparse=True)

        def forward(self, ids):
            return self.a(ids) + F.embedding(ids, self.b) + self.c(ids)

    done = rewrite(Frozen(), (IDS,), GroupTables())
    assert {t.name: t.grad for t in done.specs[0].tables} == {"a.weight": "dense", "b": "none", "c.weight": "sparse"}
    assert_sound(done)


@pytest.mark.parametrize("numel", [5, 600])  # few ids of one table have a way of their own
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_frozen_tables_alone_require_no_gradient(numel, weighted):
    class Target(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = nn.Embedding(9, 2), nn.Embedding(9, 2)
            self.target.weight.requires_grad_(False)
            self.bag = nn.EmbeddingBag(9, 2, mode="sum").requires_grad_(False)
            self.weight = nn.Parameter(torch.ones(1), requires_grad=weighted)

        def forward(self, ids):
            return self.online(ids), self.target(ids), self.bag(ids[:, None], per_sample_weights=self.weight.expand(len(ids), 1))

    ids = torch.arange(numel) % 9
    done = rewrite(Target(), (ids,), GroupTables())
    assert len(done.specs) == 1
    module = attach(done.shell, done.after)
    assert [y.requires_grad for y in module(ids)] == [True, False, weighted]
    module.get_parameter("target.weight").requires_grad_(True)  # a table may be thawed later
    assert [y.requires_grad for y in module(ids)] == [True, True, weighted]


def test_a_sparse_and_a_dense_reader_of_one_table_add_up_to_dense():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(9, 2))

        def forward(self, ids):
            return F.embedding(ids, self.w, sparse=True) + F.embedding(ids + 1, self.w)

    done = rewrite(Both(), (IDS,), GroupTables())
    assert [t.grad for t in done.specs[0].tables] == ["dense"]
    assert_sound(done)


def test_without_sample_inputs_the_same_model_is_fused():
    done = rewrite(Dot(), None, GroupTables())
    assert len(done.of("APPLIED")) == 3
    assert_sound(done)


class PlainTensors(nn.Module):
    """Keeps tensors as plain attributes, as some third-party models keep their interaction history."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.history, self.values = torch.randint(20, (7, 3)), torch.randn(7, 3)

    def forward(self, users):
        return self.table(self.history[users]) * self.values[users].unsqueeze(-1)


def test_a_table_that_is_a_plain_attribute():
    done = rewrite(PlainTensors(), (torch.tensor([0, 6, 1]),), GroupTables())
    assert {t.name: t.grad for spec in done.specs for t in spec.tables} == {"table.weight": "dense", "values": "none"}
    assert_sound(done)
