"""``tablewright::row_layers`` is a chain of linear layers and activations: values, gradients, second derivatives, blocks of any size."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.row_layers import op
from tablewright.kernels.row_layers.op import ACTIVATIONS, OP, call, reference


def given(shape, widths, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    sizes = [shape[-1], *widths]
    weights = [torch.randn(o, i, dtype=dtype, requires_grad=True) for i, o in zip(sizes, widths)]
    biases = [torch.randn(o, dtype=dtype, requires_grad=True) if bias else None for o in widths]
    return torch.randn(shape, dtype=dtype, requires_grad=True), weights, biases


def grads(function, x, weights, biases, names):
    asked = [t for t in (x, *weights, *biases) if t is not None]
    out = function(x, weights, biases, names)
    return [out, *torch.autograd.grad(out, asked, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "bias"), [((300, 3, 5), True), ((1, 1, 5), True), ((700, 5), False), ((5,), True), ((0, 3, 5), True)])
def test_equal(monkeypatch, name, shape, bias):
    monkeypatch.setattr(op, "BLOCK", 0)  # 256 rows in a block
    args = *given(shape, (8, 4, 2), bias=bias), f"{name},none,{name}"
    for ours, plain in zip(grads(call, *args), grads(reference, *args)):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [3, 3000])
def test_float32_is_as_near_to_the_truth_as_plain(rows):
    """Over several blocks, where the native products work."""
    x, weights, biases = given((rows, 2, 16), (256, 16), torch.float32)
    args = x, weights, biases, "gelu,none"
    true = grads(reference, x.double(), *([t.double() for t in ts] for ts in (weights, biases)), "gelu,none")
    for ours, plain, exact in zip(grads(call, *args), grads(reference, *args), true):
        scale = exact.abs().max()
        assert (ours - exact).abs().max() <= 3 * (plain - exact).abs().max() + 1e-5 * scale, ((ours - exact).abs().max() / scale, (plain - exact).abs().max() / scale)


def test_only_what_is_wanted():
    x, weights, biases = given((4, 3, 5), (8, 2))
    call(x.detach(), [weights[0].detach(), weights[1]], [None, biases[1]], "tanh,none").sum().backward()
    assert x.grad is None and weights[0].grad is None and weights[1].grad is not None and biases[1].grad is not None
    with torch.no_grad():
        assert not call(x, weights, biases, "relu,none").requires_grad


def test_the_result_may_be_written_to():
    x, weights, biases = given((4, 3, 5), (8, 2))
    got = torch.autograd.grad(call(x, weights, biases, "gelu,none").mul_(3).sum(), x)[0]
    torch.testing.assert_close(got, 3 * torch.autograd.grad(reference(x, weights, biases, "gelu,none").sum(), x)[0])


def test_a_weight_that_changes_before_the_backward_is_an_error():
    x, weights, biases = given((4, 3, 5), (8, 2))
    out = call(x, weights, biases, "gelu,none")
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_differentiated_twice():
    x, weights, biases = given((2, 2, 3), (4, 2))
    assert torch.autograd.gradgradcheck(lambda *t: call(t[0], t[1:3], t[3:], "gelu,sigmoid"), (x, *weights, *biases))


def test_nan_stays_nan():
    x, weights, biases = given((2, 2, 3), (4, 2))
    with torch.no_grad():
        x[0, 0, 0] = float("nan")
    assert call(x, weights, biases, "relu,none")[0, 0].isnan().all() and not call(x, weights, biases, "relu,none")[1].isnan().any()


def test_bfloat16_and_autocast():
    x, weights, biases = given((4, 3, 5), (8, 2), torch.bfloat16)
    torch.testing.assert_close(call(x, weights, biases, "gelu,none"), reference(x, weights, biases, "gelu,none"), rtol=0.05, atol=0.2)
    x, weights, biases = given((4, 3, 5), (8, 2), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x, weights, biases, "gelu,none").dtype == torch.bfloat16


def test_what_is_wrong_is_said():
    x, weights, biases = given((4, 3, 5), (8, 2))
    for names in ("gelu", "gelu,swish", "gelu,none,none"):
        with pytest.raises(ValueError, match="must name one of"):
            call(x, weights, biases, names)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        call(x[..., :3], weights, biases, "gelu,none")


def test_as_an_op():
    x, weights, biases = given((4, 3, 5), (8, 2))
    torch.library.opcheck(OP, (x, weights, biases, "gelu,none"), test_utils=("test_schema", "test_faketensor"))
