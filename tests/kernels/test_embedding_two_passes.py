"""Rowwise AdaGrad in two passes over the gradients: the same bits as in one where no other rank holds columns, and the sums that are asked for."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tablewright.kernels.collectives.row_squares import RowSquares
from tablewright.kernels.embedding import cpu
from test_embedding_cpu import DTYPES, Group

pytestmark = pytest.mark.skipif(not cpu.available(), reason="NOT TESTED: the C++ library was not built")


def rules_of(group, **options):
    return group.rules("rowwise_adagrad", weight_decay=0.1, maximize=True, **options)


def in_two(group, tables, rules, names=("a", "b"), others=None):
    """Tables and states after a step; ``others``: squares that another rank adds."""
    passes = cpu.two_passes(group.spec, group.grads, tables, *group.inputs[1:], rules)
    squares = RowSquares({}, 0, "")
    squares.layouts = {name: SimpleNamespace(dim=t.shape[1] * (1 if others is None else 2)) for name, t in zip(names, tables)}
    squares.totals = lambda names, mine: [m if others is None else m + others[n][: len(m)].to(m.dtype) for n, m in zip(names, mine)]
    squares.update_in_two(names, passes)
    return [*tables, *(r.state[0] for r in rules if r is not None)]


@pytest.mark.parametrize("dims", [(16, 33), (32, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 37])
def test_same_bits_as_in_one_pass(dtype, batch, dims):
    group = Group(dtype, dims, batch=batch)
    for options in ({}, {"state_dtype": dtype}):
        want, rules = [t.clone() for t in group.tables], rules_of(group, **options)
        cpu.update(group.spec, group.grads, want, *group.inputs[1:], rules)
        got = in_two(group, [t.clone() for t in group.tables], rules_of(group, **options))
        assert all(map(torch.equal, got, [*want, *(r.state[0] for r in rules)]))
        assert not batch or not torch.equal(got[0], group.tables[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_of_other_columns_count(dtype):
    group = Group(dtype, (32, 7))
    others = {name: torch.rand(50, dtype=torch.float64) for name in "ab"}
    got = in_two(group, [t.clone() for t in group.tables], rules_of(group), others=others)
    tables, rules = [t.double() for t in group.tables], rules_of(group)
    for t, (rows, values) in enumerate(cpu.sparse_gradients(group.spec, group.grads, *group.inputs, [True, True])):
        values, state = values.double(), rules[t].state[0].double()
        state[rows] += ((values**2).sum(1) + others["ab"[t]][: len(rows)]) / (2 * values.shape[1])
        tables[t][rows] = tables[t][rows] * (1 - 0.1 * 0.1) + 0.1 * values / (state[rows].sqrt() + 1e-3)[:, None]
        tolerance = 1e-12 if dtype == torch.float64 else 3e-5
        torch.testing.assert_close(got[t].double(), tables[t], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got[2 + t].double(), state, rtol=tolerance, atol=tolerance)


def test_a_table_without_an_update_stays_as_it_is():
    group = Group()
    got = in_two(group, [t.clone() for t in group.tables], [None, rules_of(group)[1]])
    assert torch.equal(got[0], group.tables[0]) and not torch.equal(got[1], group.tables[1])


def test_a_first_pass_alone_changes_nothing():
    group, rules = Group(), rules_of(Group())
    tables = [t.clone() for t in group.tables]
    passes = cpu.two_passes(group.spec, group.grads, tables, *group.inputs[1:], rules)
    pairs = cpu.sparse_gradients(group.spec, group.grads, *group.inputs, [True, True])
    for squares, (_, values) in zip(passes.squares, pairs, strict=True):
        torch.testing.assert_close(squares, (values.double() ** 2).sum(1).float())
    del passes
    assert all(map(torch.equal, tables, group.tables)) and all(map(torch.equal, (r.state[0] for r in rules), (r.state[0] for r in rules_of(group))))


def test_what_the_library_cannot_take_is_left_to_the_reference():
    group, rules = Group(), rules_of(Group())
    state = torch.rand(50, 2)[:, 0]  # not contiguous
    rules[0] = rules[0].__class__("rowwise_adagrad", 0.1, state=(state,))
    assert cpu.two_passes(group.spec, group.grads, *group.inputs, rules) is None
    with pytest.raises(IndexError, match="50"):
        group.indices[0][0] = 50
        cpu.two_passes(group.spec, group.grads, *group.inputs, rules_of(group))
