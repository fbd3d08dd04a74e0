"""``tablewright::cast_all`` is ``Tensor.to`` for each tensor, gradients included."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.dense.casts import OP, call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [call, OP], ids=["call", "op"])
def test_values_and_gradients(run, dtype):
    shapes = [(3, 4), (4,), (0, 2), ()]
    ours = [torch.randn(s, requires_grad=True) for s in shapes]
    ours[0] = ours[0].detach().t().requires_grad_()
    plain = [t.detach().clone().requires_grad_() for t in ours]
    made, expected = run(ours, dtype), [t.to(dtype) for t in plain]
    assert all(a.dtype == dtype and torch.equal(a, b) for a, b in zip(made, expected))
    for out in (made, expected):
        (out[0].sum() * 3 + (out[1] ** 2).sum()).backward()
    for a, b in zip(ours, plain):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert a.grad.dtype == torch.float32 and torch.equal(a.grad, b.grad)


def test_frozen_tensors_and_no_grad():
    weights = [torch.ones(2, requires_grad=True), torch.ones(2)]
    with torch.no_grad():
        assert not call(weights, torch.bfloat16)[0].requires_grad
    call(weights, torch.bfloat16)[0].sum().backward()
    assert weights[0].grad is not None and weights[1].grad is None
    assert call([], torch.bfloat16) == []


def test_infinite_gradients_arrive_infinite():
    """A loss scaler must find them."""
    weight = torch.ones(2, requires_grad=True)
    (out,) = call([weight], torch.float16)
    (out * torch.tensor([60000.0, 1.0], dtype=torch.float16)).sum().mul(2).backward()
    assert weight.grad.tolist() == [float("inf"), 2.0]


def test_second_derivatives():
    leaf = torch.randn(3, requires_grad=True)
    (out,) = call([leaf], torch.bfloat16)
    (grad,) = torch.autograd.grad((out**3).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaf)
    torch.testing.assert_close(second, 6 * leaf.detach(), rtol=2e-2, atol=2e-2)


def test_the_op():
    tensors = [torch.randn(2, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    torch.library.opcheck(OP, (tensors, torch.bfloat16), raise_exception=True)
    compiled = torch.compile(lambda a, b: OP([a, b], torch.bfloat16)[0].float() * 2, backend="aot_eager", fullgraph=True)
    compiled(*tensors).sum().backward()
    assert torch.equal(tensors[0].grad, torch.full((2, 3), 2.0))


def test_bad_input():
    for tensors in ([torch.ones(1), torch.ones(1, dtype=torch.float64)], [torch.ones(1, dtype=torch.bfloat16)]):
        with pytest.raises(ValueError, match="share one other dtype"):
            call(tensors, torch.bfloat16)
