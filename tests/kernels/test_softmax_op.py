"""``tablewright::softmax_rows`` is ``torch.softmax``: values, gradients, second derivatives, special values, every door."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.softmax.op import OP, call


def grads(function, x, dim):
    x = x.detach().requires_grad_()
    out = function(x, dim)
    (grad,) = torch.autograd.grad(out, x, torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape))
    return out.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((64, 10), -1), ((5, 3, 7), 2), ((6, 28, 1), 1), ((6, 28, 1), -2), ((4, 9, 1, 1), 1), ((3, 4, 5), 1), ((8,), 0), ((1, 1), 1),
     ((0, 5), -1), ((5, 0), -1)],
)  # fmt: skip
def test_equal(shape, dim, dtype):
    torch.manual_seed(0)
    x = 8 * torch.randn(shape, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for ours, plain in zip(grads(call, x, dim), grads(torch.softmax, x, dim)):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, atol=tolerance, rtol=tolerance)


def test_nearly_equal_gradients_keep_their_differences():
    """What is left of a row's gradients is exact to their differences, not to their size (a weight before it sees nothing else)."""
    torch.manual_seed(0)
    seed = 1 + 1e-5 * torch.randn(64, 10)
    x = torch.zeros(64, 10, requires_grad=True)
    (got,) = torch.autograd.grad(call(x, -1), x, seed)
    wanted = 0.1 * (seed - seed[:, :1]).double()
    assert (got - got[:, :1] - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_special_values():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1.0, -inf, 3.0], [inf, 1.0, 2.0], [nan, 1.0, 2.0], [-inf, -inf, -inf], [1e30, -1e30, 1e30], [-1e9, -1e9, 0.0]])
    torch.testing.assert_close(call(x, -1), torch.softmax(x, -1), equal_nan=True, atol=1e-7, rtol=0)


def test_transposed_rows():
    x = torch.randn(10, 64, dtype=torch.float64).t()
    for ours, plain in zip(grads(call, x, 1), grads(torch.softmax, x, 1)):
        torch.testing.assert_close(ours, plain)


def test_differentiated_twice():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: call(t, -1), (x,))
    assert torch.autograd.gradgradcheck(lambda t: call(t, -1), (x,))
    column = torch.randn(3, 5, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: call(t, 1), (column,))


def test_the_same_under_rounded_products():
    """The sum must not follow a setting that rounds matrix products to bfloat16."""
    x = torch.randn(64, 10)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(call(x, -1), torch.softmax(x, -1), atol=1e-6, rtol=1e-6)
    finally:
        torch.set_float32_matmul_precision(before)


def test_other_dtypes_are_torch():
    x = torch.randn(8, 5, dtype=torch.bfloat16)
    assert torch.equal(call(x, -1), torch.softmax(x, -1))
    with torch.autocast("cpu"):
        assert torch.equal(call(x.float(), -1), torch.softmax(x.float(), -1))


def test_as_an_op():
    x = torch.randn(4, 5, requires_grad=True)
    torch.library.opcheck(OP, (x, -1))
    fake = torch.compile(lambda t: OP(t, 1) * 2, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(fake(x), torch.softmax(x, 1) * 2)


def test_errors_are_torchs():
    with pytest.raises(IndexError, match="out of range"):
        call(torch.randn(3, 4), 2)
