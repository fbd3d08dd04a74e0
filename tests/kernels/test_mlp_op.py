"""``tablewright::mlp`` against plain PyTorch: values, gradients, masks, dropout's draws, edges, the dispatcher's checks."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.dropout import cpu as draws
from tablewright.kernels.mlp import reference
from tablewright.kernels.mlp.layers import Layer, decode, encode, pack, unpack, words
from tablewright.kernels.mlp.op import OP, call
from torch.nn import functional as F

LAYERS = (Layer(True, 0.25), Layer(True), Layer(False, 0.5), Layer(False))
SIZES = (9, 70, 32, 33, 3)


@pytest.fixture(params=range(3), ids=["baseline", "AVX2", "AVX-512"])
def level(request):
    """Each instruction set that this machine has; without the C++ kernels the plain ops once."""
    if draws._lib is None:
        if request.param:
            pytest.skip("the C++ kernels were not built")
        yield
        return
    before = draws._lib.twd_level(-1)
    if draws._lib.twd_level(request.param) != request.param:
        pytest.skip("this processor does not have it")
    yield
    draws._lib.twd_level(before)


def parameters(sizes=SIZES, dtype=torch.float32, biased=True, seed=0):
    torch.manual_seed(seed)
    weights = [torch.randn(o, i, dtype=dtype).div_(i**0.5).requires_grad_() for i, o in zip(sizes, sizes[1:])]
    biases = [torch.randn(o, dtype=dtype).requires_grad_() if biased else None for o in sizes[1:]]
    return weights, biases


def run(function, x, weights, biases, layers, train, seed=3):
    """(out, generator state, gradients) with fresh leaves."""
    x, *tensors = (None if t is None else t.detach().clone().requires_grad_() for t in (x, *weights, *biases))
    weights, biases = tensors[: len(weights)], tensors[len(weights) :]
    torch.manual_seed(seed)
    out = function(x, weights, biases, layers, flags(train, weights))
    state = torch.get_rng_state()
    wanted = [t for t in (x, *weights, *biases) if t is not None]
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out, state, torch.autograd.grad(out, wanted, slope)


def flags(train, weights):
    return train if isinstance(train, list) else [train] * len(weights)


def plain(x, weights, biases, layers, train):
    return reference.plain(x, weights, biases, decode(layers), train)


def assert_same(x, weights, biases, layers, train, run_op=call, **tolerance):
    ours, theirs = (run(f, x, weights, biases, encode(layers), train) for f in (run_op, plain))
    assert torch.equal(ours[1], theirs[1]), "the generator is elsewhere in its stream"
    for made, want in zip((ours[0], *ours[2]), (theirs[0], *theirs[2]), strict=True):
        assert made.shape == want.shape and made.dtype == want.dtype
        torch.testing.assert_close(made, want, **tolerance)


@pytest.mark.parametrize("train", [True, False, [False, True, True, False]], ids=str)
@pytest.mark.parametrize("shape", [(5, 9), (0, 9), (1, 9), (2, 3, 9), (9,)])
def test_values_gradients_and_draws(level, shape, train):
    assert_same(torch.randn(shape), *parameters(), LAYERS, train)
    assert_same(torch.randn(shape), *parameters(biased=False), LAYERS, train, OP)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
    assert_same(torch.randn(6, 9).to(dtype), *parameters(dtype=dtype), LAYERS, True, **tolerance)


@pytest.mark.skipif(not draws.available(), reason=f"NOT TESTED: {draws.describe()}, or another random stream here")
@pytest.mark.parametrize("cols", [1, 31, 32, 33, 257])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_bfloat16_gives_the_bits_of_torch(level, cols, p):
    """Values that go through ReLU and dropout, and gradients that come back, with special values among them."""
    x = torch.randn(70, cols).to(torch.bfloat16)
    x[:7] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, 3e38]).view(7, 1)
    grads = []
    for function in (lambda y: finished(y, p), lambda y: F.dropout(F.relu(y), p)):
        torch.manual_seed(4)
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        grads += [out.detach(), *torch.autograd.grad(out, leaf, torch.linspace(-1, 1, x.numel()).view(x.shape).bfloat16())]
    assert torch.equal(grads[0].float().nan_to_num(7.5), grads[2].float().nan_to_num(7.5))
    assert torch.equal(grads[1].float(), grads[3].float())


def finished(leaf, p):
    """What the op does between two products, differentiable."""
    return _Finish.apply(leaf, p)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        out = x.clone()
        ctx.bits, ctx.p = draws.finish(out, True, p), p
        return out

    @staticmethod
    def backward(ctx, grad):
        return draws.masked(grad, ctx.bits, ctx.p), None


@pytest.mark.parametrize("cols", [1, 31, 32, 33, 256, 257, 300])
def test_the_draws_of_any_width_are_those_of_torch(level, cols):
    assert_same(torch.randn(37, 4), *parameters((4, cols)), (Layer(True, 0.3),), True)


def test_special_values(level):
    """Zeros have no gradient; NaN and infinity go through as in torch."""
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1.0, 2.0]).repeat(40, 1).t().contiguous()
    weight, bias = torch.eye(40), torch.zeros(40)
    finite = x[[0, 1, 5, 6, 7]]
    for p in (0.0, 0.5):
        layers = encode((Layer(True, p),))
        torch.manual_seed(1)
        made = call(finite.clone().requires_grad_(), [weight], [bias], layers, [True])
        torch.manual_seed(1)
        assert torch.equal(made, F.dropout(finite.relu(), p))
        assert_same(finite, [weight], [bias], (Layer(True, p),), True, rtol=0, atol=0)
    for value in (float("nan"), float("inf")):
        odd = torch.full((64, 3), value, requires_grad=True)
        torch.manual_seed(1)
        made = call(odd, [torch.ones(40, 3)], [None], encode((Layer(True, 0.5),)), [True])
        torch.manual_seed(1)
        want = F.dropout(F.linear(odd, torch.ones(40, 3)).relu(), 0.5)
        assert torch.equal(made.isnan(), want.isnan()) and torch.equal(made.isinf(), want.isinf())


def test_masks_are_bits():
    flags = torch.rand(5, 70) < 0.5
    bits = pack(flags)
    assert bits.shape == (5, words(70)) and bits.dtype == torch.int32 and torch.equal(unpack(bits, 70), flags)
    x, (weights, biases) = torch.randn(4, 9), parameters()
    made = torch.ops.tablewright.mlp_forward(x, weights, biases, encode(LAYERS), [True] * 4, None)
    assert [m.dtype for m in made[4:]] == [torch.int32] * 3 and [m.shape[1] for m in made[4:]] == [3, 1, 2]
    torch.testing.assert_close(unpack(made[5], 32), F.linear(made[0], weights[1], biases[1]) > 0)


def test_a_checkpoint_draws_the_same_mask_again():
    from torch.utils.checkpoint import checkpoint

    weights, biases = parameters()
    x = torch.randn(6, 9, requires_grad=True)
    results = []
    for again in (False, True):
        torch.manual_seed(5)
        run_op = lambda x: call(x, weights, biases, encode(LAYERS), [True] * 4)  # noqa: E731
        out = checkpoint(run_op, x, use_reentrant=False) if again else run_op(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *weights])))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_only_wanted_gradients():
    weights, biases = parameters()
    weights[0].requires_grad_(False)
    biases[2].requires_grad_(False)
    x = torch.randn(4, 9)
    call(x, weights, biases, encode(LAYERS), [True] * 4).sum().backward()
    assert weights[0].grad is None and biases[2].grad is None and biases[0].grad is not None and weights[1].grad is not None
    with torch.no_grad():
        assert not call(x, weights, biases, encode(LAYERS), [False] * 4).requires_grad


def test_second_derivatives():
    weights, biases = parameters(dtype=torch.float64)
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    made = []
    for function in (call, plain):
        torch.manual_seed(2)
        out = function(x, weights, biases, encode(LAYERS), [True] * 4)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        made.append([grad, *torch.autograd.grad(grad.square().sum(), [x, *weights])])
    for a, b in zip(*made):
        torch.testing.assert_close(a, b)


def test_autocast_is_that_of_the_plain_ops():
    weights, biases = parameters()
    x = torch.randn(4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(x, weights, biases, encode(LAYERS), [False] * 4), plain(x, weights, biases, encode(LAYERS), [False] * 4))


@pytest.mark.parametrize("train", [True, False])
def test_opcheck(train):
    weights, biases = parameters()
    layers = encode(tuple(Layer(layer.relu, 0.0) for layer in LAYERS))  # two runs of opcheck must agree
    torch.library.opcheck(OP, (torch.randn(4, 9), [w.detach().requires_grad_() for w in weights], biases, layers, [train] * 4))
    made = torch.ops.tablewright.mlp_forward(torch.randn(4, 9), weights, biases, layers, [train] * 4, None)
    made = [m.detach() for m in made]
    wanted = [True] * 9
    given = (torch.randn(4, 3), torch.randn(4, 9), [w.detach() for w in weights], made[:3], made[4:], layers, [train] * 4, wanted)
    torch.library.opcheck(torch.ops.tablewright.mlp_backward.default, given)


def test_compiled():
    weights, biases = parameters()
    x = torch.randn(4, 9, requires_grad=True)
    compiled = torch.compile(lambda x: OP(x, weights, biases, encode(LAYERS), [True] * 4), backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, lambda x: OP(x, weights, biases, encode(LAYERS), [True] * 4)):
        torch.manual_seed(7)
        out = function(x)
        results.append((out, *torch.autograd.grad(out.sum(), [x, *weights])))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "words_of_it"),
    [
        ({"weights": [torch.ones(3, 8)]}, r"weight of layer 0 has shape \[3, 8\]; \[out, 9\]"),
        ({"biases": [torch.ones(4)]}, r"bias of layer 0 has shape \[4\]; \[3\]"),
        ({"biases": [torch.ones(3).double()]}, "float64 and its input is torch.float32"),
        ({"layers": "relu 0.0 blas,none 0.0 blas"}, "2 layers with 1 weights"),
        ({"layers": "gelu 0.0 blas"}, "does not describe layers"),
        ({"layers": "relu 1.0 blas"}, "must be at least 0 and below 1"),
        ({"layers": "relu 0.5 fast"}, "the form is 'fast'"),
    ],
)  # fmt: skip
def test_bad_input(change, words_of_it):
    given = {"weights": [torch.ones(3, 9)], "biases": [None], "layers": encode((Layer(True),))} | change
    with pytest.raises(ValueError, match=words_of_it):
        call(torch.ones(2, 9), given["weights"], given["biases"], given["layers"], [False])
