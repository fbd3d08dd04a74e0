"""The bfloat16 products (``kernels/dense/bf16.py``) against float64 of the same rounded operands, and the fused MLP on them."""
from __future__ import annotations

import pytest
import torch
from dense_layouts import LAYOUTS
from tablewright.kernels.dense import bf16, gemm
from tablewright.kernels.mlp import op as mlp
from tablewright.kernels.mlp.layers import Layer, encode, pack, unpack
from torch.nn import functional as F

LOW = torch.bfloat16
pytestmark = pytest.mark.skipif(not bf16._ready, reason=f"NOT TESTED: {bf16.describe()}")

# A tile has 12 rows and 32 columns, pairs of the depth lie together and 16 pairs are packed at once; float32 results take 2048 of the depth at a time.
SIZES = [(1, 1, 1), (1, 32, 2), (11, 33, 15), (12, 47, 31), (13, 48, 33), (25, 64, 100), (205, 65, 1030), (400, 100, 13)]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def exactly(a, b, bias=None, relu=False):
    out = a.to(LOW).double() @ b.to(LOW).double() + (0 if bias is None else bias.double())
    return out.relu() if relu else out


def assert_close(ours, plain, depth):
    """Sums in float32, then one rounding where the result is bfloat16 (2**-9 of it)."""
    assert ours.is_contiguous()
    torch.testing.assert_close(ours.double(), plain, rtol=2**-8 if ours.dtype == LOW else 1e-5, atol=3e-6 * (depth**0.5 + 4))


@pytest.mark.parametrize("sizes", SIZES)
def test_products_of_any_size(sizes, threads):
    torch.manual_seed(0)
    rows, cols, depth = sizes
    for left, right in (("rows", "rows"), ("rows", "columns"), ("columns", "rows"), ("columns", "columns")):
        a, b, bias = LAYOUTS[left](rows, depth), LAYOUTS[right](depth, cols), torch.randn(cols)
        for x, y in ((a.to(LOW), b), (a, b.to(LOW)), (a.to(LOW), b.to(LOW))):
            for dtype in (LOW, torch.float32):
                assert_close(bf16.product(x, y, dtype=dtype), exactly(a, b), depth)
            assert_close(bf16.product(x, y, bias, relu=True), exactly(a, b, bias, relu=True), depth)


@pytest.mark.parametrize("dtype", [LOW, torch.float32])
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_products_of_any_layout(left, right, dtype):
    torch.manual_seed(0)
    a, b = LAYOUTS[left](27, 71).to(LOW), LAYOUTS[right](71, 75)
    assert_close(bf16.product(a, b, torch.randn(150)[::2] * 0, dtype=dtype), exactly(a, b), 71)


def test_long_sums_in_parts(threads):
    """More than one part of the depth, which is odd: what a weight's gradient is."""
    torch.manual_seed(0)
    grad, x = torch.randn(4999, 37).to(LOW), torch.randn(4999, 40).to(LOW)
    assert_close(bf16.product(grad.t(), x, dtype=torch.float32), exactly(grad.t(), x), 4999)


def test_the_same_bits_on_any_number_of_threads():
    torch.manual_seed(0)
    a, b, before = torch.randn(300, 200).to(LOW), torch.randn(200, 90), torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(bf16.product(a, b, dtype=torch.float32))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_rounding_and_nothing_outside_the_operands_counts():
    """Float32 operands round to nearest even; NaN beside an operand, and in rows and columns of it, stays where it belongs."""
    wide = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, -3.14159, 1e30, float("inf"), float("-inf")]])
    assert torch.equal(bf16.product(torch.ones(1, 1, dtype=LOW), wide)[0], wide[0].to(LOW))
    a, b = torch.full((30, 40), float("nan")), torch.full((40, 60), float("nan"))
    a[2:15, 3:20], b[4:21, 5:50] = torch.randn(13, 17), torch.randn(17, 45)
    x, weight = a[2:15, 3:20], b[4:21, 5:50]
    assert_close(bf16.product(x.to(LOW), weight), exactly(x, weight), 17)
    assert_close(bf16.product(a.to(LOW)[2:15, 3:20], weight.t().contiguous().t()), exactly(x, weight), 17)
    x, weight = torch.randn(20, 17).to(LOW), torch.randn(17, 45)
    x[3, 4], weight[2, 40] = float("nan"), float("inf")
    out, bits = bf16.relu_product(x, weight, None)
    assert out[3].isnan().all() and not out[:3, :40].isnan().any() and not out[4:, 41:].isnan().any()
    assert torch.equal(bits, pack(~(out <= 0))), "NaN passes"


@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 33, 64), (130, 95, 40), (300, 64, 9)])
def test_what_products_do_at_their_end(shape, threads):
    torch.manual_seed(0)
    rows, cols, depth = shape
    a, b, bias = torch.randn(rows, depth).to(LOW), torch.randn(depth, cols), torch.randn(cols)
    out, bits = bf16.relu_product(a, b, bias)
    assert torch.equal(out, bf16.product(a, b, bias, relu=True)) and torch.equal(bits, pack(out > 0))
    kept = torch.rand(rows, cols) < 0.6
    made, sums = bf16.masked_product(a, b, pack(kept), 1.25)
    plain = exactly(a, b) * 1.25 * kept
    assert_close(made, plain, depth)
    torch.testing.assert_close(sums.double(), plain.sum(0), rtol=1e-5, atol=2e-6 * (rows * depth) ** 0.5 + 1e-5)


def test_a_layer_of_no_columns_has_no_product():
    assert gemm.masked_input_gradient(torch.zeros(2048, 0, dtype=LOW), torch.zeros(0, 64), torch.zeros(2048, 2, dtype=torch.int32), 1.0) is None


def test_refusals():
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied: \[2, 3\] x \[4, 40\]"):
        bf16.product(torch.ones(2, 3, dtype=LOW), torch.ones(4, 40))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bf16.product(torch.ones(2, 3, dtype=LOW), torch.ones(3, 40), torch.ones(39))


@pytest.mark.parametrize("here", [True, False])
def test_products_of_linear_layers(here, monkeypatch):
    """The library's where it is; without it (another processor) PyTorch's: the same numbers, and float32 gradients of float32 weights."""
    used = []
    run = bf16._product
    monkeypatch.setattr(bf16, "_product", lambda *args: used.append(1) or run(*args))
    monkeypatch.setattr(bf16, "ENABLED", here)
    monkeypatch.setattr(gemm, "LEAST_WORK", 1)
    torch.manual_seed(0)
    x, weight, bias, grad = torch.randn(3, 100, 80).to(LOW), torch.randn(96, 80), torch.randn(96), torch.randn(3, 100, 96).to(LOW)
    low = weight.to(LOW).float()
    of_weight = gemm.weight_gradient(grad, x, dtype=torch.float32)
    assert of_weight.dtype == torch.float32 and gemm.weight_gradient(grad, x).dtype == LOW
    pairs = [
        (gemm.linear(x, weight, bias, relu=True), F.linear(x.float(), low, bias).relu()), (gemm.input_gradient(grad, weight), grad.float() @ low),
        (of_weight, grad.flatten(0, 1).float().t() @ x.flatten(0, 1).float()),
        (gemm.weight_gradient(grad, x[..., :9]), grad.flatten(0, 1).float().t() @ x[..., :9].flatten(0, 1).float()),
    ]
    for ours, plain in pairs:
        torch.testing.assert_close(ours.float(), plain, rtol=0.02, atol=0.05)
    assert len(used) == (5 if here else 0)


SIZES_OF_CHAIN = (70, 512, 96, 1)


def chain(dtype):
    weights = [torch.randn(o, i, dtype=torch.float32) / i**0.5 for i, o in zip(SIZES_OF_CHAIN, SIZES_OF_CHAIN[1:])]
    return [w.to(dtype).requires_grad_() for w in weights], [torch.randn(len(w)).to(dtype).requires_grad_() for w in weights]


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("rows", [0, 1, 150])
def test_a_fused_mlp_of_bfloat16(rows, p, dtype, threads):
    """Values and gradients against float64 with the masks that were drawn; parameters are float32 or bfloat16."""
    torch.manual_seed(0)
    (weights, biases), x = chain(dtype), torch.randn(rows, 70).to(LOW).requires_grad_()
    layers, train = (Layer(True, p), Layer(True, p), Layer(False)), [True] * 3
    outs, masks = mlp.cpu.forward(x, weights, biases, layers, train, None)
    torch.manual_seed(5)
    out = mlp.call(x, weights, biases, encode(layers), train)
    torch.manual_seed(5)
    outs, masks = mlp.cpu.forward(x.detach(), [w.detach() for w in weights], [b.detach() for b in biases], layers, train, None)
    assert torch.equal(out, outs[-1])
    exact = [t.detach().to(LOW).double().requires_grad_() for t in (x, *weights)] + [b.detach().double().requires_grad_() for b in biases]
    y = exact[0]
    for i in range(3):
        y = F.linear(y, exact[1 + i], exact[4 + i])
        if i < 2:
            y = y * unpack(masks[i], y.shape[1]) / (1 - p)
    seed = torch.randn(rows, 1).to(LOW)
    ours = [out, *torch.autograd.grad(out, [x, *weights, *biases], seed)]
    plain = [y, *torch.autograd.grad(y, exact, seed.double())]
    assert [t.dtype for t in ours[2:]] == [dtype] * 6
    for a, b in zip(ours, plain):
        scale = b.abs().max().item() if b.numel() else 0
        torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.012 * scale)


def test_derivatives_of_derivatives_and_dispatch():
    torch.manual_seed(0)
    (weights, biases), x = chain(torch.float32), torch.randn(150, 70).to(LOW).requires_grad_()
    text = encode((Layer(True), Layer(True), Layer(False)))
    (grad,) = torch.autograd.grad(mlp.call(x, weights, biases, text, [True] * 3).float().sum(), weights[0], create_graph=True)
    assert torch.autograd.grad((grad**2).sum(), weights[1])[0].isfinite().all()
    torch.library.opcheck(mlp.OP, (x[:20], weights, biases, text, [False] * 3), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match=r"holds torch.float64 and its input is torch.bfloat16"):
        mlp.call(x, [w.double() for w in weights], biases, text, [True] * 3)
