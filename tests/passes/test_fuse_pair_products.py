"""Products of pairs of features, in every spelling, become one op: products, dot products, or their sum."""
from __future__ import annotations

import pytest
import torch
from interaction_models import COLS, ROWS, F, fused
from tablewright.passes.fuse_pair_products import FusePairProducts

PAIRS = list(zip(ROWS, COLS))


def _loop(product, join):
    return lambda m, rows, x: join([product(rows, x, i, j) for i, j in PAIRS])


def _columns(rows, x, i, j):
    return x[:, i] * x[:, j]


def _slices(rows, x, i, j):
    return x[:, i : i + 1] * x[:, j : j + 1]


def _lookups(rows, x, i, j):
    return rows[i] * rows[j]


def _stack(terms):
    return torch.stack(terms, 1)


def _cat(terms):
    return torch.cat(terms, 1)


def _field_aware(join):
    def how(m, rows, x):
        views = [field(x) for field in m.fields]
        return join([views[j][:, i] * views[i][:, j] for i, j in PAIRS])

    return how


def _lists(m, rows, x):
    e = [r.unsqueeze(1) for r in rows]
    return torch.cat([e[i] for i in ROWS], 1) * torch.cat([e[j] for j in COLS], 1)


def _selected(m, rows, x):
    return torch.index_select(x, 1, m.triangle[0]) * torch.index_select(x, 1, m.triangle[1])


PRODUCTS = {
    "index lists": lambda m, rows, x: x[:, ROWS] * x[:, COLS],
    "index_select": _selected,
    "of two tensors": lambda m, rows, x: m.fields[0](x).index_select(1, m.triangle[0]) * x.index_select(1, m.triangle[1]),
    "cat of lists": _lists,
    "stack of lists": lambda m, rows, x: _stack([rows[i] for i in ROWS]) * _stack([rows[j] for j in COLS]),
    "loop over columns": _loop(_columns, _stack),
    "loop over slices": _loop(_slices, _cat),
    "loop over lookups": _loop(_lookups, _stack),
    "flat concatenation": _loop(_lookups, _cat),
    "unbind": lambda m, rows, x: (lambda u: _stack([u[i] * u[j] for i, j in PAIRS]))(x.unbind(1)),
    "split": lambda m, rows, x: (lambda u: _cat([u[i] * u[j] for i, j in PAIRS]))(x.split(1, 1)),
    "chunk": lambda m, rows, x: (lambda u: _cat([u[i] * u[j] for i, j in PAIRS]))(x.chunk(F, 1)),
    "field aware": _field_aware(_stack),
    "field aware, one tensor": lambda m, rows, x: (lambda y: _stack([y[:, i, j] * y[:, j, i] for i, j in PAIRS]))(
        torch.stack([field(x) for field in m.fields], 1)
    ),
    "bilinear": lambda m, rows, x: _stack([m.fields[i](rows[i]) * rows[j] for i, j in PAIRS]),
}
DOTS = {
    "index lists": lambda m, rows, x: torch.sum(x[:, ROWS] * x[:, COLS], dim=2),
    "kept": lambda m, rows, x: torch.sum(x[:, ROWS] * x[:, COLS], dim=-1, keepdim=True),
    "index_select": lambda m, rows, x: _selected(m, rows, x).sum(-1),
    "cat of lists": lambda m, rows, x: _lists(m, rows, x).sum(dim=2, keepdim=True),
    "loop of sums": _loop(lambda rows, x, i, j: _columns(rows, x, i, j).sum(1, keepdim=True), _cat),
    "stack of sums": _loop(lambda rows, x, i, j: _lookups(rows, x, i, j).sum(-1), _stack),
    "slices": _loop(lambda rows, x, i, j: _slices(rows, x, i, j).sum(2), _cat),
    "field aware, all summed": lambda m, rows, x: _field_aware(_stack)(m, rows, x).sum(1).sum(1, keepdim=True),
    "field aware, added to more": lambda m, rows, x: m.dense(rows[0])[:, :1]
    + _field_aware(lambda terms: sum(t.sum(1, keepdim=True) for t in terms))(m, rows, x),
}
SUMS = {
    "index lists": lambda m, rows, x: torch.sum(x[:, ROWS] * x[:, COLS], dim=1),
    "everything": lambda m, rows, x: torch.sum(x[:, ROWS] * x[:, COLS], dim=[1, 2]),
    "in two steps": lambda m, rows, x: torch.sum(torch.sum(x[:, ROWS] * x[:, COLS], dim=1), dim=1, keepdim=True),
    "loop added up": _loop(_columns, sum),
    "loop stacked and summed": _loop(_lookups, lambda terms: _stack(terms).sum(1)),
    "loop of sums added up": _loop(lambda rows, x, i, j: _columns(rows, x, i, j).sum(1, keepdim=True), sum),
}


def _is_fused(how, op):
    done = fused(how, FusePairProducts(measure=False))
    assert [r.status for r in done.records] == ["APPLIED"]
    assert len(done.nodes(op)) == 1 and not done.nodes("mul") and not done.nodes("index") and not done.nodes("index_select")
    return done


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    _is_fused(PRODUCTS[name], "pair_products")


@pytest.mark.parametrize("name", DOTS)
def test_dot_products(name):
    _is_fused(DOTS[name], "dot_interaction")


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_all_pairs_are_factorization_machines(name):
    _is_fused(SUMS[name], "fm")


def test_a_sum_of_some_pairs_is_no_factorization_machine():
    done = _is_fused(lambda m, rows, x: (x[:, [0, 0, 1]] * x[:, [1, 2, 2]]).sum(1), "pair_products")
    assert not done.nodes("fm"), "feature 3 is in no pair"
    done = _is_fused(lambda m, rows, x: (x[:, [*ROWS[:-1], 0]] * x[:, [*COLS[:-1], 1]]).sum(1), "pair_products")
    assert not done.nodes("fm"), "one pair is there twice and one is not"


def test_dot_products_are_written_beside_what_they_are_concatenated_with():
    done = _is_fused(lambda m, rows, x: torch.cat([x.flatten(1), (x[:, ROWS] * x[:, COLS]).sum(2)], 1), "dot_interaction")
    (op,) = done.nodes("dot_interaction")
    assert len(op.args[1]) == 1 and op.args[3] == 1 and not done.nodes("cat")


def test_lookups_are_stacked_once():
    """Where the model stacks the same lookups, that stack is used."""
    assert len(_is_fused(_loop(_lookups, _stack), "pair_products").nodes("stack")) == 1


NEGATIVE = {
    "two pairs": lambda m, rows, x: _stack([rows[0] * rows[1], rows[1] * rows[2]]),
    "unrelated products": lambda m, rows, x: _stack([rows[0] * rows[1], rows[2] * rows[3], m.fields[0](rows[0]) * m.fields[1](rows[1])]),
    "two concatenations": lambda m, rows, x: _stack(rows) * _stack([f(r) for f, r in zip(m.fields, rows)]),
    "a gate": lambda m, rows, x: x[:, ROWS] * x[:, COLS].sigmoid(),
    "broadcast": lambda m, rows, x: x[:, ROWS] * x[:, [0]],
    "other sums": lambda m, rows, x: _stack([rows[i] + rows[j] for i, j in PAIRS]),
    "features for all samples": lambda m, rows, x: m.fields[0].weight[None, :F][:, ROWS] * x[:, COLS],
    "index from data": lambda m, rows, x: x[:, x[0, :3, 0].argsort()] * x[:, [0, 1, 2]],
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_look_alikes_stay(name):
    done = fused(NEGATIVE[name], FusePairProducts(measure=False))
    assert not done.of("APPLIED") and not done.nodes("pair_products")
    if name == "features for all samples":
        assert not done.records, "nothing was made that had to be rolled back"

