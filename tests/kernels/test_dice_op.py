"""``tablewright::dice`` beside the plain formula."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.dice.op import OP, call, reference


def given(shape, alpha, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in (shape, shape, alpha)]


def results(function, tensors):
    out = function(*tensors)
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, tensors, seed)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "alpha"), [((6, 5), (5,)), ((6, 5), (1,)), ((4, 3, 5), (3, 1)), ((0, 5), (5,)), ((1, 1), ())])
def test_equal(shape, alpha, dtype):
    tensors = given(shape, alpha, dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for ours, plain in zip(results(call, tensors), results(reference, tensors), strict=True):
        assert ours.shape == plain.shape and ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, atol=tolerance, rtol=tolerance)


def test_differentiated_twice_and_partly_frozen():
    tensors = given((3, 4), (4,))
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)
    x, gate, alpha = tensors
    for frozen in ((x.detach(), gate, alpha), (x, gate.detach(), alpha), (x, gate, alpha.detach())):
        leaves = [t for t in frozen if t.requires_grad]
        ours, plain = (torch.autograd.grad(f(*frozen).sum(), leaves) for f in (call, reference))
        torch.testing.assert_close(ours, plain)


def test_special_values_mixed_dtypes_and_compilation():
    inf, nan = float("inf"), float("nan")
    x, gate = torch.tensor([inf, 1.0, nan, 2.0, -3.0]), torch.tensor([1.0, inf, 0.0, -inf, nan])
    alpha = torch.tensor(0.25)
    torch.testing.assert_close(call(x, gate, alpha), reference(x, gate, alpha), equal_nan=True)
    assert call(x, gate, alpha.double()).dtype == reference(x, gate, alpha.double()).dtype
    compiled = torch.compile(lambda *t: OP(*t) + 1, backend="eager", fullgraph=True)
    tensors = [t.detach() for t in given((3, 4), (4,))]
    torch.testing.assert_close(compiled(*tensors), reference(*tensors) + 1)
