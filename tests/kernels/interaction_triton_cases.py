"""The Triton interaction kernels beside ``reference.py``. Run by ``test_interaction_triton.py``, in a process of its own.

With ``TRITON_INTERPRET=1`` on CPU tensors, otherwise on the GPU. In the interpreter float32 -> bfloat16 truncates instead of
rounding, so bfloat16 is compared to twice the usual tolerance.
"""
from __future__ import annotations

import os

import pytest
import torch
from tablewright.kernels.interaction import gpu, reference

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(torch.float32, s) for s in ((1, 1, 1), (2, 5, 3), (1, 17, 70), (0, 4, 8))]
SHAPES += [(torch.float16, (2, 5, 16)), (torch.bfloat16, (2, 5, 16))]


def inputs(shape, dtype, strided=False):
    torch.manual_seed(sum(shape))
    batch, features, dim = shape
    x = torch.randn(batch + 1, features + 2, dim + 3, device=DEVICE).to(dtype)[1:, 1 : features + 1, 2 : dim + 2]
    return x if strided else x.contiguous()


def close(made, want):
    assert made.shape == want.shape and made.dtype == want.dtype
    tolerance = TOLERANCE[made.dtype]
    scale = float(want.abs().max()) if want.numel() else 1.0
    torch.testing.assert_close(made, want, rtol=tolerance, atol=tolerance * max(scale, 1.0))


def pair_lists(features):
    yield f"{features} upper+diagonal", True
    yield ",".join(f"{(3 * k) % features}-{(5 * k + 1) % features}" for k in range(4)), False  # some repeat


@pytest.mark.parametrize(("dtype", "shape"), SHAPES, ids=str)
def test_dots_and_products(dtype, shape):
    for pairs, strided in pair_lists(shape[1]):
        x = inputs(shape, dtype, strided)
        for name in ("dots", "products"):
            want = getattr(reference, name)(x, pairs)
            close(getattr(gpu, name)(x, pairs), want)
            grad = torch.randn(want.shape, device=DEVICE).to(dtype)
            close(getattr(gpu, f"{name}_backward")(grad, x, pairs), getattr(reference, f"{name}_backward")(grad, x, pairs))


@pytest.mark.parametrize(("dtype", "shape"), [*SHAPES, (torch.float32, (1, 3, 300))], ids=str)
def test_fm(dtype, shape):
    for strided, reduce in ((False, True), (True, False)):
        x = inputs(shape, dtype, strided)
        want = reference.fm(x, 0.5, reduce)
        close(gpu.fm(x, 0.5, reduce), want)
        grad = torch.randn(want.shape, device=DEVICE).to(dtype)
        close(gpu.fm_backward(grad, x, 0.5, reduce), reference.fm_backward(grad, x, 0.5, reduce))


def test_dots_into_columns_of_a_wider_tensor_with_an_expanded_gradient():
    x = inputs((2, 6, 8), torch.float32)
    out = torch.full((2, 20), 7.0, device=DEVICE)
    gpu.dots(x, "6 lower", out[:, 2:17])
    close(out[:, 2:17], reference.dots(x, "6 lower"))
    assert bool((out[:, :2] == 7).all()) and bool((out[:, 17:] == 7).all())
    first, last = torch.randn(2, 2, device=DEVICE), torch.randn(2, 3, device=DEVICE)
    gpu.dots(x, "6 lower", out[:, 2:17], [(first, out[:, :2]), (last, out[:, 17:])])
    assert torch.equal(out[:, :2], first) and torch.equal(out[:, 17:], last)
    grad = torch.ones(1, 1, device=DEVICE).expand(2, 15)
    close(gpu.dots_backward(grad, x, "6 lower"), reference.dots_backward(grad, x, "6 lower"))
    close(gpu.fm_backward(grad[:, 0], x, 1.0, True), reference.fm_backward(grad[:, 0], x, 1.0, True))


def test_more_features_than_a_square_holds_and_missing_ones():
    x = inputs((1, gpu.MOST_FEATURES + 1, 4), torch.float32)
    close(gpu.dots(x, "0-128,5-3"), reference.dots(x, "0-128,5-3"))
    for name in ("dots", "products"):
        with pytest.raises(IndexError, match="reads feature 6; its input has 4"):
            getattr(gpu, name)(inputs((2, 4, 4), torch.float32), "0-6")
