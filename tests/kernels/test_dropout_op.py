"""``tablewright::dropout`` is ``torch.dropout``: the same bits, and the generator is left in the same state."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.dropout import cpu
from tablewright.kernels.dropout.op import OP, call

needs_library = pytest.mark.skipif(not cpu.available(), reason=f"NOT TESTED: {cpu.describe()}, or another random stream here")


@pytest.fixture(params=range(3), ids=["baseline", "AVX2", "AVX-512"])
def level(request):
    """Each instruction set that this machine has."""
    before = cpu._lib.twd_level(-1)
    if cpu._lib.twd_level(request.param) != request.param:
        pytest.skip("this processor does not have it")
    yield
    cpu._lib.twd_level(before)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32)


def run(function, x, p, *, train=True, seed=5, drawn_before=0):
    torch.manual_seed(seed)
    torch.rand(drawn_before)
    x = x.detach().requires_grad_()
    out = function(x, p, train)
    (grad,) = torch.autograd.grad(out, x, torch.linspace(-1, 1, x.numel()).view(x.shape))
    return bits(out), bits(grad), torch.get_rng_state()


def assert_same(x, p, **how):
    for ours, plain in zip(run(call, x, p, **how), run(torch.dropout, x, p, **how)):
        assert torch.equal(ours, plain)


@needs_library
@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.75, 0.999, 1e-6])
def test_same_bits(level, p):
    torch.manual_seed(0)
    assert_same(torch.randn(64, 50), p)


@needs_library
@pytest.mark.parametrize("count", [2048, 2049, 3119, 3120, 3121, 100_000])
@pytest.mark.parametrize("before", [0, 1, 311, 623, 624, 625])
def test_anywhere_in_the_stream(level, count, before):
    """Blocks of the generator hold 624 words; a value needs two, so pairs may straddle blocks."""
    assert_same(torch.randn(count), 0.3, drawn_before=before)


@needs_library
def test_special_values(level):
    """A dropped value is multiplied by 0, as in torch: NaN stays NaN, the sign of zero stays."""
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 1e-45, 3e38, 0.0]).repeat(600)
    assert_same(x, 0.5)


@pytest.mark.parametrize(
    "x",
    [torch.randn(5), torch.randn(0, 4), torch.randn(90, 60).t(), torch.randn(90, 60)[:, ::2]],
    ids=["few", "none", "transposed", "every other"],
)
def test_what_the_library_does_not_take(x):
    assert_same(x, 0.4)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_p_of_zero_and_one(p):
    assert_same(torch.randn(3000), p)


def test_evaluation_returns_the_input_and_draws_nothing():
    x, state = torch.randn(3000), torch.get_rng_state()
    assert call(x, 0.5, False) is x and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    x = torch.randn(3000, dtype=dtype)
    torch.manual_seed(1)
    plain = torch.dropout(x, 0.3, True)
    torch.manual_seed(1)
    assert torch.equal(call(x, 0.3, True), plain)


@needs_library
def test_normal_draws_afterwards_are_the_same():
    """The generator keeps a spare normal value: it must survive."""
    results = []
    for function in (call, torch.dropout):
        torch.manual_seed(2)
        torch.randn(1)
        function(torch.ones(5000), 0.5, True)
        results.append((torch.randn(3), torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_op_and_its_trace():
    torch.manual_seed(3)
    plain = torch.dropout(torch.ones(4000), 0.3, True)
    torch.manual_seed(3)
    assert torch.equal(OP(torch.ones(4000), 0.3, True), plain)
    traced = torch.compile(lambda x: OP(x, 0.3, True), backend="aot_eager", fullgraph=True)
    out = traced(torch.ones(4000, requires_grad=True))
    out.sum().backward()
    assert 0.6 < (out > 0).float().mean() < 0.8
    assert torch.library.opcheck(OP, (torch.ones(4000, requires_grad=True), 0.3, False), raise_exception=True)


@needs_library
def test_second_derivatives():
    x, vector, results = torch.randn(60, 60), torch.randn(60, 60), []
    for run in (call, torch.dropout):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad((run(leaf * leaf, 0.4, True) ** 2).sum(), leaf, create_graph=True)
        results += torch.autograd.grad((grad * vector).sum(), leaf)
    assert torch.equal(*results)
