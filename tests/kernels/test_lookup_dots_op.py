"""``tablewright::lookup_dots`` beside ``embedding_bags`` + ``dot_interaction``: results, every gradient, edges, errors."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tablewright.kernels.embedding.op import call as embedding_bags
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table
from tablewright.kernels.interaction.op import DOT_INTERACTION
from tablewright.kernels.lookup_dots import cpu
from tablewright.kernels.lookup_dots.op import OP, call

D = 6
PAIRS = "4 lower"


def spec(grad="dense", wrap=False, width=D):
    """A dense vector, then lookups 1, 0 and 1 (a tied table)."""
    tables = Table("a.weight", 9, width, grad), Table("b.weight", 5, width, grad)
    lookups = tuple(
        Lookup(t, f"lookup{i}", "none", 0, width * (i + 1), padding_idx=2 if i == 1 else None, wrap_negative=wrap) for i, t in enumerate((1, 0, 1))
    )
    return GroupSpec(tables, lookups, (4 * width,), (Extra(0, 0, width),))


def inputs(batch=7, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    tables = [torch.randn(n, D, dtype=dtype).requires_grad_() for n in (9, 5)]
    ids = [torch.randint(0, n, (batch,)) for n in (5, 9, 5)]
    return tables, ids, torch.randn(batch, D, dtype=dtype).requires_grad_()


def fused(tables, ids, dense, of, place=1, multiple=1, run=call, extras=None):
    nothing = [None] * len(ids)
    (rows,) = embedding_bags(tables, ids, nothing, nothing, [dense], replace(of, unmade=True).encode())
    assert rows.untyped_storage().nbytes() == rows.element_size() and not rows.any()
    return run(rows, tables, ids, [dense], [dense] if extras is None else extras, of.encode(), PAIRS, place, multiple)


def parts(tables, ids, dense, of, place=1, multiple=1, extras=None):
    nothing = [None] * len(ids)
    (slot,) = embedding_bags(tables, ids, nothing, nothing, [dense], of.encode())
    return DOT_INTERACTION(slot.view(-1, 4, D), [dense] if extras is None else extras, PAIRS, place, None, "", multiple)


def results(function, tables, ids, dense, of, **options):
    tables, dense = [t.detach().clone().requires_grad_() for t in tables], dense.detach().clone().requires_grad_()
    out = function(tables, ids, dense, of, **options)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    return [out.detach(), dense.grad, *(t.grad.to_dense() if t.grad is not None else None for t in tables)]


@pytest.fixture(params=[1 << 20, 1], ids=["in one part", "sample by sample"])
def cache(request, monkeypatch):
    monkeypatch.setattr(cpu, "_CACHE", request.param)


@pytest.mark.parametrize("batch", [7, 1, 0])
@pytest.mark.parametrize("grad", ["dense", "sparse", "none"])
def test_results_and_gradients(cache, batch, grad):
    for options in ({}, {"place": 0, "multiple": 8}, {"multiple": 8}, {"extras": [], "place": 0}):
        for run in (call, OP):
            made = results(lambda *a, run=run, **o: fused(*a, run=run, **o), *inputs(batch), spec(grad), **options)
            want = results(parts, *inputs(batch), spec(grad), **options)
            for a, b in zip(made, want, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b)
            if options.get("multiple"):
                assert made[0].shape[1] == 16 and not made[0][:, 12:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(cache, dtype):
    made, want = (results(f, *inputs(dtype=dtype), spec()) for f in (fused, parts))
    for a, b in zip(made, want):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_negative_ids_and_a_result_of_another_dtype():
    tables, _, dense = inputs(3)
    ids = [torch.tensor([-1, 0, -5]), torch.tensor([-9, 8, -1]), torch.tensor([4, -4, 0])]
    of = spec(wrap=True)
    torch.testing.assert_close(fused(tables, ids, dense, of), parts(tables, ids, dense, of))
    nothing = [None] * 3
    (rows,) = embedding_bags(tables, ids, nothing, nothing, [dense], replace(of, unmade=True).encode())
    low = call(rows, tables, ids, [dense], [dense], of.encode(), PAIRS, 1, 1, torch.bfloat16)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), parts(tables, ids, dense, of), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        made = fused(tables, ids, dense.to(torch.bfloat16), of)
        want = parts(tables, ids, dense.to(torch.bfloat16), of)
    assert made.dtype == want.dtype
    torch.testing.assert_close(made.float(), want.float(), rtol=2e-2, atol=2e-2)


def test_bad_ids_are_named_as_for_the_whole_batch(cache):
    tables, ids, dense = inputs(7)
    ids[1][5] = 9
    for function in (fused, parts):
        with pytest.raises(IndexError, match=r"id 9 at position 5 of lookup 'lookup1'"):
            function(tables, ids, dense, spec())


def test_a_table_changed_before_the_backward_is_an_error():
    tables, ids, dense = inputs()
    out = fused(tables, ids, dense, spec())
    with torch.no_grad():
        tables[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_gradient_penalty_on_the_dense_vector():
    made = []
    for function in (fused, parts):
        tables, ids, dense = inputs(dtype=torch.float64)
        (grad,) = torch.autograd.grad(function(tables, ids, dense, spec()).square().sum(), dense, create_graph=True)
        grad.square().sum().backward()
        made.append([grad, dense.grad, *(t.grad for t in tables)])
    for a, b in zip(*made):
        torch.testing.assert_close(a, b)


def test_opcheck_and_compile():
    tables, ids, dense = inputs()
    rows = torch.zeros(()).expand(7, 4 * D)
    given = rows, [t.detach() for t in tables], ids, [dense.detach()], [dense.detach()], spec().encode(), PAIRS, 1, 8
    torch.library.opcheck(OP, given)
    backward = torch.ops.tablewright.lookup_dots_backward.default
    torch.library.opcheck(backward, (torch.randn(7, 6), *given[1:4], spec().encode(), PAIRS))
    texts = replace(spec(), unmade=True).encode(), spec().encode()
    made = results(torch.compile(lambda *a: fused_op(*a[:3], *texts), backend="aot_eager", fullgraph=True), *inputs(), spec())
    for a, b in zip(made, results(parts, *inputs(), spec())):
        torch.testing.assert_close(a, b)


def fused_op(tables, ids, dense, unmade, text):
    nothing = [None] * len(ids)
    (rows,) = torch.ops.tablewright.embedding_bags(tables, ids, nothing, nothing, [dense], unmade)
    return OP(rows, tables, ids, [dense], [dense], text, PAIRS, 1)


def test_bad_specs_and_pairs():
    tables, ids, dense = inputs()
    with pytest.raises(IndexError, match="reads feature 6; its input has 4"):
        call(torch.zeros(7, 24), tables, ids, [dense], [], spec().encode(), "0-6")
    bags = replace(spec(), lookups=tuple(replace(x, pooling="sum") for x in spec().lookups))
    with pytest.raises(ValueError, match="plain lookups of one width in one slot"):
        call(torch.zeros(7, 24), tables, ids, [dense], [], bags.encode(), PAIRS)
