"""``tablewright::gru`` is ``torch.gru``: values, gradients, second derivatives, special values, every door."""
from __future__ import annotations

import itertools

import pytest
import torch
from tablewright.kernels.gru import cpu, op
from tablewright.kernels.gru.op import OP, call, reference

SIZES = [(5, 3, 4, 6, 1), (33, 4, 16, 16, 2), (1, 1, 1, 1, 1), (40, 3, 24, 37, 2)]  # batch, steps, in, dim, layers


def given(batch, steps, width, dim, layers, biases, batch_first, dtype=torch.float32):
    torch.manual_seed(0)
    plain = torch.nn.GRU(width, dim, layers, bias=biases, dtype=dtype)
    x = torch.randn((batch, steps, width) if batch_first else (steps, batch, width), dtype=dtype)
    return [x, torch.randn(layers, batch, dim, dtype=dtype), *(p.detach() for p in plain.parameters())]


def grads(function, tensors, biases, batch_first, read=(True, True)):
    x, hx, *weights = (t.detach().clone().requires_grad_() for t in tensors)
    outs = [o for o, wanted in zip(function(x, hx, weights, biases, batch_first), read) if wanted]
    seeds = [torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape) for o in outs]
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, [x, hx, *weights], seeds))


def counted(monkeypatch):
    """How often the C++ side is asked: where it is not there, nothing below tests it."""
    if not cpu.available():
        pytest.skip(f"NOT TESTED: {cpu.describe()}")
    calls, forward = [], cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args: calls.append(1) or forward(*args))
    return calls


@pytest.mark.parametrize(("biases", "batch_first"), list(itertools.product((True, False), (True, False))))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equal(sizes, biases, batch_first, monkeypatch):
    calls = counted(monkeypatch)
    tensors = given(*sizes, biases, batch_first)
    exact = [t.double() for t in tensors]
    for read in ((True, True), (True, False), (False, True)):
        made = grads(call, tensors, biases, batch_first, read)
        for ours, wanted in zip(made, grads(reference, exact, biases, batch_first, read)):
            assert ours.is_contiguous()
            torch.testing.assert_close(ours.double(), wanted, atol=3e-6 * max(1.0, float(wanted.abs().max())), rtol=1e-5)
    assert len(calls) == 3


def test_small_values_keep_their_digits(monkeypatch):
    """tanh of small values is as exact as the values."""
    counted(monkeypatch)
    x, hx, w, u = given(8, 1, 4, 5, 1, False, True)
    tiny = [x * 1e-6, hx * 0, w, u]
    ours, plain = (f(*tiny[:2], tiny[2:], False, True)[0] for f in (call, reference))
    exact = reference(*(t.double() for t in tiny[:2]), [t.double() for t in tiny[2:]], False, True)[0]
    assert float((ours - exact).abs().max()) <= 4 * float((plain - exact).abs().max()) + 1e-13


def test_large_and_special_values(monkeypatch):
    counted(monkeypatch)
    x, hx, *weights = given(6, 2, 3, 4, 1, True, True)
    x[0], x[1, 0, 0], x[2, 1, 1], x[3, 0], hx[0, 4, 0] = 1e6 * x[0], float("inf"), float("nan"), -60.0, float("-inf")
    for ours, plain in zip(call(x, hx, weights, True, True), reference(x, hx, weights, True, True)):
        torch.testing.assert_close(ours, plain, equal_nan=True, atol=1e-6, rtol=1e-5)


def test_strided_inputs_and_a_summed_result(monkeypatch):
    """A view of wider rows, transposed weights, one state for all rows, and a gradient that is one number in memory."""
    calls = counted(monkeypatch)
    x, hx, *weights = given(9, 3, 8, 5, 1, True, True)
    wide, weights[0] = torch.cat([x, x], 2)[:, :, 3:11], weights[0].t().contiguous().t()
    hx = hx[:, :1].expand(-1, 9, -1)
    for function in (call, reference):
        function(wide, hx, weights, True, True)
    asked = [t.detach().requires_grad_() for t in (wide, hx, *weights)]
    ours, plain = (torch.autograd.grad(f(*asked[:2], asked[2:], True, True)[0].sum(), asked) for f in (call, reference))
    for got, wanted in zip(ours, plain):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)
    assert len(calls) == 2


def test_a_training_step_and_two_backwards(monkeypatch):
    counted(monkeypatch)
    x, hx, *start = given(12, 4, 6, 5, 2, True, True)
    ends = []
    for function in (call, reference):
        weights = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = torch.optim.Adagrad(weights, lr=0.1)
        out, last = function(x, hx, weights, True, True)
        loss = (out**2).mean() + last.sum()
        loss.backward(retain_graph=True)
        loss.backward()  # adds the same again: what is kept for the backward is not used up
        optimizer.step()
        ends.append([*weights, *(w.grad for w in weights)])
    for got, wanted in zip(*ends):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_only_what_is_wanted(monkeypatch):
    counted(monkeypatch)
    x, hx, *weights = given(4, 3, 6, 5, 1, True, True)
    weights[1].requires_grad_()
    (got,) = torch.autograd.grad(call(x, hx, weights, True, True)[1].sum(), weights[1])
    (wanted,) = torch.autograd.grad(reference(x, hx, weights, True, True)[1].sum(), weights[1])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_differentiated_twice(monkeypatch):
    counted(monkeypatch)
    tensors = [t.requires_grad_() for t in given(4, 3, 3, 4, 1, True, True)]
    seconds = []
    for function in (call, reference):
        out, last = function(*tensors[:2], tensors[2:], True, True)
        firsts = torch.autograd.grad((out**2).sum() + last.sum(), tensors, create_graph=True)
        seconds.append(torch.autograd.grad(sum((g**2).sum() for g in firsts), tensors))
    for got, wanted in zip(*seconds):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torch(dtype):
    x, hx, *weights = given(3, 2, 4, 5, 1, True, True, dtype)
    for ours, plain in zip(call(x, hx, weights, True, True), reference(x, hx, weights, True, True)):
        assert torch.equal(ours, plain)


def test_no_rows_and_errors_are_torchs():
    x, hx, *weights = given(3, 2, 4, 5, 1, True, True)
    assert call(x[:0], hx[:, :0], weights, True, True)[0].shape == (0, 2, 5)
    with pytest.raises(RuntimeError):
        call(x[:, :, :3], hx, weights, True, True)
    with pytest.raises(RuntimeError):
        call(x, hx[:, :2], weights, True, True)


def test_as_an_op():
    x, hx, *weights = given(3, 2, 4, 5, 1, True, True)
    torch.library.opcheck(OP, (x.requires_grad_(), hx, weights, True, True), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda t: OP(t, hx, weights, True, True)[0] * 2, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), reference(x, hx, weights, True, True)[0] * 2)
    assert op.DIRECT[OP] is call
