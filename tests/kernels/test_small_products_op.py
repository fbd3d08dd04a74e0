"""``small_products`` against ``torch.matmul``: sizes around whole vectors, strides, edges of memory, builds, gradients, threads."""
from __future__ import annotations

import pytest
import torch
from tablewright.kernels.small_products import cpu, op

NATIVE = pytest.mark.skipif(not cpu.describe().startswith("native"), reason="the C++ kernels were not built")


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "AVX2", "AVX-512"])
def level(request):
    before = cpu._lib.twp_level(-1)
    if cpu._lib.twp_level(request.param) != request.param:
        pytest.skip("this processor has no such instructions")
    yield
    cpu._lib.twp_level(before)


def close(ours, a, b):
    wanted = a.double() @ b.double()
    torch.testing.assert_close(ours.double(), wanted, atol=1e-5 * max(1, a.shape[-1] ** 0.5), rtol=1e-5)
    assert ours.is_contiguous()


@NATIVE
@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 32, 33, 48, 63, 64, 65, 130, 256])
def test_sizes(n, level):
    torch.manual_seed(0)
    for lead in ((1,), (5,), (3, 2)):
        for m, k in ((1, 1), (2, 9), (7, 3), (8, 16), (13, 40), (23, 1)):
            a, b = torch.randn(*lead, m, k), torch.randn(*lead, k, n)
            assert cpu.serves(a, b)
            close(cpu.product(a, b), a, b)


@NATIVE
def test_strides(level):
    torch.manual_seed(0)
    a, b = torch.randn(3, 9, 4, 10), torch.randn(3, 9, 4, 10)
    for x, y in ((a, b.mT), (a.mT, b), (a.transpose(1, 2), b.permute(0, 2, 3, 1)), (a[:, :, 1:3, ::2], b[:, :, :2, 5:].mT), (a[::2], b[::2].mT)):
        assert cpu.serves(x, y)
        close(cpu.product(x, y), x, y)
    same = torch.randn(4, 5).expand(6, 4, 5)
    x = torch.randn(6, 7, 4)
    close(cpu.product(x, same), x, same)
    close(cpu.product(torch.ones(()).expand(6, 7, 4), same), torch.ones(6, 7, 4), same)


@NATIVE
def test_nothing_is_read_or_written_beside(level):
    """NaN around the operands must not come in, and what lies around the result stays."""
    for n in (3, 16, 21):
        outer = torch.full((3, 4, 40), float("nan"))
        b = outer[:, :, 2 : 2 + n].copy_(torch.randn(3, 4, n))
        a = torch.randn(3, 5, 4)
        close(cpu.product(a, b), a, b)
        tight = torch.randn(3 * 4 * n)[-2 * 4 * n :].view(2, 4, n)  # ends where its memory ends
        close(cpu.product(a[:2], tight), a[:2], tight)


@NATIVE
def test_threads_give_the_same_bits():
    torch.manual_seed(0)
    a, b = torch.randn(301, 2, 17, 30), torch.randn(301, 2, 30, 19)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(cpu.product(a, b))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    close(results[0], a, b)


def test_gradients():
    torch.manual_seed(0)
    a, b = torch.randn(4, 2, 5, 3, requires_grad=True), torch.randn(4, 2, 6, 3, requires_grad=True)
    ours = torch.autograd.grad((op.call(a, b.mT) ** 2).sum(), (a, b))
    plain = torch.autograd.grad(((a @ b.mT) ** 2).sum(), (a, b))
    for x, y in zip(ours, plain):
        torch.testing.assert_close(x, y)
    assert torch.autograd.grad(op.call(a.detach(), b.mT).sum(), b)[0].shape == b.shape  # broadcast gradient, one operand only
    (first,) = torch.autograd.grad((op.call(a, b.mT) ** 3).sum(), a, create_graph=True)
    (plainly,) = torch.autograd.grad(((a @ b.mT) ** 3).sum(), a, create_graph=True)
    for x, y in zip(torch.autograd.grad(first.sum(), (a, b)), torch.autograd.grad(plainly.sum(), (a, b))):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.randn(4, 5), torch.randn(5, 6)),
        (torch.randn(2, 4, 5).double(), torch.randn(2, 5, 6).double()),
        (torch.randn(2, 4, 5).bfloat16(), torch.randn(2, 5, 6).bfloat16()),
        (torch.randn(2, 1, 4, 5), torch.randn(1, 3, 5, 6)),
        (torch.randn(2, 4, 5), torch.randn(2, 5, 257)),
        (torch.randn(2, 4, 5, dtype=torch.complex64).conj().imag, torch.randn(2, 5, 6)),
        (torch.randn(2, 4, 5), torch.randn(2, 5, 6, dtype=torch.complex64).conj().imag),
        (torch.randn(0, 4, 5), torch.randn(0, 5, 6)),
        (torch.randn(2, 4, 0), torch.randn(2, 0, 6)),
    ],
    ids=["matrices", "float64", "bfloat16", "broadcast", "wide", "negative view", "negative view, right", "no rows", "no sum"],
)
def test_everything_else_is_matmul(a, b):
    assert not cpu.serves(a, b) and torch.equal(op.call(a, b), a @ b)


def test_the_result_is_where_the_operands_are():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    with torch.device("meta"):  # a default for what names no device
        ours = op.call(a, b)
    torch.testing.assert_close(ours, a @ b)


def test_bad_shapes_and_compile():
    with pytest.raises(RuntimeError):
        op.call(torch.randn(2, 4, 5), torch.randn(2, 6, 5))
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    compiled = torch.compile(op.OP, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), a @ b)
    with torch.autocast("cpu", torch.bfloat16):
        assert op.call(a, b).dtype == torch.bfloat16
