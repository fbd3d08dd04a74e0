"""Updates of float16 and bfloat16 tables: the float32 update of the same rows, rounded once, whatever the schedule."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.embedding import cpu, low_tables, reference, rounding
from tablewright.kernels.embedding.spec import GroupSpec, Lookup, Table
from tablewright.kernels.embedding.updates import TableUpdate

SPEC = GroupSpec(
    tables=(Table("a", 30, 5, "in_backward"), Table("b", 20, 3, "in_backward")),
    lookups=(
        Lookup(0, "x", "none", 0, 0, padding_idx=2),
        Lookup(0, "y", "mean", 1, 0),
        Lookup(1, "z", "sum", 2, 0),
    ),
    slots=(5, 5, 3),
)  # fmt: skip


def call(seed=0):
    torch.manual_seed(seed)
    indices = [torch.randint(0, 30, (40,)), torch.randint(0, 30, (12, 4)), torch.randint(0, 20, (25,))]
    offsets = [None, None, torch.tensor([0, 0, 5, 25])]
    grads = [torch.randn(40, 5), torch.randn(12, 5), torch.randn(4, 3)]
    return grads, indices, offsets, [None] * 3


def rule(kind, table):
    shapes = {"sgd": [], "adagrad": [table.shape], "rowwise_adagrad": [table.shape[:1]], "adam": [table.shape] * 2}[kind]
    state = tuple(torch.rand(shape) * 0.1 for shape in shapes)
    return TableUpdate(kind, lr=0.1, eps=1e-6, beta1=0.9, beta2=0.99, weight_decay=0.01, step=3, state=state)


@pytest.mark.parametrize("run", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_the_float32_update_rounded_once(kind, dtype, run):
    grads, indices, offsets, weights = call()
    low = [torch.randn(30, 5).to(dtype), torch.randn(20, 3).to(dtype)]
    wide = [t.float() for t in low]
    torch.manual_seed(1)
    rules = [rule(kind, t) for t in low]
    torch.manual_seed(1)
    plain = [rule(kind, t) for t in low]
    reference.update(SPEC, grads, wide, indices, offsets, weights, plain)
    low_tables.update(run, SPEC, grads, low, indices, offsets, weights, rules, [7, 8])
    for ours, expected, given, made, seed in zip(low, wide, rules, plain, (7, 8)):
        rounded = rounding.reference(expected, torch.arange(len(expected)), seed, dtype)
        step = expected.abs().clamp_min(1e-4) * 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
        assert ((ours.float() - expected).abs() <= step * 1.01).all()
        if run is reference:
            assert torch.equal(ours, rounded)
        else:  # its sums may be in another order, so that a value falls on the other side of its noise
            assert (ours != rounded).float().mean() < 0.02
        for a, b in zip(given.state, made.state):
            torch.testing.assert_close(a, b)


def test_small_gradients_are_not_lost():
    """Gradients below what float16 holds, and updates below half a step of the table: the mean of many rows still moves."""
    spec = GroupSpec((Table("a", 4000, 4, "in_backward"),), (Lookup(0, "x", "none", 0, 0),), (4,))
    table = torch.ones(4000, 4, dtype=torch.float16)
    grads = torch.full((4000, 4), 1e-8)
    for step in range(20):
        low_tables.update(
            cpu, spec, [grads], [table], [torch.arange(4000)], [None], [None], [TableUpdate("sgd", lr=1e3)], [rounding.seed_of("a", step)]
        )
    moved = 1 - table.double().mean()
    assert abs(moved / (20 * 1e3 * 1e-8) - 1) < 0.15
    rounded = torch.ones((), dtype=torch.float16) - torch.tensor(1e-5).half()
    assert rounded == 1, "rounding to nearest would have lost every step"


def test_rows_that_were_not_looked_up_and_frozen_tables_stay():
    grads, indices, offsets, weights = call()
    low = [torch.randn(30, 5).bfloat16(), torch.randn(20, 3).bfloat16()]
    before = [t.clone() for t in low]
    low_tables.update(cpu, SPEC, grads, low, indices, offsets, weights, [rule("sgd", low[0]), None], [1, 2])
    touched = torch.zeros(30, dtype=torch.bool)
    touched[torch.cat([indices[0][indices[0] != 2], indices[1].flatten()])] = True
    assert torch.equal(low[0][~touched], before[0][~touched]) and torch.equal(low[1], before[1])
    assert (low[0][touched] != before[0][touched]).any(1).all()


def test_no_ids_and_bad_ids():
    spec = GroupSpec((Table("a", 5, 2, "in_backward"),), (Lookup(0, "x", "none", 0, 0),), (2,))
    table = torch.ones(5, 2, dtype=torch.bfloat16)
    none = torch.empty(0, dtype=torch.int64)
    low_tables.update(cpu, spec, [torch.zeros(0, 2)], [table], [none], [None], [None], [TableUpdate("sgd", lr=1.0)], [1])
    with pytest.raises(IndexError, match="'x'"):
        low_tables.update(
            cpu, spec, [torch.ones(2, 2)], [table], [torch.tensor([0, 5])], [None], [None], [TableUpdate("sgd", lr=1.0)], [1]
        )
    assert torch.equal(table, torch.ones_like(table))
