"""The int8 row codec on a GPU: the launches of the Triton kernels. The other codecs are casts, which PyTorch's own kernels do."""

# Triton types what a kernel takes as constexpr.
# pyright: reportArgumentType=false
from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..embedding.gpu_launch import TYPES, on_device
from .triton_kernels import decode_kernel, encode_kernel

MAX_DIM = 8192  # the widest row of one tile
_ELEMENTS = 2048  # of a tile: 16 a thread


def tile_options(dim: int) -> dict:
    """Rows and width of a tile, and warps."""
    block = triton.next_power_of_2(dim)
    return {"R": max(1, _ELEMENTS // block), "D": block, "num_warps": 4 if block <= 2048 else 8}


def serves(values: Tensor, dim: int) -> bool:
    """May the kernels take (or make) these rows: of a half or single precision dtype, not too wide, columns in one piece?"""
    return values.dtype in TYPES and 0 < dim <= MAX_DIM and (values.dim() < 2 or values.stride(1) == 1) and values.shape[0] > 0


def _vector(itemsize: int, *bytes_apart: int) -> int:
    return max(1, math.gcd(16, *bytes_apart) // itemsize)


def encode(rows: Tensor) -> Tensor:
    """``[n, dim]`` -> uint8 ``[n, dim + 8]``: see ``op.py``."""
    count, dim = rows.shape
    payload = torch.empty(count, dim + 8, dtype=torch.uint8, device=rows.device)
    options, size = tile_options(dim), rows.element_size()
    with on_device(rows.device):
        encode_kernel[(triton.cdiv(count, options["R"]),)](
            rows, rows.stride(0), payload, count, dim, dim + 8, X_VEC=_vector(size, rows.data_ptr(), rows.stride(0) * size, dim * size),
            VEC=_vector(1, dim, payload.data_ptr(), dim + 8), enable_fp_fusion=False, **options,
        )  # fmt: skip
    return payload


def decode(payload: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """uint8 ``[n, dim + 8]`` -> ``[n, dim]`` of ``dtype``: see ``op.py``."""
    count = payload.shape[0]
    out = torch.empty(count, dim, dtype=dtype, device=payload.device)
    options = tile_options(dim)
    with on_device(payload.device):
        decode_kernel[(triton.cdiv(count, options["R"]),)](
            payload, payload.stride(0), out, count, dim, VEC=_vector(1, dim, payload.data_ptr(), payload.stride(0)),
            OUT_VEC=_vector(dtype.itemsize, dim * dtype.itemsize, out.data_ptr()), enable_fp_fusion=False, **options,
        )  # fmt: skip
    return out
