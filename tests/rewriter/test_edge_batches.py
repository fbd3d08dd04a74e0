"""``check`` and ``verify="numerics"`` also look at the ids and batch sizes that sample inputs rarely hold."""
from __future__ import annotations

import pytest
import tablewright as tw
import torch
from small_models import Dot, dot_batch, weights_of
from tablewright.kernels.embedding.op import OP
from tablewright.kernels.embedding.spec import decode
from tablewright.rewriter.edge_batches import edge_batches
from tablewright.rewriter.equivalence import difference
from torch import nn


def made_for(model, batch):
    opt = tw.optimize(model, sample_inputs=batch)
    variant = opt._variants[0]
    return {name: args for name, args, _ in edge_batches(variant.captured.graph, opt._shell, variant.captured.guards, batch, {})}


def test_each_kind_of_batch():
    given = dot_batch()
    made = made_for(Dot(), given)
    assert list(made) == ["the largest id", "one id many times", "padding ids", "a batch of 6", "a batch of 1", "a batch of 0"]
    _, user, item, tags = made["the largest id"]
    assert user[::2].eq(19).all() and item[::2].eq(29).all() and tags[::2].eq(19).all()
    assert torch.equal(user[1::2], given[1][1::2])
    _, user, item, tags = made["padding ids"]
    assert item[::2].eq(0).all() and torch.equal(user, given[1]) and torch.equal(tags, given[3])
    assert made["one id many times"][1][::2].eq(given[1][0]).all()
    assert [t.shape[0] for t in made["a batch of 0"]] == [0] * 4
    assert torch.equal(given[1], dot_batch()[1]), "the batch itself is not changed"


class Columns(nn.Module):
    """Ids as columns of one matrix, through views; one of them is shared by tables of different size; one is computed."""

    def __init__(self):
        super().__init__()
        self.small, self.large, self.hashed = nn.Embedding(5, 2), nn.Embedding(50, 2), nn.Embedding(7, 2)

    def forward(self, ids):
        first, second = ids[:, 0], ids.unbind(1)[1]
        return torch.cat([self.small(first), self.large(first), self.large(second), self.hashed((ids[:, 2] * 31) % 7)], 1)


def test_ids_are_found_through_views_and_shared_ones_fit_the_smallest_table():
    given = torch.randint(0, 5, (4, 3))
    (ids,) = made_for(Columns(), (given,))["the largest id"]
    assert ids[::2, 0].eq(4).all() and ids[::2, 1].eq(49).all() and torch.equal(ids[:, 2], given[:, 2])


def test_batch_sizes_are_left_alone_where_there_are_offsets():
    class Jagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(9, 2, padding_idx=3)

        def forward(self, ids, offsets):
            return self.bag(ids, offsets)

    made = made_for(Jagged(), (torch.tensor([1, 2, 3, 8]), torch.tensor([0, 2, 2])))
    assert list(made) == ["the largest id", "one id many times", "padding ids"]
    assert made["padding ids"][0].tolist() == [3, 2, 3, 8] and made["padding ids"][1].tolist() == [0, 2, 2]


@pytest.mark.parametrize("sparse", [False, True])
def test_check_looks_at_them_and_changes_nothing(sparse):
    model = Dot(sparse=sparse)
    opt = tw.optimize(model, sample_inputs=dot_batch())
    before, batch = weights_of(opt), dot_batch()
    found = opt.check(*batch)
    assert found, str(found)
    said = {d.what for d in found.differences}
    assert {"output 0", "output 0 with the largest id", "gradient of item.weight with padding ids", "output 0 with a batch of 0"} <= said
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights_of(opt).values()))
    assert all(torch.equal(a, b) for a, b in zip(batch, dot_batch()))


@pytest.mark.parametrize("what", ["padding", "rows"])
def test_check_finds_a_fault_that_the_given_batch_does_not_show(what):
    """A lookup that forgot its padding id; one that reads another table for the last row. No such id is in the batch."""
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.other = nn.Embedding(9, 2, padding_idx=0), nn.Embedding(9, 2)

        def forward(self, ids):
            return self.e(ids) + 0 * self.other(ids)

    ids = torch.tensor([1, 2, 3])
    opt = tw.optimize(Plain(), sample_inputs=(ids,))
    (node,) = (n for n in opt.graph_module.graph.nodes if n.target is OP)
    if what == "padding":
        spec = decode(node.args[5]).encode()
        assert '"padding_idx":0' in spec
        node.args = (*node.args[:5], spec.replace('"padding_idx":0', '"padding_idx":null'), *node.args[6:])
    else:
        with node.graph.inserting_before(node):
            clamped = node.graph.call_function(torch.ops.aten.clamp_max.default, (node.args[1][0], 7))
        node.args = (node.args[0], [clamped, *node.args[1][1:]], *node.args[2:])
    wrong = {d.what for d in opt.check(ids).differences if not d.ok}
    if what == "padding":
        assert wrong == {"gradient of e.weight with padding ids"}
    else:
        assert wrong == {"output 0 with the largest id", "gradient of e.weight with the largest id"}


def test_what_the_plain_model_refuses_is_left_out():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.norm = nn.Embedding(9, 2), nn.BatchNorm1d(2)

        def forward(self, ids):
            return self.norm(self.e(ids))

    model = Normed()
    opt = tw.optimize(model, sample_inputs=(torch.tensor([1, 2, 3]),), verify="numerics")
    assert opt.report.coverage["lookups"] == (1, 1)
    found = opt.check(torch.tensor([1, 2, 3]))
    assert found and not [d for d in found.differences if "batch of 1" in d.what], "batch norm wants more than one row to train"
    assert [d for d in found.differences if "batch of 4" in d.what]
    assert int(model.norm.num_batches_tracked) == 0


def test_a_difference_is_seen_whatever_the_values():
    nan, inf = float("nan"), float("inf")
    for a, b in (([nan], [1.0]), ([1.0], [nan]), ([inf], [1.0]), ([inf], [-inf]), ([nan, nan], [nan, 0.0]), ([0.0], [1e-9 + 1])):
        assert not difference("x", torch.tensor(a), torch.tensor(b)).ok, (a, b)
    for a in ([nan], [inf, 1.0], [0.0], []):
        assert difference("x", torch.tensor(a), torch.tensor(a)).ok, a
    assert difference("x", None, torch.zeros(2)).ok and not difference("x", None, torch.ones(2)).ok
    assert not difference("x", torch.ones(2), torch.ones(3)).ok and not difference("x", torch.ones(2), torch.ones(2).double()).ok
