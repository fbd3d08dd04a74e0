"""``tablewright::later``: the same gradients as without it, made in another order."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.dense import gemm, later
from tablewright.kernels.dense import op as dense


def chain(weights, bias, x, through):
    first, second = (through(w) for w in weights)
    return dense.call(dense.call(x, first, bias, "relu"), second, None, "none").pow(2).sum()


def given():
    torch.manual_seed(0)
    x = torch.randn(20, 10, dtype=torch.float64, requires_grad=True)
    weights = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((30, 10), (4, 30))]
    return x, weights, torch.nn.Parameter(torch.randn(30, dtype=torch.float64))


@pytest.mark.parametrize("through", [later.call, later.OP])
def test_same_gradients(through):
    x, weights, bias = given()
    wanted = [x, *weights, bias]
    plain = torch.autograd.grad(chain(weights, bias, x, lambda w: w), wanted)
    ours = torch.autograd.grad(chain(weights, bias, x, through), wanted)
    assert all(map(torch.equal, ours, plain))
    chain(weights, bias, x, through).backward()
    chain(weights, bias, x, through).backward()  # accumulates
    torch.testing.assert_close(weights[0].grad, 2 * plain[1])
    (alone,) = torch.autograd.grad(chain(weights, bias, x, through), weights[1:])
    assert torch.equal(alone, plain[2])


def test_the_weights_gradients_come_last(monkeypatch):
    x, weights, bias = given()
    made = []
    for name in ("input_gradient", "weight_gradient"):
        function = getattr(gemm, name)
        monkeypatch.setattr(gemm, name, lambda *args, f=function, n=name: made.append(n) or f(*args))
    chain(weights, bias, x, lambda w: w).backward()
    assert made == ["input_gradient", "weight_gradient"] * 2
    made.clear()
    chain(weights, bias, x, later.call).backward()
    assert made == ["input_gradient"] * 2 + ["weight_gradient"] * 2


def test_second_derivatives_and_frozen_weights():
    x, weights, bias = given()
    assert torch.autograd.gradgradcheck(lambda w: dense.call(x, later.call(w), bias, "tanh"), weights[0].detach().requires_grad_())
    frozen = weights[0].detach()
    assert later.call(frozen) is frozen
    with torch.no_grad():
        assert later.call(weights[0]) is weights[0]


def test_anomaly_detection_finds_nothing():
    x, weights, bias = given()
    plain = torch.autograd.grad(chain(weights, bias, x, lambda w: w), weights)
    with torch.autograd.detect_anomaly():
        ours = torch.autograd.grad(chain(weights, bias, x, later.call), weights)
    assert all(map(torch.equal, ours, plain))


def test_other_readers_of_the_weight():
    """A gradient that comes from elsewhere passes; one that was mixed with a stand-in is refused, not lost."""
    x, weights, bias = given()
    weight = later.call(weights[0])
    torch.testing.assert_close(torch.autograd.grad((weight * 3).sum(), weights[0])[0], torch.full_like(weight, 3))
    weight = later.call(weights[0])
    with pytest.raises(RuntimeError, match="was changed on its way"):
        (dense.call(x, weight, bias, "relu").sum() + weight.sum()).backward()
