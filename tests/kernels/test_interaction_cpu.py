"""The interaction ops on CPU: every instruction set beside float64 PyTorch, gradients, layouts, dtypes, errors."""
from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tablewright.kernels.interaction import cpu, reference
from tablewright.kernels.interaction.constants import digest
from tablewright.kernels.interaction.op import DOT_INTERACTION, FM, PAIR_PRODUCTS
from tablewright.kernels.interaction.pairs import Pairs, decode

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(0, 4, 8), (1, 1, 1), (3, 5, 16), (2, 6, 7), (5, 17, 33), (2, 27, 64), (1, 70, 100)]


@pytest.fixture(params=[0, 1, 2], ids=["baseline", "AVX2", "AVX-512"])
def level(request):
    assert cpu._lib is not None, "the C++ kernels are not built here"
    before = cpu._lib.twi_level(-1)
    if cpu._lib.twi_level(request.param) != request.param:
        pytest.skip("NOT TESTED: this CPU lacks the instruction set")
    yield
    cpu._lib.twi_level(before)


def layouts(shape, dtype):
    """The same numbers in one piece, as a part of something larger, and with the last two dimensions swapped in memory."""
    batch, features, dim = shape
    torch.manual_seed(batch + features + dim)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    wide = torch.zeros(batch + 1, features + 2, dim + 3, dtype=dtype)
    wide[1:, 1 : features + 1, 2 : dim + 2] = x
    return {"plain": x, "part": wide[1:, 1 : features + 1, 2 : dim + 2], "swapped": x.transpose(1, 2).contiguous().transpose(1, 2)}


def pair_lists(features):
    names = ["lower+diagonal", "upper+diagonal"] + (["lower", "upper"] if features > 1 else [])
    few = ",".join(f"{(3 * k) % features}-{(5 * k + 1) % features}" for k in range(5))
    return [*(f"{features} {name}" for name in names), few, ""]


def close(made, want, dtype):
    assert made.shape == want.shape and made.dtype == dtype
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    assert want.numel() == 0 or float((made.double() - want).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_beside_float64(level, shape):
    for dtype in TOLERANCE:
        for name, x in layouts(shape, dtype).items():
            exact = x.double()
            for pairs in pair_lists(shape[1]) if name == "plain" else pair_lists(shape[1])[-3:]:
                for what in ("dots", "products"):
                    want = getattr(reference, what)(exact, pairs)
                    close(getattr(cpu, what)(x, pairs), want, dtype)
                    grad = torch.randn(want.shape).to(dtype)
                    back = getattr(reference, f"{what}_backward")(grad.double(), exact, pairs)
                    close(getattr(cpu, f"{what}_backward")(grad, x, pairs), back, dtype)
            for reduce in (False, True):
                want = 0.3 * ((exact.sum(1) ** 2 - (exact**2).sum(1)) / 2)
                want = want.sum(1) if reduce else want
                close(cpu.fm(x, 0.3, reduce), want, dtype)
                grad = torch.randn(want.shape).to(dtype)
                close(cpu.fm_backward(grad, x, 0.3, reduce), reference.fm_backward(grad.double(), exact, 0.3, reduce), dtype)


def test_gradients_of_any_layout():
    """What autograd hands back may be expanded or a part of something wider."""
    x = torch.randn(4, 6, 9, dtype=torch.float64)
    dots = {"expanded": torch.randn(4, 1).double().expand(4, 15), "one": torch.ones(()).double().expand(4, 15)}
    dots["part"] = torch.randn(4, 40).double()[:, 3:33:2]
    for grad in dots.values():
        close(cpu.dots_backward(grad, x, "6 lower"), reference.dots_backward(grad, x, "6 lower"), x.dtype)
        wide = grad[:, :, None].expand(4, 15, 9)
        close(cpu.products_backward(wide, x, "6 lower"), reference.products_backward(wide, x, "6 lower"), x.dtype)
        close(cpu.fm_backward(grad[:, :9], x, 1.0, False), reference.fm_backward(grad[:, :9], x, 1.0, False), x.dtype)
        close(cpu.fm_backward(grad[:, 0], x, 1.0, True), reference.fm_backward(grad[:, 0], x, 1.0, True), x.dtype)


LOW = torch.bfloat16


def bfloat16_dots(native, monkeypatch):
    if not native:
        monkeypatch.setattr(cpu, "rounds", lambda *given: False)
    elif not (cpu._lib is not None and cpu._lib.twi_low()):
        pytest.skip("NOT TESTED: this CPU does not multiply bfloat16, or the library is not built")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 8), (1, 2, 1), (3, 5, 16), (2, 6, 7), (3, 17, 33), (2, 27, 64), (2, 27, 128), (2, 70, 100)], ids=str)
def test_float32_rows_as_bfloat16(native, shape, monkeypatch):
    """Sums are float32 sums of products of rounded values, going back unrounded; extras of both dtypes, any layout, anything finite or not beside it."""
    bfloat16_dots(native, monkeypatch)
    pairs = f"{shape[1]} lower"
    for name, x in layouts(shape, torch.float32).items():
        if name == "part":
            x._base.fill_(float("nan"))
            x.copy_(layouts(shape, torch.float32)["plain"])
        assert cpu.rounds(x, pairs, LOW) is native
        x, extra = x.detach().requires_grad_(), torch.randn(shape[0], 3, requires_grad=True)
        made = DOT_INTERACTION(x, [extra, extra.to(LOW)], pairs, 1, None, "", 8, LOW)
        count = len(decode(pairs))
        assert made.dtype == LOW and made.shape[1] % 8 == 0 and torch.equal(made[:, :3], extra.to(LOW)) and not made[:, count + 6 :].any()
        exact = x.detach().to(LOW).double()
        close(made[:, 3 : 3 + count].detach(), reference.dots(exact, pairs), LOW)
        grad = torch.randn(made.shape, dtype=LOW)
        dx, dextra = torch.autograd.grad(made, [x, extra], grad)
        again = torch.autograd.grad(DOT_INTERACTION(x, [extra], pairs, 0, dtype=LOW)[:, :count], x, grad[:, 3 : 3 + count], create_graph=True)[0]
        assert again.requires_grad
        torch.testing.assert_close(again.detach(), dx, rtol=2e-2, atol=2e-2)
        back = reference.dots_backward(grad[:, 3 : 3 + count].double(), exact, pairs)
        close(*((dx, back, torch.float32) if native else (dx.to(LOW), back, LOW)))
        assert dx.dtype == dextra.dtype == torch.float32
        torch.testing.assert_close(dextra, grad[:, :3].float() + grad[:, 3 + count : 6 + count].float(), rtol=1e-2, atol=1e-2)


def test_bfloat16_dots_of_a_row_that_is_not_a_number(monkeypatch):
    bfloat16_dots(True, monkeypatch)
    x = torch.randn(3, 27, 64)
    x[1, 5, 63] = float("nan")
    made = DOT_INTERACTION(x, [], "27 lower", dtype=LOW)
    first, second = (torch.tensor(n) for n in (decode("27 lower").first, decode("27 lower").second))
    assert torch.equal(made.isnan()[1], (first == 5) | (second == 5)) and not made[[0, 2]].isnan().any()


def test_the_same_bits_for_any_number_of_threads():
    x = torch.randn(1024, 13, 40)
    grad = torch.randn(1024, 78)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            low = DOT_INTERACTION(x, [], "13 lower", dtype=LOW), DOT_INTERACTION_BACKWARD(grad, x, "13 lower", LOW)
            results.append([cpu.dots(x, "13 lower"), cpu.dots_backward(grad, x, "13 lower"), cpu.fm(x, 1.0, True), *low])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_nothing_cancels_in_fm():
    """The plain difference of squares of large sums loses what the running sums keep."""
    x = torch.full((1, 3, 1), 1e4)
    x[0, 2] = 1e-4
    want = (1e8 + 2.0) + 0.0
    assert abs(float(FM(x, 1.0, True)) - want) <= 8


DOT_INTERACTION_BACKWARD = torch.ops.tablewright.dot_interaction_backward.default

# --- the ops -------------------------------------------------------------------------------------------------------------------

_X = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
_E = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
CALLS = {
    "dots beside two": (DOT_INTERACTION, (_X, [_E, _E * 2], "5 lower", 1)),
    "dots": (DOT_INTERACTION, (_X, [], "0-1,3-2,1-1")),
    "products": (PAIR_PRODUCTS, (_X, "5 upper+diagonal")),
    "fm": (FM, (_X, 0.5, False)),
    "fm summed": (FM, (_X, 0.5, True)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    op, args = CALLS[name]
    detached = tuple([e.detach().requires_grad_() for e in a] if isinstance(a, list) else a for a in args)
    if name == "dots":
        args = torch.randn(4, 5, 6, requires_grad=True), [], "5 lower", 0, None, "", 1, LOW
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(op, detached).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives(name):
    op, args = CALLS[name]
    given = (_X, _E) if len(args) == 4 else (_X,)

    def call(x, *e):
        return op(x, *([[e[0], e[0] * 2], *args[2:]] if e else args[1:]))

    assert torch.autograd.gradcheck(call, given) and torch.autograd.gradgradcheck(call, given)


def test_extras_go_where_they_belong_and_promote():
    x, a, b = torch.randn(2, 3, 4).half(), torch.randn(2, 1), torch.randn(2, 2).half()
    for place in range(3):
        made = DOT_INTERACTION(x, [a, b], "3 lower", place)
        parts = [a, b.float()]
        parts.insert(place, cpu.dots(x, "3 lower").float())
        assert made.dtype == torch.float32 and torch.equal(made, torch.cat(parts, 1))


def test_autocast_takes_x_as_bmm_does():
    x = torch.randn(2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert DOT_INTERACTION(x, [], "3 lower").dtype == torch.bmm(x, x.mT).dtype == torch.bfloat16


def test_compiled_in_one_graph():
    x, e = torch.randn(4, 5, 6, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def function(x, e):
        return DOT_INTERACTION(x, [e], "5 lower", 1).sum() + (PAIR_PRODUCTS(x, "5 upper") ** 2).sum() + FM(x, 1.0, True).sum()

    want = torch.autograd.grad(function(x, e), [x, e])
    made = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x, e), [x, e])
    for a, b in zip(made, want):
        torch.testing.assert_close(a, b)


def test_a_feature_that_is_not_there_is_named():
    x = torch.randn(2, 4, 3)
    for call in (lambda: DOT_INTERACTION(x, [], "0-6"), lambda: PAIR_PRODUCTS(x, "7 lower")):
        with pytest.raises(IndexError, match="the interaction reads feature 6; its input has 4"):
            call()


def test_a_changed_constant_is_noticed():
    x, mask = torch.randn(2, 3, 4), torch.tensor([1, 0])
    text = digest([mask])
    DOT_INTERACTION(x, [], "1-0", 0, [mask], text)
    DOT_INTERACTION(x, [], "1-0", 0, [mask.clone()], text)
    mask[0] = 2
    with pytest.raises(RuntimeError, match="has changed since optimize"):
        DOT_INTERACTION(x, [], "1-0", 0, [mask], text)
    with pytest.raises(RuntimeError, match="has changed since optimize"):
        FM(x, 1.0, True, [mask], text)


@pytest.mark.parametrize("text", ["", "5 lower", "5 upper", "5 lower+diagonal", "2 upper+diagonal", "0-1,0-1,3-0"])
def test_pairs_are_texts_and_back(text):
    assert decode(text).encode() == text
    assert decode(text) == Pairs(decode(text).first, decode(text).second)


def test_pairs_that_are_none():
    for wrong in ("0-1-2", "x"):
        with pytest.raises(ValueError):
            decode(wrong)
    with pytest.raises(ValueError, match="equally long"):
        Pairs((1,), (1, 2))
    with pytest.raises(ValueError, match="from 0"):
        Pairs((-1,), (1,))
    assert decode("3 lower").distinct and not decode("0-1,1-0").distinct


def test_without_the_library_the_reference_does_the_work():
    code = (
        "import torch\nfrom tablewright.kernels.interaction import cpu, reference\n"
        "cpu._lib, cpu._why_not = None, 'it was taken away'\n"
        "assert cpu.describe() == 'pure PyTorch: it was taken away'\n"
        "from tablewright.kernels.interaction.op import DOT_INTERACTION, FM, PAIR_PRODUCTS\n"
        "x = torch.randn(3, 4, 5, requires_grad=True)\n"
        "d = torch.randn(3, 2)\n"
        "y = DOT_INTERACTION(x, [d], '4 lower', 1)\n"
        "li, lj = torch.tril_indices(4, 4, -1)\n"
        "torch.testing.assert_close(y, torch.cat([d, (x @ x.mT)[:, li, lj]], 1))\n"
        "(y.sum() + FM(x, 1.0, True).sum() + PAIR_PRODUCTS(x, '4 lower').sum()).backward()\n"
        "torch.testing.assert_close(x.grad, 3 * (x.sum(1, keepdim=True) - x).detach())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
