"""``tablewright::dense`` against plain PyTorch: values, gradients, edges, the dispatcher's checks."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.dense import gemm, native
from tablewright.kernels.dense import op as dense_op
from tablewright.kernels.dense.op import ACTIVATIONS, OP, call, reference


def both(x, weight, bias, activation, run=OP):
    """(out, gradients...) of the op and of the reference, the latter in float64."""
    results = []
    for function, dtype in ((run, x.dtype), (reference, torch.float64)):
        given = [None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (x, weight, bias)]
        out = function(*given, activation)
        seed = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        wanted = [t for t in given if t is not None and t.requires_grad]
        results.append([out, *torch.autograd.grad(out, wanted, seed)])
    return results


def assert_equal(results, **tolerance):
    for ours, plain in zip(*results):
        assert ours.shape == plain.shape and ours.is_contiguous()
        torch.testing.assert_close(ours.double(), plain, **tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(0, 9), (1, 9), (5, 9), (2, 3, 9), (9,)])
def test_small_products_and_edges(shape, biased, activation):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True) if biased else None
    assert_equal(both(x, weight, bias, activation), rtol=1e-12, atol=1e-12)
    assert_equal(both(x, weight, bias, activation, call), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["rows", "columns", "every other", "expanded"])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(300, 128), (13, 512), (512, 13)])
def test_large_products_of_any_layout(fan_in, fan_out, layout):
    """Large enough for oneDNN, wherever PyTorch has it."""
    torch.manual_seed(0)
    rows = 1 + gemm.LEAST_WORK // (fan_in * fan_out)
    given = {
        "rows": torch.randn(rows, fan_in), "columns": torch.randn(fan_in, rows).t(),
        "every other": torch.randn(rows, 2 * fan_in)[:, ::2], "expanded": torch.randn(1, fan_in).expand(rows, fan_in),
    }[layout]  # fmt: skip
    weight = torch.randn(fan_out, fan_in, requires_grad=True)
    assert gemm.onednn_serves(given, weight) == (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
    results = both(given.requires_grad_(), weight, torch.randn(fan_out, requires_grad=True), "tanh")
    assert_equal(results, rtol=1e-4, atol=2e-4)


NARROW = pytest.mark.skipif(not gemm.small.available(), reason="needs the C++ kernels")


@NARROW
@pytest.mark.parametrize("layout", ["rows", "columns", "part of wider rows", "expanded"])
@pytest.mark.parametrize(("rows", "fan_in", "fan_out"), [(1024, 4, 9), (1300, 30, 5), (8200, 1, 36), (8192, 37, 1), (2049, 16, 16), (1025, 64, 256)])
def test_weight_gradients_of_narrow_layers(rows, fan_in, fan_out, layout):
    torch.manual_seed(0)

    def matrix(columns):
        return {
            "rows": torch.randn(rows, columns), "columns": torch.randn(columns, rows).t(),
            "part of wider rows": torch.randn(rows, columns + 3)[:, 2:-1], "expanded": torch.randn(1, columns).expand(rows, columns),
        }[layout]  # fmt: skip

    grad, x = matrix(fan_out), matrix(fan_in)
    assert gemm._is_narrow(grad, x)
    ours, wanted = gemm.weight_gradient(grad, x), grad.double().t() @ x.double()
    assert ours.is_contiguous() and ours.shape == wanted.shape
    rounding = (grad.double().abs().t() @ x.double().abs()) * 2e-5
    assert ((ours.double() - wanted).abs() <= rounding).all()


@NARROW
def test_what_is_no_narrow_weight_gradient():
    good = torch.randn(8192, 8)
    assert gemm._is_narrow(good, good) and not gemm._is_narrow(good[:1023], good[:1023]) and not gemm._is_narrow(good[:2048, :3], good[:2048])
    assert not gemm._is_narrow(good.double(), good.double()) and not gemm._is_narrow(good[:, :0], good)
    assert not gemm._is_narrow(torch.randn(8192, 300), good) and not gemm._is_narrow(torch.randn(8192, 200), torch.randn(8192, 100))


def test_nan_and_zero_as_in_torch():
    """oneDNN's own relu would make 0 of NaN."""
    x = torch.randn(2000, 40)
    x[3] = float("nan")
    x[5] = 0
    weight = torch.randn(40, 40, requires_grad=True)
    out = OP(x, weight, None, "relu")
    assert out[3].isnan().all() and not out[4].isnan().any()
    (grad,) = torch.autograd.grad(OP(torch.zeros(2000, 40), weight, None, "relu").sum(), weight)
    assert (grad == 0).all()
    bias = torch.zeros(40, requires_grad=True)
    (grad,) = torch.autograd.grad(OP(torch.zeros(2000, 40), weight, bias, "relu").sum(), bias)
    assert (grad == 0).all(), "the derivative of relu at 0 is 0"


def test_only_wanted_gradients():
    x, weight, bias = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True), torch.randn(3)
    out = OP(x, weight, bias, "relu")
    out.sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None
    assert not OP(x, weight.detach(), bias, "none").requires_grad
    with torch.no_grad():
        assert not OP(x, weight, bias, "relu").requires_grad


def test_a_changed_weight_is_seen():
    """Nothing of a weight may be kept between calls."""
    x, weight = torch.randn(600, 64), torch.randn(64, 64)
    first = OP(x, weight, None, "none")
    weight.mul_(2)
    torch.testing.assert_close(OP(x, weight, None, "none"), 2 * first, rtol=1e-4, atol=1e-4)


def test_autocast_casts_as_in_plain_pytorch():
    x, weight = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(x, weight, None, "relu").dtype == OP(x, weight, None, "relu").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x, weight = torch.randn(8, 6, dtype=dtype, requires_grad=True), torch.randn(3, 6, dtype=dtype, requires_grad=True)
    assert_equal(both(x, weight, None, "relu"), rtol=2e-2, atol=2e-2)


def test_refusals():
    with pytest.raises(ValueError, match="activation is 'gelu'; it must be one of"):
        OP(torch.ones(2, 3), torch.ones(4, 3), None, "gelu")
    with pytest.raises(ValueError, match="weight has shape"):
        OP(torch.ones(2, 3), torch.ones(3), None, "none")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        OP(torch.ones(2, 3), torch.ones(4, 5), None, "none")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation):
    x, weight, bias = torch.randn(300, 80, requires_grad=True), torch.randn(128, 80, requires_grad=True), torch.randn(128)
    torch.library.opcheck(OP, (x, weight, bias.requires_grad_(), activation))
    torch.library.opcheck(OP, (x[:2].detach(), weight, None, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [True, False])
def test_second_derivatives(activation, biased):
    torch.manual_seed(0)
    given = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (4, 5), (4,))]
    given[2] = given[2] if biased else None
    for run in (call, OP):
        assert torch.autograd.gradgradcheck(lambda *t, run=run: run(*t, activation), given)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hessian_vector_products_of_large_products(activation):
    """Where oneDNN makes the first derivative; and the engine runs only what leads to the weight, which once hid the error."""
    torch.manual_seed(0)
    x, weight, vector = torch.randn(50, 64), torch.randn(600, 64, requires_grad=True), torch.randn(600, 64)
    products = []
    for run in (call, reference):
        loss = (run(x, weight, None, activation) ** 2).mean() + (weight**3).mean()
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        products += torch.autograd.grad((grad * vector).sum(), weight)
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)


LAYOUTS = {
    "columns of a wider matrix": lambda rows, width: torch.randn(rows, width + 5)[:, 3:-2],
    "every other column": lambda rows, width: torch.randn(rows, width, 2)[..., 1],
    "one row for all": lambda rows, width: torch.randn(1, width).expand(rows, width),
    "transposed": lambda rows, width: torch.randn(width, rows).t(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_second_operands_reach_onednn_in_one_piece(layout, monkeypatch):
    """oneDNN takes other layouts, and is a thousand times slower on them."""
    operands = []
    op = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(gemm, "LEAST_WORK", 0)
    monkeypatch.setattr(gemm.torch.ops.mkldnn, "_linear_pointwise", lambda x, w, *rest: operands.append(w) or op(x, w, *rest))
    if not gemm._has_onednn:
        pytest.skip("NOT TESTED: this PyTorch has no oneDNN")
    grad, x, weight = layout(40, 6), layout(40, 7), layout(6, 7)
    torch.testing.assert_close(gemm.weight_gradient(grad, x), grad.t() @ x)
    wide = layout(40, 30)
    torch.testing.assert_close(gemm.weight_gradient(wide, x), wide.t() @ x)
    torch.testing.assert_close(gemm.input_gradient(grad, weight), grad @ weight)
    torch.testing.assert_close(gemm.linear(x, weight, None), x @ weight.t())
    assert len(operands) == 4 and all(w.is_contiguous() or w.t().is_contiguous() for w in operands)


@pytest.mark.parametrize("shape", [(4, 3, 9), (5, 9)])
def test_the_result_may_be_written_to(shape):
    """As that of a linear layer: no view that autograd guards."""
    x, weight, bias = (torch.randn(size, requires_grad=True) for size in (shape, (4, 9), (4,)))
    results = []
    for function in (call, reference):
        out = function(x, weight, bias, "none")
        out += 1
        results.append(torch.autograd.grad(out.masked_fill_(out > 1, 0).sum(), (x, weight, bias)))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain)


@pytest.mark.skipif(not native._ready, reason=f"NOT TESTED: {native.describe()}")
@pytest.mark.parametrize("shape", [(1201, 40), (13, 100, 40)])
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_relus_are_masked_by_the_layer_above(shape, readers, threads, monkeypatch, request):
    """Where it is the only reader, once; where another reader's gradient is added, again. Over several threads torch's ops do it."""
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    passes = []
    masked = native.masked
    monkeypatch.setattr(native, "masked", lambda *args: passes.append(1) or masked(*args))
    weights = [torch.randn(out, into) / 8 for into, out in ((40, 1030), (1030, 47), (47, 33))]
    results = []
    for run, dtype in ((call, torch.float32), (reference, torch.float64)):
        torch.manual_seed(1)
        flag = (True,) if run is call else ()
        given = [torch.randn(shape).to(dtype), *(w.to(dtype) for w in weights), *(torch.randn(len(w)).to(dtype) for w in weights)]
        x, *parameters = [t.requires_grad_() for t in given]
        first = run(x, parameters[0], parameters[3], "relu")
        second = run(first, parameters[1], parameters[4], "relu", *flag)
        out = run(second, parameters[2], parameters[5], "none", *flag)
        loss = out.square().sum() + (first.cos().sum() if readers == 2 else 0)
        results.append(torch.autograd.grad(loss, [x, *parameters]))
    assert len(passes) == (readers - 1 if threads == 1 else 0)
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.skipif(not native._ready, reason=f"NOT TESTED: {native.describe()}")
def test_a_mask_of_another_result_is_not_taken():
    x = torch.randn(1500, 40, requires_grad=True)
    weight = torch.randn(40, 40)
    out = call(x, weight, None, "relu")
    grad = torch.randn(1500, 40)
    plain = torch.autograd.grad(out, x, grad, retain_graph=True)[0]
    setattr(grad, dense_op._MASKED, (x.data_ptr(), grad._version, torch.zeros(40)))
    assert torch.equal(torch.autograd.grad(out, x, grad, retain_graph=True)[0], plain)
    setattr(grad, dense_op._MASKED, (out.data_ptr(), grad._version - 1, torch.zeros(40)))
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], plain)
