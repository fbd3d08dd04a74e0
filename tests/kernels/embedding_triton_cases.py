"""The Triton kernels beside ``reference.py``, case by case. Run by ``test_embedding_triton.py``, in a process of its own.

With ``TRITON_INTERPRET=1`` on CPU tensors, otherwise on the GPU. In the interpreter float32 -> bfloat16 truncates instead of
rounding, so bfloat16 is compared to twice the usual tolerance.
"""

from __future__ import annotations

import copy
import os
import random

import pytest
import torch
from tablewright.kernels.embedding import gpu, gpu_small, low_tables, reference, rounding
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table
from tablewright.kernels.embedding.updates import TableUpdate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ODD_DIMS = [1, 3, 7, 33, 64, 128, 200]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(gpu_small, "ROWS", 0)  # these tables are small, but stand for large ones; small ones: embedding_small_triton_cases.py
    torch.manual_seed(0)
    random.seed(0)
    yield
    gpu.check_ids()  # no test may leave an unnoticed bad id behind


class Case:
    """One group of lookups with its inputs; ``lookup`` and ``extra`` add to it."""

    def __init__(self, dtype=torch.float32, rows_and_dims=((50, 16),)):
        self.dtype = dtype
        self.specs = [Table(f"table{i}.weight", rows, dim) for i, (rows, dim) in enumerate(rows_and_dims)]
        self.tables = [torch.randn(rows, dim, device=DEVICE).to(dtype) for rows, dim in rows_and_dims]
        self.lookups, self.extra_specs, self.slots = [], [], []
        self.ids, self.offsets, self.weights, self.extras = [], [], [], []

    def lookup(self, table, pooling, ids, lengths=None, slot=None, weighted=False, **options):
        """Add a lookup; ``lengths`` gives bags by offsets. Without ``slot`` it gets a slot of its own."""
        slot = self._slot(slot)
        column, dim = self.slots[slot], self.specs[table].dim
        self.slots[slot] += dim
        self.lookups.append(Lookup(table, f"lookup{len(self.lookups)}", pooling, slot, column, **options))
        self.ids.append(ids.to(DEVICE))
        offsets = None
        if lengths is not None:
            offsets = torch.tensor([0, *lengths]).cumsum(0)
            offsets = (offsets if options.get("include_last_offset") else offsets[:-1]).to(DEVICE)
        self.offsets.append(offsets)
        self.weights.append(torch.randn(ids.shape, device=DEVICE).to(self.dtype) if weighted else None)
        return self

    def extra(self, leading, width, slot=None):
        slot = self._slot(slot)
        self.extra_specs.append(Extra(slot, self.slots[slot], width))
        self.slots[slot] += width
        self.extras.append(torch.randn(*leading, width, device=DEVICE).to(self.dtype))
        return self

    def _slot(self, slot):
        if slot is None:
            slot = len(self.slots)
        if slot == len(self.slots):
            self.slots.append(0)
        return slot

    @property
    def spec(self):
        return GroupSpec(tuple(self.specs), tuple(self.lookups), tuple(self.slots), tuple(self.extra_specs))

    @property
    def reads(self):
        return self.tables, self.ids, self.offsets, self.weights

    def forward(self, module):
        return module.forward(self.spec, *self.reads, self.extras)

    def gradients(self):
        return [torch.randn_like(slot) for slot in self.forward(reference)]

    def close(self, actual, expected, factor=1.0):
        tolerance = TOLERANCE[self.dtype] * factor
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def ids(high, *shape, low=0, dtype=torch.int64):
    return torch.randint(low, high, shape, dtype=dtype)


def mixed(dtype=torch.float32):
    """Tied tables, mixed dims and poolings, shared slots, an extra, ragged and empty bags, padding, weights, negative ids."""
    case = Case(dtype, ((40, 16), (9, 64), (300, 7)))
    ragged = [3, 0, 40, 1, 0]
    case.extra((5,), 13, slot=0)
    case.lookup(0, "sum", ids(40, 44), ragged, slot=0, weighted=True)
    case.lookup(1, "mean", ids(9, 5, 6), slot=0, padding_idx=2)
    case.lookup(0, "mean", ids(40, 44), ragged, slot=0, padding_idx=1)
    case.lookup(2, "none", ids(300, 4, 3, low=-300), wrap_negative=True)
    case.lookup(1, "none", ids(9, 11), padding_idx=8)
    case.lookup(0, "sum", ids(5, 5, 8), weighted=True, padding_idx=3, padding_read=True)
    case.lookup(2, "sum", torch.cat([ids(300, 44), torch.tensor([299, 0])]), ragged, slot=0, include_last_offset=True)
    return case


def close_sparse(case, actual, expected, factor=1.0):
    assert [a is None for a in actual] == [e is None for e in expected]
    for a, e in zip(actual, expected):
        if a is not None:
            assert a[0].dtype == torch.int64 and torch.equal(a[0], e[0])
            case.close(a[1], e[1], factor)


# --- forward -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_of_mixed_lookups(dtype):
    case = mixed(dtype)
    for actual, expected in zip(case.forward(gpu), case.forward(reference), strict=True):
        case.close(actual, expected, factor=4)  # sums of up to 40 rows


@pytest.mark.parametrize("dim", ODD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_of_any_width(dim, dtype):
    case = Case(dtype, ((20, dim),)).lookup(0, "none", ids(20, 3, 2)).lookup(0, "sum", ids(20, 6), [2, 0, 4])
    plain, bags = case.forward(gpu)
    expected = case.forward(reference)
    assert torch.equal(plain, expected[0])
    case.close(bags, expected[1])


@pytest.mark.parametrize("batch", [0, 1])
def test_forward_of_small_batches(batch):
    case = Case(rows_and_dims=((20, 16), (5, 4)))
    case.lookup(0, "sum", ids(20, 2 * batch), [2] * batch, slot=0).lookup(1, "mean", ids(5, batch, 3), slot=0).extra(
        (batch,), 3, slot=0
    )
    case.lookup(0, "none", ids(20, batch, 0))
    for actual, expected in zip(case.forward(gpu), case.forward(reference), strict=True):
        case.close(actual, expected)


def test_forward_reads_the_largest_id_and_takes_mixed_integer_types():
    case = Case(rows_and_dims=((30, 8),)).lookup(0, "none", torch.tensor([29, 0, 29], dtype=torch.int32))
    case.lookup(0, "sum", torch.tensor([29, 29]), [2])
    for actual, expected in zip(case.forward(gpu), case.forward(reference), strict=True):
        case.close(actual, expected)


def test_columns_without_a_writer_are_zero():
    case = Case().lookup(0, "none", ids(50, 4))
    case.slots[0] += 5
    assert torch.equal(case.forward(gpu)[0], case.forward(reference)[0])


def test_tables_and_extras_with_strides():
    case = Case(rows_and_dims=((20, 16),)).lookup(0, "sum", ids(20, 6), [2, 4], slot=0).extra((2,), 6, slot=0)
    case.tables[0] = torch.randn(20, 24, device=DEVICE)[:, 3:19]
    case.extras[0] = torch.randn(6, 2, device=DEVICE).t()
    case.close(case.forward(gpu)[0], case.forward(reference)[0])


def test_float64_tables_go_to_the_reference():
    case = Case(torch.float64).lookup(0, "sum", ids(50, 6), [2, 4])
    assert torch.equal(case.forward(gpu)[0], case.forward(reference)[0])
    grads = [torch.randn_like(s) for s in case.forward(reference)]
    assert gpu.sparse_gradients(case.spec, grads, *case.reads, [True])[0][1].dtype == torch.float64


# --- what is wrong with inputs -----------------------------------------------------------------------------------------------


def test_a_bad_id_is_named_and_the_rest_is_read():
    case = Case(rows_and_dims=((50, 16), (20, 4))).lookup(1, "none", ids(20, 6)).lookup(0, "sum", ids(50, 300), [100, 200])
    case.ids[1][[7, 150, 250]] = torch.tensor([50, -1, 2**40], device=DEVICE)
    out = case.forward(gpu)
    with pytest.raises(
        IndexError, match=r"id 50 at position 7 of lookup 'lookup1' is out of range for table 'table0.weight' with 50 rows"
    ):
        gpu.check_ids()
    gpu.check_ids()  # reported once
    assert torch.equal(out[0], case.tables[1][case.ids[0]])
    grads = [torch.ones_like(o) for o in out]
    rows, _ = gpu.sparse_gradients(case.spec, grads, *case.reads, [True, False])[0]
    assert torch.equal(rows, case.ids[1][(case.ids[1] >= 0) & (case.ids[1] < 50)].unique())


def test_a_bad_id_is_reported_by_the_next_forward():
    bad, good = (Case().lookup(0, "none", torch.tensor([3, i])) for i in (50, 49))
    bad.forward(gpu)
    if not INTERPRETED:
        torch.cuda.synchronize()
    with pytest.raises(IndexError, match="id 50 at position 1"):
        good.forward(gpu)


def test_negative_ids_are_bad_unless_they_wrap():
    Case().lookup(0, "none", torch.tensor([-50]), wrap_negative=True).forward(gpu)
    gpu.check_ids()
    for low, wrap in ((-1, False), (-51, True)):
        Case().lookup(0, "none", torch.tensor([low]), wrap_negative=wrap).forward(gpu)
        with pytest.raises(IndexError, match=f"id {low} at position 0"):
            gpu.check_ids()


@pytest.mark.parametrize("offsets", [[0, 4, 2], [1, 2, 3], [0, 2, 9]], ids=["decrease", "begin late", "pass the end"])
def test_bad_offsets_are_reported_and_read_nothing_outside(offsets):
    case = Case().lookup(0, "sum", ids(50, 6), [2, 2, 2])
    case.offsets[0] = torch.tensor(offsets, device=DEVICE)
    out = case.forward(gpu)
    with pytest.raises(ValueError, match="offsets of lookup 'lookup0'"):
        gpu.check_ids()
    gpu.dense_gradients(case.spec, out, *case.reads, [True])


def test_shapes_are_checked_at_once():
    case = Case().lookup(0, "sum", ids(50, 6), [2, 4]).lookup(0, "none", ids(50, 6))
    for change, message in (
        (lambda c: c.ids.__setitem__(1, c.ids[1].float()), "dtype"),
        (lambda c: c.tables.__setitem__(0, c.tables[0][:49]), "shape"),
    ):
        broken = copy.deepcopy(case)
        change(broken)
        with pytest.raises((TypeError, ValueError), match=message):
            broken.forward(gpu)


# --- gradients ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_mixed_lookups(dtype):
    case = mixed(dtype)
    args = (case.spec, case.gradients(), *case.reads)
    close_sparse(case, gpu.sparse_gradients(*args, [True] * 3), reference.sparse_gradients(*args, [True] * 3), factor=4)
    for actual, expected in zip(gpu.dense_gradients(*args, [True] * 3), reference.dense_gradients(*args, [True] * 3), strict=True):
        case.close(actual, expected, factor=4)
    wanted = [True] * len(case.lookups)
    for actual, expected in zip(
        gpu.sample_weight_gradients(*args, wanted), reference.sample_weight_gradients(*args, wanted), strict=True
    ):
        assert (actual is None) == (expected is None)
        if actual is not None:
            case.close(actual, expected, factor=4)


@pytest.mark.parametrize("dim", ODD_DIMS)
def test_gradients_of_any_width(dim):
    case = Case(rows_and_dims=((20, dim),)).lookup(0, "none", ids(20, 3, 2)).lookup(0, "sum", ids(20, 6), [2, 0, 4], weighted=True)
    args = (case.spec, case.gradients(), *case.reads)
    close_sparse(case, gpu.sparse_gradients(*args, [True]), reference.sparse_gradients(*args, [True]))
    case.close(gpu.sample_weight_gradients(*args, [True, True])[1], reference.sample_weight_gradients(*args, [True, True])[1], 4)


def test_only_wanted_tables_with_a_gradient_are_touched():
    case = mixed()
    grads = case.gradients()
    grads[1] = None
    args = (case.spec, grads, *case.reads)
    close_sparse(case, gpu.sparse_gradients(*args, [False, True, True]), reference.sparse_gradients(*args, [False, True, True]), 4)
    grads = [None] * len(case.slots)
    rows, values = gpu.sparse_gradients(case.spec, grads, *case.reads, [True, False, False])[0]
    assert rows.shape == (0,) and values.shape == (0, 16)
    assert not gpu.dense_gradients(case.spec, grads, *case.reads, [True, False, False])[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hot_ids_whose_runs_cross_chunks(dtype):
    """Row 5 is read 1,000 times, row 19 300 times: runs of several pieces, begun inside a chunk and ended inside another."""
    hot = torch.cat([torch.full((1000,), 5), torch.full((300,), 19), ids(20, 60)])
    case = (
        Case(dtype, ((20, 24), (1, 8)))
        .lookup(0, "none", hot[torch.randperm(1360)])
        .lookup(1, "none", torch.zeros(700, dtype=torch.int64))
    )
    args = (case.spec, case.gradients(), *case.reads)
    first = gpu.sparse_gradients(*args, [True, True])
    close_sparse(case, first, reference.sparse_gradients(*args, [True, True]), factor=40)  # sums of 1,000 terms around 0
    for (_, values), (_, again) in zip(first, gpu.sparse_gradients(*args, [True, True])):
        assert torch.equal(values, again)


def test_runs_that_fill_chunks_exactly():
    case = Case(rows_and_dims=((3, 4),)).lookup(0, "none", torch.tensor([0] * 256 + [1] * 512 + [2]))
    args = (case.spec, case.gradients(), *case.reads)
    close_sparse(case, gpu.sparse_gradients(*args, [True]), reference.sparse_gradients(*args, [True]), factor=20)


@pytest.mark.parametrize("batch", [0, 1])
def test_gradients_of_small_batches(batch):
    case = (
        Case(rows_and_dims=((20, 16), (5, 4))).lookup(0, "sum", ids(20, 2 * batch), [2] * batch).lookup(1, "mean", ids(5, batch, 3))
    )
    case.lookup(0, "none", ids(20, batch, 0))
    args = (case.spec, case.gradients(), *case.reads)
    close_sparse(case, gpu.sparse_gradients(*args, [True, True]), reference.sparse_gradients(*args, [True, True]))


def test_ids_after_the_last_offset_train_nothing():
    case = Case().lookup(0, "mean", ids(50, 9), [2, 4], include_last_offset=True)
    args = (case.spec, case.gradients(), *case.reads)
    close_sparse(case, gpu.sparse_gradients(*args, [True]), reference.sparse_gradients(*args, [True]))


def test_expanded_gradients():
    case = Case().lookup(0, "sum", ids(50, 6), [2, 4])
    grads = [torch.ones(1, 1, device=DEVICE).expand(2, 16)]
    args = (case.spec, grads, *case.reads)
    close_sparse(case, gpu.sparse_gradients(*args, [True]), reference.sparse_gradients(*args, [True]))


# --- updates -----------------------------------------------------------------------------------------------------------------


def state_for(kind, table, wide):
    dtype = torch.float32 if wide else table.dtype
    if kind == "sgd":
        return ()
    if kind == "rowwise_adagrad":
        return (torch.rand(table.shape[0], device=DEVICE),)
    return tuple(torch.rand(table.shape, device=DEVICE).to(dtype) for _ in range(2 if kind == "adam" else 1))


def rule_for(kind, table, step=1, wide=True, **options):
    options = {"eps": 1e-3, "beta1": 0.9, "beta2": 0.99, "step": step} | options
    return TableUpdate(kind, lr=0.05, state=state_for(kind, table, wide), **options)


def assert_same_steps(case, rules, steps=3, factor=8.0):
    """Both implementations take ``steps`` steps from equal tables and states; then everything is compared."""
    ours, plain = copy.deepcopy((case.tables, rules)), copy.deepcopy((case.tables, rules))
    for step in range(1, steps + 1):
        grads = case.gradients()
        for module, (tables, held) in ((gpu, ours), (reference, plain)):
            for rule in held:
                if rule is not None:
                    rule.step = step
            module.update(case.spec, grads, tables, *case.reads[1:], held)
    for actual, expected, before in zip(ours[0], plain[0], case.tables):
        case.close(actual, expected, factor)
        assert case.dtype != torch.float32 or not torch.equal(actual, before) or expected.equal(before)
    for actual, expected in zip(ours[1], plain[1]):
        for a, e in zip(actual.state if actual else (), expected.state if expected else ()):
            case.close(a.float(), e.float(), factor)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_steps_of_each_optimizer(kind, dtype):
    case = Case(dtype, ((40, 16), (30, 7)))
    case.lookup(0, "sum", ids(40, 11), [3, 0, 7, 1], weighted=True).lookup(1, "none", ids(30, 9)).lookup(
        0, "none", ids(40, 5), padding_idx=3
    )
    assert_same_steps(case, [rule_for(kind, t) for t in case.tables])


def test_rules_that_differ_by_table_in_one_update():
    case = mixed()
    rules = [rule_for("adam", case.tables[0], weight_decay=0.1), None, rule_for("rowwise_adagrad", case.tables[2], maximize=True)]
    assert_same_steps(case, rules, steps=2)


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_state_in_the_tables_dtype(kind):
    case = Case(torch.float16, ((40, 16),)).lookup(0, "sum", ids(40, 11), [3, 0, 7, 1])
    assert_same_steps(case, [rule_for(kind, case.tables[0], wide=False)])


def test_update_of_a_hot_row_and_the_same_bits_twice():
    case = Case(rows_and_dims=((20, 24),)).lookup(0, "none", torch.cat([torch.full((700,), 5), ids(20, 60)]))
    rule = rule_for("rowwise_adagrad", case.tables[0], weight_decay=0.01)
    assert_same_steps(case, [rule], steps=1)
    grads = case.gradients()
    results = []
    for _ in range(2):
        tables, rules = copy.deepcopy((case.tables, [rule]))
        gpu.update(case.spec, grads, tables, *case.reads[1:], rules)
        results.append((tables[0], rules[0].state[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adam"])
def test_update_from_sparse(kind):
    case = Case(rows_and_dims=((40, 16), (30, 7), (8, 4)))
    rows = [torch.tensor([0, 7, 39], device=DEVICE), torch.tensor([29], device=DEVICE), None]
    values = [torch.randn(3, 16, device=DEVICE), torch.randn(1, 7, device=DEVICE), None]
    rules = [rule_for(kind, t) for t in case.tables]
    ours, plain = copy.deepcopy((case.tables, rules)), copy.deepcopy((case.tables, rules))
    gpu.update_from_sparse(ours[0], rows, values, ours[1])
    reference.update_from_sparse(plain[0], rows, values, plain[1])
    for actual, expected in zip(ours[0], plain[0]):
        case.close(actual, expected)
    for actual, expected in zip(ours[1], plain[1]):
        for a, e in zip(actual.state, expected.state):
            case.close(a, e)


def test_an_unknown_rule_is_refused():
    case = Case().lookup(0, "none", ids(50, 4))
    with pytest.raises(ValueError, match="unknown update 'lion'"):
        gpu.update(case.spec, case.gradients(), *case.reads, [TableUpdate("lion", lr=0.1)])


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_of_half_precision_are_the_float32_update_rounded_once(kind, dtype):
    """Bit for bit, over short runs, runs of several pieces, subnormal numbers, infinity and NaN."""
    case = Case(dtype, ((300, 33), (9, 16))).lookup(0, "none", ids(300, 200)).lookup(1, "sum", ids(9, 40, 8))
    case.tables[0][:60] *= 1e-6
    case.tables[0][70, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    case.ids[0][:80] = torch.arange(80)
    grads, seeds = [g.float() for g in case.gradients()], [12345, 2**32 - 5]
    wide, low = [t.float() for t in case.tables], [t.clone() for t in case.tables]
    torch.manual_seed(1)
    plain = [rule_for(kind, t) for t in wide]
    torch.manual_seed(1)
    ours = [rule_for(kind, t) for t in low]
    gpu.update(case.spec, grads, wide, *case.reads[1:], plain)
    low_tables.update(gpu, case.spec, grads, low, *case.reads[1:], ours, seeds)
    for table, expected, made, given, seed in zip(case.tables, wide, low, case.ids, seeds):
        rows = torch.unique(given)
        want = table.clone()
        want[rows] = rounding.reference(expected[rows], rows, seed, dtype)
        assert torch.equal(made.isnan(), want.isnan()) and torch.equal(made.nan_to_num(7.0), want.nan_to_num(7.0))
        assert not torch.equal(made, table)
    for a, b in zip(ours, plain):
        assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a.state, b.state))
