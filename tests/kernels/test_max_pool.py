"""``tablewright::embedding_max`` in C++ and in plain PyTorch, beside gathering the rows and taking their maximum."""
from __future__ import annotations

import functools

import max_pool_cases as data
import pytest
import torch
from tablewright.kernels.max_pool import cpu, op, plain
from tablewright.kernels.max_pool.op import OP, call

CASES = data.cases()
needs_library = pytest.mark.skipif(cpu._lib is None, reason=f"NOT TESTED: {cpu.describe()}")
FORMS = [pytest.param(True, marks=needs_library, id="native"), pytest.param(False, id="plain")]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(cpu, "serves", lambda weight: False)


def run(table, given, grad):
    table = table.clone().requires_grad_()
    out = call(table, *given, grad)
    (made,) = torch.autograd.grad(out, table, data.seeds(out).to(out.dtype))
    return out.detach(), made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grad", ["dense", "sparse"])
def test_equal(form, grad, dtype):
    table = data.tables(dtype)
    for given in CASES:
        want, want_grad = data.expected(table, given)
        out, made = run(table, given, grad)
        # adding 1e9 rounds in float32, in one way only: what is largest then is part of the meaning
        if dtype == torch.float32 and given[3] == "add":
            continue
        torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-6)
        if grad == "sparse":
            assert made.is_coalesced() and torch.equal(made._indices(), made._indices().unique()[None])
            read = given[0].unique()
            assert torch.equal(made._indices()[0], read[read != given[6]].long())
            made = made.to_dense()
        torch.testing.assert_close(made.double(), want_grad, atol=1e-5, rtol=1e-5)


def test_adding_rounds_as_in_torch(form):
    """Rows below which 1e9 was subtracted are equal in float32: the first of them takes the gradient."""
    table = data.tables(torch.float32)
    for given in [c for c in CASES if c[3] == "add"]:
        plain_table = table.clone().requires_grad_()
        want = op.reference(plain_table, *given)
        out, made = run(table, given, "dense")
        assert torch.equal(out, want)
        torch.testing.assert_close(made, torch.autograd.grad(want, plain_table, data.seeds(want))[0])


@pytest.mark.parametrize("mode", ["max", "amax", "bag"])
def test_special_values(form, mode):
    """NaN is largest but for a bag, where it counts only in the first row; -inf is a value like any other."""
    nan, inf = float("nan"), float("inf")
    table = torch.tensor([[nan, 1.0], [2.0, nan], [-inf, -inf], [3.0, 4.0]])
    given = (torch.tensor([[0, 1], [1, 0], [2, 2], [3, 2], [3, 0], [3, 1]]), None, None, "none", 0.0, mode, -1, False)
    wide = table.clone().requires_grad_()
    want = op.reference(wide, *given)
    out, made = run(table, given, "dense")
    torch.testing.assert_close(out, want, equal_nan=True)
    torch.testing.assert_close(made, torch.autograd.grad(want, wide, data.seeds(want))[0], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    table = data.tables(dtype)
    for given in CASES:
        if given[3] in ("multiply", "add") or given[5] == "amax" or given[4] == -1e9:  # rounding decides what is equal
            continue
        want, want_grad = data.expected(table, given)
        out, made = run(table, given, "sparse")
        assert torch.equal(out.double(), want)
        torch.testing.assert_close(made.to_dense().double(), want_grad, atol=0.05, rtol=0.02)


@needs_library
def test_threads_and_columns_of_a_wider_table():
    table = torch.randn(200, 70, dtype=torch.float64)[:, 3:67]
    given = (torch.randint(0, 200, (300, 9)), None, None, "none", 0.0, "max", -1, False)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(call(table, *given))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results) and torch.equal(results[0], data.expected(table, given)[0])


@pytest.mark.parametrize("given", [CASES[0], CASES[3], CASES[5], CASES[14], CASES[-2]], ids=lambda g: f"{g[3]} {g[5]}")
def test_differentiated_twice(form, given):
    table = torch.randn(data.ROWS, data.DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: call(w, *given), (table,))
    assert torch.autograd.gradgradcheck(lambda w: call(w, *given), (table,))


def test_a_mask_that_takes_a_gradient():
    ids, table = CASES[0][0], data.tables()
    scale = torch.randn(ids.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: call(table, ids, None, s, "multiply", 0.0, "max"), (scale,))


@needs_library
def test_the_table_may_change_before_the_backward():
    """As under plain modules: only ``amax`` reads the rows again, and says so."""
    for mode in ("max", "bag", "amax"):
        table = data.tables().requires_grad_()
        out = call(table, CASES[0][0], None, None, "none", 0.0, mode)
        with torch.no_grad():
            table.add_(1)
        if mode == "amax":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
        else:
            out.sum().backward()
            assert table.grad is not None


def test_errors(form):
    table = data.tables()
    bad = CASES[0][0].clone()
    for value in (data.ROWS, -1):
        bad[1, 2] = value
        with pytest.raises(IndexError, match="out of range"):
            call(table, bad, None, None, "none", 0.0, "max")
    with pytest.raises(IndexError, match="no positions"):
        call(table, torch.zeros(3, 0, dtype=torch.long), None, None, "none", 0.0, "amax")
    for offsets in ([1, 2], [0, 3, 2], [0, 9]):
        with pytest.raises(ValueError, match="offsets must start at 0"):
            call(table, torch.arange(5), torch.tensor(offsets), None, "none", 0.0, "bag")
    with pytest.raises(ValueError, match="without offsets they must be"):
        call(table, torch.arange(5), None, None, "none", 0.0, "max")
    assert plain.MODES == ("max", "amax", "bag") and cpu.KINDS is plain.KINDS  # the C++ enums' order


def test_compiled_and_frozen():
    table = data.tables(torch.float32)
    given = CASES[1]
    compiled = torch.compile(functools.partial(OP), backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(table, *given), op.reference(table, *given))
    assert not call(table.requires_grad_(), *given, "none").requires_grad
