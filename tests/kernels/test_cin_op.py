"""``tablewright::cin_layer``: values and gradients of all outer products and a convolution of width 1."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.cin import op
from tablewright.kernels.cin.op import OP, call, reference


def given(batch, rows, others, dim, out, dtype, biased=True):
    torch.manual_seed(batch + rows)
    tensors = [torch.randn(batch, rows, dim), torch.randn(batch, others, dim), torch.randn(out, rows * others)]
    tensors += [torch.randn(out)] if biased else []
    return [t.to(dtype).requires_grad_() for t in tensors] + ([] if biased else [None])


def results(function, tensors):
    out = function(*tensors)
    leaves = [t for t in tensors if t is not None]
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, seed)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(5, 3, 4, 2, 6), (1, 1, 1, 1, 1), (3, 2, 40, 5, 3), (0, 2, 3, 4, 5), (7, 5, 5, 30, 8)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_equal(shape, dtype, biased, monkeypatch):
    monkeypatch.setattr(op, "_CHUNK", 1500)  # several chunks, the last one shorter
    tensors = given(*shape, dtype, biased)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-4
    for ours, plain in zip(results(call, tensors), results(reference, tensors), strict=True):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, atol=tolerance, rtol=tolerance)


def test_the_result_is_contiguous_and_one_input_may_be_both():
    x, _, weight, bias = given(4, 3, 3, 5, 2, torch.float64)
    for ours, plain in zip(results(lambda x, w, b: call(x, x, w, b), [x, weight, bias]), results(lambda x, w, b: reference(x, x, w, b), [x, weight, bias])):
        torch.testing.assert_close(ours, plain)
    assert call(x, x, weight, bias).is_contiguous()


def test_differentiated_twice():
    tensors = given(2, 2, 3, 2, 2, torch.float64)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_other_dtypes_frozen_weights_and_compilation():
    tensors = [t.detach() for t in given(3, 2, 3, 4, 5, torch.float32)]
    half = [t.bfloat16() for t in tensors]
    assert torch.equal(call(*half), reference(*half))
    with torch.autocast("cpu"):
        assert torch.equal(call(*tensors), reference(*tensors))
    x = tensors[0].clone().requires_grad_()
    call(x, *tensors[1:]).sum().backward()
    assert x.grad is not None and tensors[2].grad is None
    compiled = torch.compile(lambda *t: OP(*t) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), reference(*tensors) + 1)
