"""The Triton kernels of the fused multilayer perceptron beside ``reference.py``. Run by ``test_mlp_triton.py``, in a process of its own.

With ``TRITON_INTERPRET=1`` on CPU tensors, otherwise on the GPU. In the interpreter float32 -> bfloat16 truncates instead of
rounding, so bfloat16 is compared to twice the usual tolerance.
"""
from __future__ import annotations

import os

import pytest
import torch
from tablewright.kernels.mlp import cpu, gpu, reference
from tablewright.kernels.mlp.layers import Layer, unpack, words

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SEED = 12345


def close(made, want):
    assert made.shape == want.shape
    tolerance = TOLERANCE[made.dtype]
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(made.double().cpu(), want.double().cpu(), rtol=tolerance, atol=tolerance * scale)


def seed(number=SEED):
    return torch.tensor([number], device=DEVICE)


def parameters(sizes, dtype, biased):
    torch.manual_seed(sum(sizes))
    weights = [(torch.randn(o, i, device=DEVICE) / i**0.5).to(dtype) for i, o in zip(sizes, sizes[1:])]
    return weights, [torch.randn(o, device=DEVICE).to(dtype) if biased else None for o in sizes[1:]]


def keeps_of(layers, sizes, rows, train):
    """What the GPU form draws for each layer, by the public function of the seed and the layer's number."""
    given = enumerate(zip(layers, sizes[1:], train))
    return [unpack(gpu.keep_bits(seed(), i, rows, out, layer.p), out) if layer.p and drops else None for i, (layer, out, drops) in given]


def in_float64(x, weights, biases, layers, keeps):
    """The result of plain ops with the masks injected, in float64."""
    y = x.double()
    for layer, weight, bias, keep in zip(layers, weights, biases, keeps):
        y = torch.nn.functional.linear(y, weight.double(), None if bias is None else bias.double())
        y = y.relu() if layer.relu else y
        y = y if keep is None else y * keep / (1 - layer.p)
    return y


@pytest.mark.parametrize("form", ["blas", "square", "wide"])
@pytest.mark.parametrize(("dtype", "rows", "sizes"), [
    (torch.float16, 150, (40, 160, 96, 33)), (torch.bfloat16, 70, (64, 64, 48, 8)), (torch.float32, 20, (9, 70, 32, 5)), (torch.float16, 1, (7, 5, 3, 2)),
], ids=str)  # fmt: skip
def test_forward_and_backward(dtype, rows, sizes, form):
    layers = (Layer(True, 0.25, form), Layer(True, 0.0, form), Layer(sizes[3] % 2 == 1, 0.5, form))
    biased = form != "wide"
    weights, biases = parameters(sizes, dtype, biased)
    x = torch.randn(rows, sizes[0], device=DEVICE).to(dtype)
    for train in ([True] * 3, [False] * 3, [False, True, True]):
        keeps = keeps_of(layers, sizes, rows, train)
        want = in_float64(x, weights, biases, layers, keeps)
        outs, masks = gpu.forward(x, weights, biases, layers, train, seed() if any(train) else None)
        close(outs[-1], want)
        for y, mask in zip(outs[:2], masks):  # which gradients pass is what the rounded results say
            assert mask.shape == (rows, words(y.shape[1])) and torch.equal(unpack(mask, y.shape[1]), y > 0)
        grad = torch.randn(rows, sizes[-1], device=DEVICE).to(dtype)
        dx, made = gpu.backward(grad, x, weights, outs[:-1], masks, layers, train, True, [(True, biased)] * 3)
        # A value next to 0 may round to either side of it, so the gradients are those of the masks at hand.
        leaves = {id(t): t.double().requires_grad_() for t in (x, *weights, *biases) if t is not None}
        given = leaves[id(x)], [leaves[id(w)] for w in weights], [None if b is None else leaves[id(b)] for b in biases]
        torch.autograd.backward(reference.masked_again(*given, layers, train, masks), grad.double())
        close(dx, leaves[id(x)].grad)
        for weight, bias, (dw, db) in zip(weights, biases, made):
            close(dw, leaves[id(weight)].grad)
            assert (db is None) == (bias is None)
            if bias is not None:
                close(db, leaves[id(bias)].grad)
        # The two forms of the masks and the plain backward say the same of the same masks.
        other, _ = cpu.backward(grad.cpu(), x.cpu(), [w.cpu() for w in weights], [o.cpu() for o in outs[:-1]], [m.cpu() for m in masks], layers, train, True, [(False, False)] * 3)  # fmt: skip
        close(dx, other.to(DEVICE))


def test_what_is_not_wanted_is_not_made():
    layers = (Layer(True), Layer(False))
    weights, biases = parameters((8, 8, 8), torch.float16, True)
    x = torch.randn(4, 8, device=DEVICE).half()
    outs, masks = gpu.forward(x, weights, biases, layers, [True] * len(layers), None)
    dx, made = gpu.backward(x, x, weights, outs[:-1], masks, layers, [True] * len(layers), False, [(False, False), (False, True)])
    assert dx is None and made[0] == (None, None) and made[1][0] is None and made[1][1] is not None


@pytest.mark.parametrize("form", ["blas", "square"])
def test_zeros_and_nan(form):
    """The gradient at exactly 0 is 0; NaN goes through, and so does its gradient."""
    dtype = torch.float16
    z = torch.tensor([0.0, -0.0, float("nan"), 1.0, -1.0, 6e-8], device=DEVICE).to(dtype)
    bias, weight = z.repeat(6)[:36], torch.zeros(36, 4, device=DEVICE, dtype=dtype)
    x = torch.ones(3, 4, device=DEVICE, dtype=dtype)
    outs, masks = gpu.forward(x, [weight], [bias], (Layer(True, 0.0, form),), [True], None)
    want = torch.nn.functional.linear(x, weight, bias).relu()
    assert torch.equal(outs[0].nan_to_num(7.0), want.nan_to_num(7.0))
    assert unpack(masks[0], 36)[0].tolist() == ([False, False, True, True, False, True] * 6)


def test_draws_follow_the_seed_and_the_layer_and_nothing_else():
    rows, cols, p = 64, 100, 0.3
    first = gpu.keep_bits(seed(), 0, rows, cols, p)
    assert torch.equal(first, gpu.keep_bits(seed(), 0, rows, cols, p))
    assert torch.equal(first[:10], gpu.keep_bits(seed(), 0, 10, cols, p))
    kept = unpack(first, cols).double()
    others = [gpu.keep_bits(seed(), 1, rows, cols, p), gpu.keep_bits(seed(SEED + 1), 0, rows, cols, p)]
    for other in others:  # independent: the overlap of two masks is the product of their rates
        assert abs(float((kept * unpack(other, cols).double()).mean()) - (1 - p) ** 2) < 0.03
    assert abs(float(kept.mean()) - (1 - p)) < 0.025
    assert float((kept.mean(0) - (1 - p)).abs().max()) < 0.25 and float((kept.mean(1) - (1 - p)).abs().max()) < 0.2


def test_bits_are_philox_words():
    """Philox4x32-10 (Salmon et al. 2011) in Python: counter (4 * word + part, layer, 0, 0), key the halves of the seed."""

    def philox(counter, key):
        c, k = list(counter), list(key)
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    p, number = 0.4, (5 << 32) + 77
    bits = gpu.keep_bits(seed(number), 2, 3, 64, p).flatten().tolist()
    for word, made in enumerate(bits):
        lanes = [half for part in range(4) for r in philox((4 * word + part, 2, 0, 0), (77, 5)) for half in (r & 0xFFFF, r >> 16)]
        want = sum((lane >= round(p * 65536)) << j for j, lane in enumerate(lanes))
        assert made % 2**32 == want


def test_no_rows():
    layers = (Layer(True, 0.5, "square"), Layer(False))
    weights, biases = parameters((4, 5, 6), torch.float16, True)
    x = torch.empty(0, 4, device=DEVICE, dtype=torch.float16)
    outs, masks = gpu.forward(x, weights, biases, layers, [True] * len(layers), seed())
    dx, made = gpu.backward(outs[-1], x, weights, outs[:-1], masks, layers, [True] * len(layers), True, [(True, True)] * 2)
    assert outs[-1].shape == (0, 6) and dx.shape == (0, 4) and all(not g.any() for pair in made for g in pair)


def test_float64_goes_through_plain_ops():
    layers = (Layer(True, 0.5, "square"), Layer(False))
    weights, biases = parameters((4, 5, 6), torch.float64, True)
    x = torch.randn(7, 4, device=DEVICE, dtype=torch.float64)
    outs, masks = gpu.forward(x, weights, biases, layers, [True] * len(layers), seed())
    keep = unpack(gpu.keep_bits(seed(), 0, 7, 5, 0.5), 5)
    made, bits = reference.finish(torch.nn.functional.linear(x, weights[0], biases[0]), layers[0], keep)
    torch.testing.assert_close(outs[0], made)
    assert torch.equal(masks[0], bits)
    dx, _ = gpu.backward(torch.ones(7, 6, device=DEVICE).double(), x, weights, outs[:-1], masks, layers, [True] * len(layers), True, [(True, True)] * 2)
    torch.testing.assert_close(dx, reference.masked(torch.ones(7, 6, device=DEVICE).double() @ weights[1], bits, 0.5) @ weights[0])
