"""The cross layers' ops against plain PyTorch in float64: values, gradients, edges, the dispatcher's checks."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.cross import matrix, vector


def tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(run, plain, leaves):
    """Equal values and gradients, and the gradient of any one leaf alone is the same too."""
    leaves = [t for t in leaves if t is not None]
    ours, theirs = run(), plain()
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)
    seed = torch.randn_like(ours)
    expected = torch.autograd.grad(theirs, leaves, seed, allow_unused=True)
    for got, want in zip(torch.autograd.grad(ours, leaves, seed), expected):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)
    for leaf, want in zip(leaves, expected):
        (got,) = torch.autograd.grad(run(), leaf, seed)
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (0, 7), (2, 3, 7), (4, 1)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_matrix_layer(shape, biased, shifted):
    torch.manual_seed(0)
    dim = shape[-1]
    bias, shift = tensor(dim) if biased else None, tensor(dim) if shifted else None
    given = (tensor(*shape), tensor(*shape), tensor(dim, dim), bias, shift)
    for run in (matrix.OP, matrix.call):
        assert_same(lambda run=run: run(*given), lambda: matrix.reference(*given), given)


def test_matrix_layer_on_itself():
    """The first layer of a network: x is x0."""
    torch.manual_seed(0)
    x, weight = tensor(4, 5), tensor(5, 5)
    assert_same(lambda: matrix.OP(x, x, weight, None, None), lambda: matrix.reference(x, x, weight, None, None), [x, weight])


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (0, 7), (2, 3, 7), (4, 1)])
@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("biased", ["all", "none", "some"])
@pytest.mark.parametrize("inner", [True, False])
def test_vector_layers(shape, layers, biased, inner):
    torch.manual_seed(0)
    dim, x0 = shape[-1], tensor(*shape)
    weights = [tensor(*[(1, dim), (dim,), (dim, 1)][n % 3]) for n in range(layers)]
    offsets = [tensor(1) if inner else None for _ in range(layers)]
    biases = [tensor(dim) if biased == "all" or (biased == "some" and n % 2) else None for n in range(layers)]
    leaves = [x0, *weights, *offsets, *biases]
    for run in (vector.OP, vector.call):
        assert_same(
            lambda run=run: run(x0, weights, offsets, biases), lambda: vector.reference(x0, weights, offsets, biases), leaves,
        )  # fmt: skip


def test_float32_stays_close_to_float64():
    """The closed form sums in another order; its error is that of the plain form."""
    torch.manual_seed(0)
    x0 = torch.randn(64, 400)
    weights, biases = [torch.randn(400) * 0.05 for _ in range(4)], [torch.randn(400) for _ in range(4)]
    none = [None] * 4
    exact = vector.reference(x0.double(), [w.double() for w in weights], none, [b.double() for b in biases])
    scale = exact.abs().max()
    plain = (vector.reference(x0, weights, none, biases) - exact).abs().max() / scale
    ours = (vector.OP(x0, weights, none, biases) - exact).abs().max() / scale
    assert ours < max(4 * plain, 1e-6), (ours, plain)


def test_autocast_casts_as_in_plain_pytorch():
    x, weight = torch.randn(4, 6), torch.randn(6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = matrix.reference(x, x, weight, None, None)
        assert torch.equal(matrix.OP(x, x, weight, None, None), plain) and matrix.call(x, x, weight, None, None).dtype == plain.dtype


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="x0 has shape"):
        matrix.OP(torch.ones(2, 1, 3), torch.ones(2, 3), torch.ones(3, 3), None, None)


def test_opcheck():
    x, weight, bias = tensor(5, 7), tensor(7, 7), tensor(7)
    for given in ((x, tensor(5, 7), weight, bias, tensor(7)), (x, tensor(5, 7), weight, None, None), (x.detach(), x, weight, None, bias)):
        torch.library.opcheck(matrix.OP, given)
    torch.library.opcheck(vector.OP, (x, [tensor(1, 7), tensor(7)], [tensor(1), None], [None, bias]))
    torch.library.opcheck(vector.OP, (tensor(2, 3, 7), [tensor(7)], [None], [bias]))


@pytest.mark.parametrize("full", [True, False])
def test_second_derivatives(full):
    torch.manual_seed(0)
    x, weight = tensor(3, 4), tensor(4, 4)
    bias, shift = (tensor(4), tensor(4)) if full else (None, None)
    for run in (matrix.call, matrix.OP):
        assert torch.autograd.gradgradcheck(run, (x, tensor(3, 4), weight, bias, shift))
        assert torch.autograd.gradgradcheck(lambda t, run=run: run(t, t, weight, bias, shift), x)
    given = (x, tensor(1, 4), tensor(4), *((tensor(1), tensor(1), tensor(4), tensor(4)) if full else [None] * 4))
    for run in (vector.call, vector.OP):
        assert torch.autograd.gradgradcheck(lambda x0, *t, run=run: run(x0, list(t[:2]), list(t[2:4]), list(t[4:])), given)


@pytest.mark.parametrize("shifted", [True, False])
def test_a_low_weight_makes_the_product_low_and_nothing_else(shifted):
    torch.manual_seed(0)
    x0, x, shift, seed = (torch.randn(6, 5) for _ in range(4))
    x0, x, shift = x0.requires_grad_(), x.requires_grad_(), shift[0].clone().requires_grad_() if shifted else None
    weight, bias = (torch.randn(s).bfloat16().requires_grad_() for s in ((5, 5), (5,)))
    leaves = [t for t in (x0, x, weight, bias, shift) if t is not None]
    results = []
    for run in (matrix.call, matrix.reference, matrix.OP):
        out = run(x0, x, weight, bias, shift)
        assert out.dtype == torch.float32
        results.append([out, *torch.autograd.grad(out, leaves, seed)])
    for made in (results[0], results[2]):
        for a, b in zip(made, results[1]):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)
    residual = matrix.call(x0, x, torch.zeros_like(weight), None, None)
    assert torch.equal(residual, x), "the residual is not rounded"
    torch.library.opcheck(matrix.OP, (x0, x, weight, bias, shift), raise_exception=True)
