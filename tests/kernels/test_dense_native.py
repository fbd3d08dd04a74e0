"""The native products (``kernels/dense/native.py``) against float64: tails of every blocking, layouts, NaN."""
from __future__ import annotations

import pytest
import torch
from dense_layouts import LAYOUTS
from tablewright.kernels.dense import gemm, native

pytestmark = pytest.mark.skipif(not native._ready, reason=f"NOT TESTED: {native.describe()}")

# A tile has 12 rows and 32 columns, a block 48 rows, a part of the depth at most 1024.
SIZES = [(1, 32, 1), (11, 33, 15), (12, 47, 16), (13, 48, 17), (25, 64, 100), (191, 65, 511), (193, 40, 513), (205, 32, 1030), (400, 1000, 13)]


def assert_product(a, b, bias=None, relu=False):
    plain = a.double() @ b.double() + (0 if bias is None else bias.double())
    plain = plain.relu() if relu else plain
    ours = native.product(a, b, bias, relu)
    assert ours.is_contiguous() and ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=2e-6 * (a.shape[1] ** 0.5 + 4))


@pytest.mark.parametrize("sizes", SIZES)
def test_products_of_any_size(sizes):
    torch.manual_seed(0)
    rows, cols, depth = sizes
    for left in ("rows", "columns"):
        for right in ("rows", "columns"):
            a, b = LAYOUTS[left](rows, depth), LAYOUTS[right](depth, cols)
            assert_product(a, b)
            assert_product(a, b, torch.randn(cols), relu=True)


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_products_of_any_layout(left, right):
    torch.manual_seed(0)
    assert_product(LAYOUTS[left](27, 70), LAYOUTS[right](70, 75), torch.randn(150)[::2])


def test_nothing_outside_the_operands_counts():
    """NaN beside an operand, and in rows and columns of it, stays where it belongs."""
    a, b = torch.full((30, 40), float("nan")), torch.full((40, 60), float("nan"))
    a[2:15, 3:20], b[4:21, 5:50] = torch.randn(13, 17), torch.randn(17, 45)
    assert_product(a[2:15, 3:20], b[4:21, 5:50])
    x, weight = torch.randn(20, 17), torch.randn(17, 45)
    x[3, 4], weight[2, 40] = float("nan"), float("inf")
    out = native.product(x, weight, relu=True)
    assert out[3].isnan().all() and not out[:3, :40].isnan().any() and not out[4:, 41:].isnan().any()


def test_refusals():
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied: \[2, 3\] x \[4, 40\]"):
        native.product(torch.ones(2, 3), torch.ones(4, 40))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        native.product(torch.ones(2, 3), torch.ones(3, 40), torch.ones(39))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (63, 15), (64, 64), (130, 81)])
def test_gradient_of_relu(shape, layout):
    torch.manual_seed(0)
    grad, out = LAYOUTS[layout](*shape), torch.randn(shape).relu_()
    out[-1, 0], out[0, -1] = float("nan"), -0.0
    made, sums = native.masked(grad, out)
    plain = torch.ops.aten.threshold_backward(grad, out, 0)
    torch.testing.assert_close(made, plain, rtol=0, atol=0)
    torch.testing.assert_close(sums.double(), plain.double().sum(0), rtol=1e-5, atol=1e-5)
    assert made.is_contiguous()


def test_long_sums_lose_little():
    grad = torch.full((100_000, 3), 0.1)
    _, sums = native.masked(grad, torch.ones_like(grad))
    torch.testing.assert_close(sums.double(), grad.double().sum(0), rtol=2e-5, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_products_of_linear_layers(threads, monkeypatch):
    """One thread: the native library; several: oneDNN. The same numbers."""
    used = []
    product = native.product
    monkeypatch.setattr(native, "product", lambda *args, **more: used.append(1) or product(*args, **more))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        x, weight, bias, grad = torch.randn(3, 100, 80), torch.randn(96, 80), torch.randn(96), torch.randn(3, 100, 96)
        pairs = [
            (gemm.linear(x, weight, bias, relu=True), torch.nn.functional.linear(x, weight, bias).relu()),
            (gemm.input_gradient(grad, weight), grad @ weight),
            (gemm.weight_gradient(grad, x), grad.flatten(0, 1).t() @ x.flatten(0, 1)),
        ]
        for ours, plain in pairs:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
        assert len(used) == (3 if threads == 1 else 0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", SIZES)
def test_masked_products_of_any_size(sizes):
    torch.manual_seed(0)
    rows, cols, depth = sizes
    kept = torch.randn(rows, cols + 5)[:, :cols].relu()
    kept[0, 0] = float("nan")  # passes, as in torch
    for left in ("rows", "columns"):
        a, b = LAYOUTS[left](rows, depth), LAYOUTS["rows"](depth, cols)
        made, sums = native.masked_product(a, b, kept)
        plain = torch.ops.aten.threshold_backward(a.double() @ b.double(), kept.double(), 0)
        torch.testing.assert_close(made.double(), plain, rtol=1e-5, atol=2e-6 * (depth**0.5 + 4))
        torch.testing.assert_close(sums.double(), plain.sum(0), rtol=1e-5, atol=2e-5 * (depth * rows) ** 0.5 + 1e-5)
    with pytest.raises(RuntimeError, match="the mask is"):
        native.masked_product(a, b, kept.t())
