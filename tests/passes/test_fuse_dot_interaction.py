"""Dot interactions in their spellings become one op; matrices read as matrices are recorded and stay."""
from __future__ import annotations

import pytest
import torch
from interaction_models import COLS, IDS, ROWS, F, Lookups, fused
from pass_harness import rewrite
from tablewright.kernels.interaction.pairs import decode
from tablewright.passes.fuse_dot_interaction import FuseDotInteraction
from tablewright.rewriter.capture import attach

LOWER = [(i, j) for i in range(F) for j in range(i)]
UPPER = list(zip(ROWS, COLS))


def _dlrm(offset):
    def how(m, rows, x):
        first = m.fields[0](rows[0])
        t = torch.cat([first, *rows[1:]], dim=1).view(first.size(0), -1, first.size(1))
        z = torch.bmm(t, torch.transpose(t, 1, 2))
        _, ni, nj = z.shape
        li = torch.tensor([i for i in range(F) for j in range(i + offset)])
        lj = torch.tensor([j for i in range(F) for j in range(i + offset)])
        return torch.cat([first] + [z[:, li, lj]], dim=1)

    return how


def _gram(select):
    return lambda m, rows, x: select(m, torch.bmm(x, x.transpose(1, 2)))


LI, LJ = (torch.tensor(n) for n in zip(*LOWER))
SPELLINGS = {
    "dlrm": (_dlrm(0), LOWER),
    "dlrm with itself": (_dlrm(1), [(i, j) for i in range(F) for j in range(i + 1)]),
    "tril_indices": (_gram(lambda m, z: (lambda t: z[:, t[0], t[1]])(torch.tril_indices(F, F, -1))), LOWER),
    "triu_indices attribute": (_gram(lambda m, z: z[:, m.triangle[0], m.triangle[1]]), UPPER),
    "Python lists": (_gram(lambda m, z: z[:, ROWS, COLS]), UPPER),
    "lists backwards": (_gram(lambda m, z: z[:, COLS[::-1], ROWS[::-1]]), [(j, i) for i, j in UPPER[::-1]]),
    "negative numbers": (_gram(lambda m, z: z[:, [-1, -2, 0], [0, 1, -1]]), [(3, 0), (2, 1), (0, 3)]),
    "mask by masked_select": (_gram(lambda m, z: torch.masked_select(z, m.stored_mask).view(-1, 6)), UPPER),
    "mask with the batch": (_gram(lambda m, z: torch.masked_select(z, m.mask).view(z.size(0), -1)), UPPER),
    "mask as index": (_gram(lambda m, z: z[:, m.mask]), UPPER),
    "mask made in forward": (_gram(lambda m, z: z[:, torch.ones(F, F).tril().bool()]), [(i, j) for i in range(F) for j in range(i + 1)]),
    "flat index": (_gram(lambda m, z: z.flatten(1)[:, LI * F + LJ]), LOWER),
    "flat index_select": (_gram(lambda m, z: z.view(-1, F * F).index_select(1, LI * F + LJ)), LOWER),
    "of a triangle": (_gram(lambda m, z: torch.triu(z, 1)[:, ROWS, COLS]), UPPER),
    "two views of one thing": (lambda m, rows, x: torch.bmm(x.view(-1, F, 6), x.view(-1, F, 6).mT)[:, ROWS, COLS], UPPER),
    "matmul": (lambda m, rows, x: (x @ x.mT)[:, ROWS, COLS], UPPER),
    "permute": (lambda m, rows, x: torch.matmul(x, x.permute(0, 2, 1))[:, ROWS, COLS], UPPER),
    "transposed first": (lambda m, rows, x: (lambda y: (y.transpose(1, 2) @ y)[:, ROWS, COLS])(x.transpose(1, 2).contiguous()), UPPER),
    "einsum": (lambda m, rows, x: torch.einsum("bij, bkj -> bik", x, x)[:, ROWS, COLS], UPPER),
    "broadcast": (lambda m, rows, x: (x.unsqueeze(1) * x.unsqueeze(2)).sum(-1)[:, ROWS, COLS], UPPER),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name):
    how, pairs = SPELLINGS[name]
    done = fused(how, FuseDotInteraction(measure=False))
    assert [r.status for r in done.records] == ["APPLIED"]
    (op,) = done.nodes("dot_interaction")
    found = decode(op.args[2])
    assert list(zip(found.first, found.second)) == pairs, "the plain model's order"
    assert not any(done.nodes(n) for n in ("bmm", "matmul", "einsum", "index", "masked_select", "index_select"))
    if name.startswith("dlrm"):
        assert len(op.args[1]) == 1 and op.args[3] == 1 and not done.nodes("cat")[1:], "the dense vector is written beside it"


JOINS = {
    "before": (lambda m, z, d: torch.cat([z, d], 1), 0, 1),
    "after": (lambda m, z, d: torch.cat([d, z], -1), 1, 1),
    "between": (lambda m, z, d: torch.cat([d, z, d * 2], 1), 1, 2),
}


@pytest.mark.parametrize("name", JOINS)
@pytest.mark.parametrize("pick", [lambda m, z: z[:, ROWS, COLS], lambda m, z: torch.masked_select(z, m.mask).view(-1, 6)])
def test_the_concatenation_is_taken_over(name, pick):
    join, place, extras = JOINS[name]
    done = fused(lambda m, rows, x: join(m, pick(m, torch.bmm(x, x.transpose(1, 2))), m.dense(rows[0])), FuseDotInteraction(measure=False))
    (op,) = done.nodes("dot_interaction")
    assert op.args[3] == place and len(op.args[1]) == extras and not done.nodes("cat")


def test_lookups_in_the_concatenation_are_left_to_the_table_groups():
    done = fused(lambda m, rows, x: torch.cat([(x @ x.mT)[:, ROWS, COLS], rows[1]], 1), FuseDotInteraction(measure=False))
    assert len(done.nodes("cat")) == 1 and len(done.nodes("dot_interaction")) == 1


def test_a_selection_read_twice_is_not_joined():
    def how(m, rows, x):
        z = (x @ x.mT)[:, ROWS, COLS]
        return torch.cat([z, m.dense(rows[0])], 1).sum() + z.sum()

    done = fused(how, FuseDotInteraction(measure=False))
    assert len(done.nodes("cat")) == 1 and len(done.nodes("dot_interaction")) == 1


NOT_SELECTIONS = {
    "softmax": (lambda m, rows, x: (x @ x.mT).softmax(-1), "read as a matrix by softmax"),
    "dropout": (lambda m, rows, x: torch.dropout(x @ x.mT, 0.5, m.training).sum() * 0, "read as a matrix by dropout"),
    "attention": (lambda m, rows, x: torch.bmm((x @ x.mT).softmax(-1), x), "read as a matrix by softmax"),
    "whole": (lambda m, rows, x: (x @ x.mT).flatten(1), "read as a matrix by flatten"),
    "two readers": (lambda m, rows, x: (lambda z: z[:, ROWS, COLS].sum() + z.sum())(x @ x.mT), "read by index, sum; one selection"),
    "index from data": (lambda m, rows, x: (x @ x.mT)[:, x[0, 0].argsort()[:3].clamp(max=3), [0, 1, 2]], "a fixed selection of pairs"),
    "zeroed entries": (lambda m, rows, x: torch.triu(x @ x.mT, 1)[:, COLS, ROWS], "a fixed selection of pairs"),
    "mask that broadcasts": (_gram(lambda m, z: torch.masked_select(z, torch.ones(1, 1).bool()).view(-1, F * F)), "a fixed selection of pairs"),
    "four dimensions": (lambda m, rows, x: (lambda y: y @ y.mT)(x.view(-1, 2, 2, 6))[:, :, [0, 1], [1, 0]], "of rank 4"),
}


@pytest.mark.parametrize("name", NOT_SELECTIONS)
def test_matrices_are_recorded_and_stay(name):
    how, reason = NOT_SELECTIONS[name]
    done = fused(how, FuseDotInteraction(measure=False))
    (found,) = done.records
    assert found.status == "SKIPPED" and reason in found.reason and found.location
    assert not done.nodes("dot_interaction")


@pytest.mark.parametrize(
    "how",
    [
        lambda m, rows, x: (x @ (x + 1).mT)[:, ROWS, COLS],
        lambda m, rows, x: torch.einsum("bij,bkj->bik", x, x * 2)[:, ROWS, COLS],
        lambda m, rows, x: torch.einsum("bij,bij->bi", x, x),
        lambda m, rows, x: x @ m.fields[0].weight,
    ],
)
def test_products_of_two_things_are_none(how):
    assert not fused(how, FuseDotInteraction(measure=False)).records


def test_a_changed_mask_is_noticed():
    """Pairs were read from the model's mask when the graph was rewritten; another mask must not give the old pairs silently."""
    done = fused(SPELLINGS["mask by masked_select"][0], FuseDotInteraction(measure=False))
    module = attach(done.shell, done.after)
    module(IDS)
    with torch.no_grad():
        done.shell.stored_mask[0, 0] = True
    with pytest.raises(RuntimeError, match="has changed since optimize"):
        module(IDS)
    with torch.no_grad():
        done.shell.stored_mask[0, 0] = False
    module(IDS)


@pytest.mark.parametrize("write", [lambda t: t.data.fill_(True), lambda t: t.numpy().fill(True)], ids=["data", "numpy"])
def test_a_mask_changed_behind_autograd_is_noticed(write):
    """Such a write leaves the tensor's version as it was."""
    done = fused(SPELLINGS["mask by masked_select"][0], FuseDotInteraction(measure=False))
    module = attach(done.shell, done.after)
    module(IDS)
    version = done.shell.stored_mask._version
    write(done.shell.stored_mask)
    assert done.shell.stored_mask._version == version
    with pytest.raises(RuntimeError, match="has changed since optimize"):
        module(IDS)


def test_any_batch():
    """No batch size is baked in."""
    done = rewrite(Lookups(SPELLINGS["mask with the batch"][0]), (IDS,), FuseDotInteraction(measure=False))
    plain, module = attach(done.shell, done.before), attach(done.shell, done.after)
    for size in (1, 2, 13):
        ids = torch.randint(20, (size, F))
        torch.testing.assert_close(module(ids)[0], plain(ids)[0])
