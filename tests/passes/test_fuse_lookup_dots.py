"""Interactions that look their features up themselves: the same numbers, the tables' gradients as before, skips with reasons."""
from __future__ import annotations

import pytest
import torch
from pass_harness import again, assert_same_numbers, assert_sound, rewrite
from tablewright import Plan, RowwiseAdagrad, optimize
from tablewright.kernels.embedding.spec import decode
from tablewright.passes import fuse_lookup_dots
from tablewright.passes.concatenated_lookups import ConcatenatedLookups
from tablewright.passes.fuse_dot_interaction import FuseDotInteraction
from tablewright.passes.fuse_lookup_dots import FuseLookupDots
from tablewright.passes.group_tables import GroupTables
from tablewright.passes.measure import Timing
from tablewright.passes.rule import Context
from tablewright.rewriter.verify import check_structure, copy_graph
from torch import nn

FUSE = FuseLookupDots(measure=False)
D = 6


class Dlrm(nn.Module):
    """One id a feature; ``form`` changes one thing that matters."""

    def __init__(self, form="", sparse=False):
        super().__init__()
        self.form = form
        self.bottom = nn.Sequential(nn.Linear(3, D), nn.ReLU())
        self.tables = nn.ModuleList(nn.Embedding(n, D, sparse=sparse) for n in (20, 7, 50))
        self.bags = nn.EmbeddingBag(9, D, mode="sum")
        self.top = nn.Linear(D + (4 if form in ("bag", "two slots") else 3) * (5 if form in ("bag", "two slots") else 4) // 2, 1)

        self.register_buffer("pairs", torch.tril_indices(4, 4, -1))

    def forward(self, dense, ids):
        x = self.bottom(dense)
        rows = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        if self.form == "bag":
            rows.append(self.bags(ids[:, :2] % 9))
        z = torch.stack([x, *rows], 1)
        if self.form == "read again":
            x = x + z.sum(1)
        if self.form == "written":
            z.add_(1)
        features = z.shape[1]
        i, j = self.pairs if self.form == "buffer" else torch.tril_indices(features, features, -1)
        flat = torch.bmm(z, z.transpose(1, 2))[:, i, j]
        if self.form == "two slots":
            flat = torch.cat([flat, self.bags(ids[:, :2] % 9)[:, :4]], 1)
        return self.top(torch.cat([x, flat], 1))


def given(batch=8):
    torch.manual_seed(0)
    return torch.randn(batch, 3), torch.stack([torch.randint(0, n, (batch,)) for n in (20, 7, 50)], 1)


def fuse(form="", batch=8, **options):
    done = rewrite(Dlrm(form, **options), given(batch), FuseDotInteraction(measure=False))
    for item in (ConcatenatedLookups(), GroupTables()):
        done = again(done.shell, done.after, done.leaves, item)
    return again(done.shell, done.after, done.leaves, FUSE), done.before


@pytest.mark.parametrize("batch", [8, 1, 0])
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_are_looked_up_inside(batch, sparse):
    done, before = fuse(batch=batch, sparse=sparse)
    assert [r.detail for r in done.of("APPLIED")] == ["3 lookups inside the interaction"]
    (lookup,), (inside,) = done.nodes("embedding_bags"), done.nodes("lookup_dots")
    assert decode(lookup.args[5]).unmade and not decode(inside.args[5]).unmade and not done.nodes("dot_interaction")
    check_structure(done.before, done.after, done.shell)
    assert inside.meta["origin"].made_by == "fuse_lookup_dots" and inside.meta["origin"].location
    assert_same_numbers(done.shell, before, done.after, done.leaves)
    assert not again(done.shell, done.after, [], FUSE).records


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("bag", "sums bags; plain lookups"),
        ("read again", "more readers; one that only the interaction reads"),
        ("two slots", "in 2 tensors with"),
    ],
)
def test_skips(form, words):
    done, _ = fuse(form)
    assert len(done.records) == 1 and words in done.of("SKIPPED")[0].reason, done.records
    assert_sound(done)


def test_what_is_written_in_place_stays():
    done, before = fuse("written")
    assert not done.nodes("lookup_dots")
    assert_same_numbers(done.shell, before, done.after, done.leaves)


def test_without_a_fused_lookup_there_is_nothing_to_say():
    done = rewrite(Dlrm(), given(), FuseDotInteraction(measure=False))
    assert not again(done.shell, done.after, done.leaves, FUSE).records


def test_pairs_in_a_buffer_are_looked_at_in_each_call():
    done, before = fuse("buffer")
    assert len(done.of("APPLIED")) == 1
    assert_same_numbers(done.shell, before, done.after, done.leaves)
    opt = optimize(model := Dlrm("buffer"), Plan(passes=ALL), sample_inputs=given())
    opt(*given())
    model.pairs[0, 0] = 2
    with pytest.raises(RuntimeError, match="changed"):
        opt(*given())


def test_budget():
    done, _ = fuse()
    less = again(done.shell, done.before, done.leaves, FUSE, budget=0)
    assert len(less.of("DISABLED")) == 1 and not less.nodes("lookup_dots")


@pytest.mark.parametrize(("gain", "status"), [(1.0, "SKIPPED"), (2.0, "APPLIED")])
def test_what_a_timing_decides(monkeypatch, gain, status):
    monkeypatch.setattr(fuse_lookup_dots, "_time", lambda *args: Timing(gain, 1.0, 2048))
    done, _ = fuse()
    timed = again(done.shell, done.before, done.leaves, FuseLookupDots())
    (row,) = timed.of(status)
    assert "on 2048 rows" in row.reason + row.detail


def test_the_timing_runs():
    done, _ = fuse()
    timed = again(done.shell, done.before, done.leaves, FuseLookupDots())
    (timing,) = (t for key, t in timed.context.timings.items() if key[0] == "fuse_lookup_dots")
    assert timing.rows == 2048 and timing.plain > 0 and timing.rewritten > 0


def test_tables_on_several_ranks_are_left_to_the_exchange():
    done, _ = fuse()
    item, context = FUSE, Context(copy_graph(done.before), done.shell, sharding=object())
    assert "several ranks" in item.run(context)[0].reason and context.made == 0


def test_a_cast_of_the_result_is_made_as_it_is_written():
    opt = optimize(Dlrm(), Plan(precision="bf16", passes=ALL), sample_inputs=given())
    code = opt.code()
    assert "lookup_dots" in code and "torch.bfloat16" in next(line for line in code.splitlines() if "lookup_dots" in line)
    opt.check(*given())


ALL = {"fuse_lookup_dots": {"measure": False}, "fuse_dot_interaction": {"measure": False}}


@pytest.mark.parametrize("in_backward", [True, False])
def test_training_is_that_of_the_unfused_lookup(in_backward):
    """Rowwise AdaGrad in the backward, and the user's AdaGrad on sparse gradients: the same tables after three steps."""
    results = []
    for fused in (True, False):
        torch.manual_seed(1)
        model = Dlrm()
        passes = ALL if fused else ALL | {"fuse_lookup_dots": False}
        if in_backward:
            plan = Plan(passes=passes, embedding_optimizer=RowwiseAdagrad(lr=0.1, eps=1e-8, in_backward=True))
            opt = optimize(model, plan, sample_inputs=given())
            optim = torch.optim.SGD(opt.dense_parameters(), lr=0.1)
        else:
            opt, optim = optimize(model, Plan(passes=passes), optimizer=torch.optim.Adagrad(model.parameters(), lr=0.1), sample_inputs=given())
        assert ("lookup_dots" in opt.code()) == fused
        losses = []
        for batch in (8, 5, 8):
            loss = opt(*given(batch)).square().sum()
            optim.zero_grad()
            loss.backward()
            optim.step()
            losses.append(loss.detach())
        opt.check(*given())
        results.append([*losses, *(p.detach().clone() for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
