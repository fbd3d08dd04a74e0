"""The Triton kernels of ``lookup_dots`` beside ``reference.py``. Run by ``test_lookup_dots_triton.py``, in a process of its own.

With ``TRITON_INTERPRET=1`` on CPU tensors, otherwise on the GPU. In the interpreter float32 -> bfloat16 truncates instead of
rounding, so bfloat16 is compared to twice the usual tolerance.
"""
from __future__ import annotations

import os

import pytest
import torch
from tablewright.kernels.embedding import reference as embedding
from tablewright.kernels.embedding.id_status import check_ids
from tablewright.kernels.embedding.spec import Extra, GroupSpec, Lookup, Table
from tablewright.kernels.lookup_dots import gpu, reference

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def case(dtype, batch, count, dim, id_type=torch.int64, wrap=False):
    """``count`` features: lookups of two tables in turn, and a dense vector in the middle."""
    torch.manual_seed(batch + count + dim)
    sizes = (23, 7)
    tables = [torch.randn(n, dim, device=DEVICE).to(dtype) for n in sizes]
    places = [f for f in range(count) if f != count // 2]
    lookups = tuple(Lookup(f % 2, f"lookup{f}", "none", 0, f * dim, wrap_negative=wrap) for f in places)
    spec = GroupSpec(
        tuple(Table(f"t{i}", n, dim) for i, n in enumerate(sizes)), lookups, (count * dim,), (Extra(0, count // 2 * dim, dim),)
    )
    low = -7 if wrap else 0
    ids = [torch.randint(low, sizes[f % 2], (batch,), device=DEVICE).to(id_type) for f in places]
    return spec, tables, ids, [torch.randn(batch, dim, device=DEVICE).to(dtype)]


def close(made, want):
    assert made.shape == want.shape
    tolerance = TOLERANCE[made.dtype]
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(made.float(), want.float(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(("dtype", "batch", "count", "dim"), [
    (torch.float32, 3, 5, 6), (torch.float32, 1, 2, 1), (torch.float16, 2, 27, 64), (torch.bfloat16, 2, 9, 32), (torch.float32, 0, 4, 8),
    (torch.float32, 2, 18, 70),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("half_ids", [False, True], ids=["int64", "int32, negative"])
def test_forward_and_backward(dtype, batch, count, dim, half_ids):
    spec, tables, ids, dense = case(dtype, batch, count, dim, torch.int32 if half_ids else torch.int64, wrap=half_ids)
    pairs = f"{count} upper+diagonal"
    want = reference.dots(spec, tables, ids, dense, pairs)
    out = torch.full((batch, want.shape[1] + dim + 3), 7.0, device=DEVICE, dtype=dtype)
    part = out[:, dim : dim + want.shape[1]]
    gpu.dots(spec, tables, ids, dense, pairs, part, [(dense[0], out[:, :dim])])
    close(part, want)
    assert torch.equal(out[:, :dim], dense[0]) and bool((out[:, dim + want.shape[1] :] == 7).all())
    grad = torch.randn(batch, want.shape[1], device=DEVICE).to(dtype)
    close(gpu.dots_backward(grad, spec, tables, ids, dense, pairs), reference.dots_backward(grad, spec, tables, ids, dense, pairs))
    check_ids()


def test_a_result_of_another_dtype():
    spec, tables, ids, dense = case(torch.float32, 3, 5, 8)
    out = torch.empty(3, 10, device=DEVICE, dtype=torch.float16)
    gpu.dots(spec, tables, ids, dense, "5 lower", out)
    close(out, reference.dots(spec, tables, ids, dense, "5 lower"))


def test_bad_ids_are_found_and_read_as_zeros():
    spec, tables, ids, dense = case(torch.float32, 4, 5, 8)
    ids[1][2], ids[1][3], ids[2][1] = 7, -1, 23
    out = torch.empty(4, 10, device=DEVICE)
    gpu.dots(spec, tables, ids, dense, "5 lower", out)
    with pytest.raises(IndexError, match=r"id 7 at position 2 of lookup 'lookup1'"):
        check_ids()
    fine = [i.clone() for i in ids]
    fine[1][2], fine[1][3], fine[2][1] = 0, 0, 0
    x = reference.rows_of(embedding, spec, tables, fine, dense).clone()
    x[2, 1], x[3, 1], x[1, 3] = 0, 0, 0
    i, j = torch.tril_indices(5, 5, -1)
    close(out, torch.bmm(x, x.mT)[:, i, j])


def test_what_the_kernel_does_not_take():
    for dtype, count in ((torch.float64, 4), (torch.float32, 130)):
        spec, tables, ids, dense = case(dtype, 2, count, 4)
        out = torch.empty(2, 2, device=DEVICE, dtype=dtype)
        gpu.dots(spec, tables, ids, dense, "0-1,1-3", out)
        torch.testing.assert_close(out, reference.dots(spec, tables, ids, dense, "0-1,1-3"))
        grad = torch.ones(2, 2, device=DEVICE, dtype=dtype)
        made = gpu.dots_backward(grad, spec, tables, ids, dense, "0-1,1-3")
        torch.testing.assert_close(made, reference.dots_backward(grad, spec, tables, ids, dense, "0-1,1-3"))
    check_ids()
