"""``tablewright::tanh`` is ``torch.tanh``: values over all of float32, special values, gradients twice, layouts, threads."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.dense.op import call as dense
from tablewright.kernels.tanh import cpu
from tablewright.kernels.tanh.op import OP, call

needs_library = pytest.mark.skipif(not cpu.available(), reason=f"NOT TESTED: {cpu.describe()}")
ULPS = 3


def ulps(found, x):
    """How far ``found`` is from tanh(``x``), in units of the last place of the exact value."""
    exact = torch.tanh(x.double())
    near = exact.float().abs()
    return (found.double() - exact).abs() / (torch.nextafter(near, torch.tensor(2.0)) - near).double()


@needs_library
def test_all_of_float32():
    every = torch.arange(-(2**31), 2**31 - 1, 9973).to(torch.int32).view(torch.float32)
    x = every[every.isfinite()]
    near_one = torch.linspace(-12, 12, 100_001)
    for values in (x, near_one, near_one * 1e-3):
        assert ulps(cpu.tanh(values), values).max() <= ULPS


@needs_library
def test_special_values():
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-38, 20.0, -88.0, 3e38])
    out = call(x)
    assert torch.equal(out.isnan(), x.isnan()) and torch.equal(out.signbit()[~x.isnan()], x.signbit()[~x.isnan()])
    assert torch.equal(out[[0, 1, 2, 3, 7, 8, 9]], torch.tensor([0.0, 0, 1, -1, 1, -1, 1]))
    assert out[5] == x[5] and out[6] == x[6]


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 15, 17, 16384, 16385, 100_003])
def test_every_value_is_made_once(count, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        x = torch.linspace(-3, 3, count)
        held = x.clone()
        out = call(x)
        assert torch.equal(x, held) and (not count or ulps(out, x).max() <= ULPS)
        assert torch.equal(cpu.tanh_(held), out) and torch.equal(held, out)
    finally:
        torch.set_num_threads(before)


def test_gradients_twice():
    x = torch.linspace(-2, 2, 40).view(5, 8)
    found = []
    for function, values in ((call, x), (torch.tanh, x.double())):
        values = values.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(values).pow(2).sum(), values, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), values)
        found.append((first.detach().double(), second.double()))
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@needs_library
def test_turned_values_are_taken_as_they_lie():
    x = torch.randn(6, 4, 5).permute(2, 0, 1)
    out = call(x)
    assert cpu.serves(x) and out.stride() == x.stride() and ulps(out, x).max() <= ULPS
    held = x.clone(memory_format=torch.preserve_format)
    assert torch.equal(cpu.tanh_(held), out) and torch.equal(held, out)


@pytest.mark.parametrize("x", [torch.randn(8, 6)[:, ::2], torch.randn(5, dtype=torch.float64), torch.randn(5).half(), torch.randn(2, 3).expand(4, 2, 3)], ids=["strided", "float64", "half", "expanded"])
def test_what_it_does_not_serve_is_torchs(x):
    assert not cpu.serves(x) and torch.equal(call(x), torch.tanh(x))


def test_in_place_where_it_does_not_serve():
    whole = torch.randn(8, 6)
    x, rest = whole[:, ::2], whole[:, 1::2].clone()
    wanted = torch.tanh(x)
    assert torch.equal(cpu.tanh_(x), wanted) and torch.equal(whole[:, 1::2], rest)


@needs_library
def test_layers_use_it(monkeypatch):
    made = []
    monkeypatch.setattr(cpu, "_run", lambda x, out, run=cpu._run: made.append(x.shape) or run(x, out))
    x, weight = torch.randn(7, 5), torch.randn(3, 5)
    torch.testing.assert_close(dense(x, weight, None, "tanh"), torch.tanh(x @ weight.t()), rtol=1e-5, atol=1e-6)
    assert made == [(7, 3)]


def test_the_op_itself():
    x = torch.randn(3, 4)
    for function in (OP, torch.compile(OP, backend="eager", fullgraph=True)):
        torch.testing.assert_close(function(x), torch.tanh(x), rtol=1e-6, atol=1e-7)


@needs_library
def test_without_the_library(monkeypatch):
    monkeypatch.setattr(cpu, "_lib", None)
    x = torch.randn(4, 4)
    assert torch.equal(call(x), torch.tanh(x)) and torch.equal(cpu.tanh_(x.clone()), torch.tanh(x))
