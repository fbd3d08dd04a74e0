"""Small tables, whose gradients are summed by products, beside ``reference.py``. Run by ``test_embedding_triton.py``, in a process of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from embedding_triton_cases import DEVICE, DTYPES, ODD_DIMS, TOLERANCE, Case, assert_same_steps, ids, mixed, rule_for
from tablewright.kernels.embedding import gpu, gpu_small, low_tables, reference, rounding


@pytest.fixture(autouse=True)
def _only_small(monkeypatch):
    torch.manual_seed(0)
    made = []
    monkeypatch.setattr(gpu, "sort_reads", lambda *args, **kwargs: made.append(args[6]))
    yield
    assert not any(any(wanted) for wanted in made), "a small table was sorted"


def dense(module, case, grads, wanted=None):
    return module.dense_gradients(case.spec, grads, *case.reads, wanted or [True] * len(case.tables))


def close(case, grads, factor=4.0, slack=0.0):
    """Compared in float64, where each row may be off by its own rounding and ``slack``."""
    wide = copy.copy(case)
    wide.tables, wide.weights = [t.double() for t in case.tables], [None if w is None else w.double() for w in case.weights]
    exact = dense(reference, wide, [None if g is None else g.double() for g in grads])
    tolerance = TOLERANCE[case.dtype] * factor
    for actual, expected in zip(dense(gpu, case, grads), exact, strict=True):
        assert actual.dtype == case.dtype
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance + slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_mixed_lookups(dtype):
    case = mixed(dtype)
    close(case, case.gradients())


@pytest.mark.parametrize("dim", ODD_DIMS)
def test_gradients_of_any_width(dim):
    case = Case(rows_and_dims=((20, dim),)).lookup(0, "none", ids(20, 3, 2)).lookup(0, "sum", ids(20, 6), [2, 0, 4], weighted=True)
    close(case, case.gradients())


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 512])
def test_every_row_of_tables_of_any_size(rows):
    case = Case(rows_and_dims=((rows, 8),)).lookup(0, "none", torch.cat([torch.arange(rows), ids(rows, 60)])[torch.randperm(rows + 60)])
    close(case, case.gradients())


def test_bags_of_more_ids_than_are_counted_at_once_and_several_slices():
    lengths = [300, 0, 129, *[1] * 2050]
    case = Case(rows_and_dims=((7, 8), (3, 4))).lookup(0, "sum", ids(7, sum(lengths)), lengths)
    case.lookup(1, "mean", ids(3, 135), [130, 0, 5], padding_idx=1).lookup(0, "none", ids(7, 2100))
    grads = case.gradients()
    close(case, grads, slack=1e-3)  # sums of 1,000 terms around 0
    assert all(map(torch.equal, dense(gpu, case, grads), dense(gpu, case, grads)))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    case = Case(rows_and_dims=((20, 16), (5, 4))).lookup(0, "sum", ids(20, 2 * batch), [2] * batch).lookup(1, "mean", ids(5, batch, 3))
    close(case.lookup(0, "none", ids(20, batch, 0)), case.gradients())


def test_bad_ids_and_ids_outside_of_bags_train_nothing():
    case = Case().lookup(0, "mean", ids(50, 9), [2, 4], include_last_offset=True)
    close(case, case.gradients())
    bad = Case().lookup(0, "none", torch.tensor([3, 50, -1, 3]))
    grad = torch.ones(4, 16, device=DEVICE)
    expected = torch.zeros(50, 16, device=DEVICE).index_fill(0, torch.tensor([3], device=DEVICE), 2.0)
    assert torch.equal(dense(gpu, bad, [grad])[0], expected)


def test_only_wanted_tables_with_a_gradient_are_touched():
    case = mixed()
    grads = case.gradients()
    grads[1] = None
    actual = dense(gpu, case, grads, [False, True, True])
    assert actual[0] is None
    for a, e in zip(actual[1:], dense(reference, case, grads, [False, True, True])[1:]):
        case.close(a, e, 4)
    assert not dense(gpu, case, [None] * len(case.slots), [True, False, False])[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_not_finite_reaches_only_the_rows_that_its_bag_reads(dtype, weighted):
    case = Case(dtype).lookup(0, "sum", torch.arange(8), [2, 2, 0, 4], weighted=weighted).lookup(0, "none", torch.tensor([5, 20]))
    grads = case.gradients()
    grads[0][1, 3], grads[0][2, :] = float("inf"), float("nan")  # bag 2 is empty
    made = dense(gpu, case, grads)[0]
    odd = torch.zeros(50, 16, dtype=torch.bool, device=DEVICE)
    odd[2:4, 3] = True
    assert torch.equal(~made.isfinite(), odd)
    expected = dense(reference, case, [g.nan_to_num(0.0, 0.0) for g in grads])[0]
    case.close(torch.where(odd, 0, made), torch.where(odd, 0, expected))


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_steps_of_each_optimizer(kind, dtype):
    case = Case(dtype, ((40, 16), (30, 7)))
    case.lookup(0, "sum", ids(40, 11), [3, 0, 7, 1], weighted=True).lookup(1, "none", ids(30, 9)).lookup(
        0, "none", ids(40, 5), padding_idx=3
    )
    assert_same_steps(case, [rule_for(kind, t) for t in case.tables])


def test_rows_that_were_read_with_no_weight_are_updated_and_others_are_not():
    """Adam and weight decay move a row that was read whatever its gradient is."""
    case = Case().lookup(0, "sum", torch.tensor([1, 2, 3]), [3], weighted=True)
    case.weights[0].zero_()
    assert_same_steps(case, [rule_for("adam", case.tables[0], weight_decay=0.1)])


def test_rules_that_differ_by_table_in_one_update():
    case = mixed()
    rules = [rule_for("adam", case.tables[0], weight_decay=0.1), None, rule_for("rowwise_adagrad", case.tables[2], maximize=True)]
    assert_same_steps(case, rules, steps=2)


def test_an_unknown_rule_is_refused():
    case = Case().lookup(0, "none", ids(50, 4))
    with pytest.raises(ValueError, match="unknown update 'lion'"):
        gpu.update(case.spec, case.gradients(), *case.reads, [rule_for("lion", case.tables[0])])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_of_half_precision_are_the_float32_update_rounded_once(dtype):
    case = Case(dtype, ((300, 33),)).lookup(0, "none", ids(300, 200))
    grads, seeds = [g.float() for g in case.gradients()], [12345]
    wide, low = [t.float() for t in case.tables], [t.clone() for t in case.tables]
    rule = rule_for("rowwise_adagrad", wide[0])
    rules = copy.deepcopy(rule)
    gpu.update(case.spec, grads, wide, *case.reads[1:], [rule])
    low_tables.update(gpu, case.spec, grads, low, *case.reads[1:], [rules], seeds)
    rows = torch.unique(case.ids[0])
    want = case.tables[0].clone()
    want[rows] = rounding.reference(wide[0][rows], rows, seeds[0], dtype)
    assert torch.equal(low[0], want) and not torch.equal(low[0], case.tables[0])


def test_the_number_of_rows_decides(monkeypatch):
    monkeypatch.undo()
    case = Case(rows_and_dims=((gpu_small.ROWS, 8), (gpu_small.ROWS + 1, 8))).lookup(0, "none", ids(9, 5)).lookup(1, "none", ids(9, 5))
    sorted_, small = [], []
    sort, finish = gpu.sort_reads, gpu_small.finish_small
    monkeypatch.setattr(gpu, "sort_reads", lambda *args, **kwargs: (sorted_.append(list(args[6])), sort(*args, **kwargs))[1])
    monkeypatch.setattr(gpu_small, "finish_small", lambda *args: (small.append(list(args[6])), finish(*args))[1])
    grads = case.gradients()
    for actual, expected in zip(dense(gpu, case, grads), dense(reference, case, grads)):
        case.close(actual, expected)
    assert small == [[0]] and sorted_ == [[False, True]]
