"""The Triton kernels of the int8 row codec beside the reference, bit for bit. Run by ``test_codecs_triton.py``, in a process of its own."""
from __future__ import annotations

import os

import pytest
import torch
from tablewright.kernels.codecs import gpu
from tablewright.kernels.codecs.op import _decode_gpu, _encode_gpu, reference_decode, reference_encode

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def rows(count, dim, dtype=torch.float32):
    torch.manual_seed(count + dim)
    x = torch.randn(count, dim, device=DEVICE) * torch.logspace(-30, 30, count, device=DEVICE)[:, None].clamp(1e-30, 1e30)
    return x.to(dtype)


def same(a, b):
    """Equal bits, NaNs of any kind being equal."""
    assert a.shape == b.shape and a.dtype == b.dtype
    if a.dtype == torch.uint8:
        dim = a.shape[1] - 8
        assert torch.equal(a[:, :dim], b[:, :dim])
        a, b = (t[:, dim:].clone().view(torch.float32) for t in (a, b))
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(1.0), b.nan_to_num(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "dim"), [(40, 32), (3, 1), (5, 7), (17, 128), (2, 3000)])
def test_the_same_bits(dtype, count, dim):
    x = rows(count, dim, dtype)
    x = x if dtype == torch.float32 else x.clamp(-6e4, 6e4)
    payload = _encode_gpu(x, "int8")
    same(payload, reference_encode(x, "int8"))
    same(_decode_gpu(payload, "int8", dim, torch.float32), reference_decode(payload, "int8", dim, torch.float32))
    made, want = (f(payload, "int8", dim, torch.float16) for f in (_decode_gpu, reference_decode))
    same(made, want)


def test_ties_special_rows_and_views():
    nan, inf = float("nan"), float("inf")
    special = torch.tensor([
        [0, 0, 0, 0], [3.5, 3.5, 3.5, 3.5], [0, 127.5, 0.5, 255], [1.5, 2.5, 0, 255], [nan, 1, 2, 3], [inf, 1, 2, 3], [-inf, inf, 0, 0],
        [3e38, -3e38, 0, 1], [1e-45, 0, 0, 0], [1e-38, 2e-38, 0, 0], [-0.0, 0.0, -1, 1], [-7, -5, -6, -5.5],
    ], device=DEVICE)  # fmt: skip
    payload = _encode_gpu(special, "int8")
    same(payload, reference_encode(special, "int8"))
    same(_decode_gpu(payload, "int8", 4, torch.float32), reference_decode(payload, "int8", 4, torch.float32))
    wide = rows(6, 20)
    view = wide[1:, 3:14]
    same(_encode_gpu(view, "int8"), reference_encode(view.contiguous(), "int8"))
    held = torch.zeros(5, 30, dtype=torch.uint8, device=DEVICE)
    held[:, 5:24] = reference_encode(view, "int8")
    same(_decode_gpu(held[:, 5:24], "int8", 11, torch.float32), reference_decode(reference_encode(view, "int8"), "int8", 11, torch.float32))


def test_what_the_kernels_do_not_take():
    for x in (rows(0, 4), rows(3, 4).double(), rows(2, gpu.MAX_DIM + 1), rows(4, 6).t()):
        payload = _encode_gpu(x, "int8")
        same(payload, reference_encode(x, "int8"))
        same(_decode_gpu(payload, "int8", x.shape[1], torch.float64), reference_decode(payload, "int8", x.shape[1], torch.float64))
