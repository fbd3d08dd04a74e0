"""One pooled lookup as a single call, and the row sums that some models compute their mask from.

``embedding_pool(weight, ids, sample_weights, padding_idx, padding_read, wrap_negative, sparse)`` is the sum over L of ``weight[ids]``, ids
``[B, L]``, each row scaled by ``sample_weights[B, L]`` where given; the result is ``[B, dim]``. The row ``padding_idx`` (-1: no
such row) gets no gradient; it is summed like any other with ``padding_read`` (``nn.Embedding`` followed by a sum), and left out
without (``nn.EmbeddingBag``). ATen has no call for the first of these. It consists of ``embedding_bags`` with one lookup, and
GroupTables lets many of them share a launch. ``weight`` may have int8 rows (``int8_rows.py``).

``embedding_row_sums(weight, ids)`` is ``weight[ids].sum(-1)`` as far as comparing with 0 goes: of the shape of ``ids``, zero where
that sum is zero and else of its sign, not differentiable. The tensor of all looked-up rows never exists. Whether a float sum is
zero can depend on its order; the C++ kernel (native/row_sums.cpp) knows for which rows, and those are summed by PyTorch, so the
answer is the plain model's on every table. Raises IndexError for an id outside the table.
"""
from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..library import LIBRARY
from . import cpu
from .op import OP
from .reference import row_dim
from .spec import GroupSpec, Lookup, Table

LIBRARY.define(
    "embedding_pool(Tensor weight, Tensor ids, Tensor? sample_weights=None, int padding_idx=-1, bool padding_read=True,"
    " bool wrap_negative=False, bool sparse=False) -> Tensor"
)
LIBRARY.define("embedding_row_sums(Tensor weight, Tensor ids) -> Tensor")

POOL = torch.ops.tablewright.embedding_pool.default
ROW_SUMS = torch.ops.tablewright.embedding_row_sums.default
_CHUNK_BYTES = {"cpu": 1 << 18, "cuda": 1 << 26}  # of looked-up rows at a time: they stay in a cache, or memory stays bounded


@functools.lru_cache(maxsize=1024)
def _spec(rows: int, dim: int, padding_idx: int, padding_read: bool, wrap_negative: bool, sparse: bool) -> str:
    table = Table("weight", rows, dim, "sparse" if sparse else "dense")
    padding = None if padding_idx < 0 else padding_idx
    lookup = Lookup(0, "embedding_pool", "sum", 0, 0, padding, wrap_negative=wrap_negative, padding_read=padding_read)
    return GroupSpec((table,), (lookup,), (dim,)).encode()


def _pool(weight, ids, sample_weights=None, padding_idx=-1, padding_read=True, wrap_negative=False, sparse=False) -> Tensor:
    text = _spec(weight.shape[0], row_dim(weight), padding_idx, padding_read, wrap_negative, sparse)
    return OP([weight], [ids], [None], [sample_weights], [], text)[0]


LIBRARY.impl("embedding_pool", _pool, "CompositeImplicitAutograd")


def _row_sums(weight: Tensor, ids: Tensor) -> Tensor:
    weight, flat = weight.detach(), ids.reshape(-1)
    out = weight.new_empty(flat.shape)
    doubtful = _native_row_sums(weight, flat, out)
    if doubtful is None:
        chunk = max(1, _CHUNK_BYTES.get(weight.device.type, 1 << 26) // max(1, weight.shape[1] * weight.element_size()))
        for start in range(0, flat.numel(), chunk):
            torch.sum(weight.index_select(0, flat[start : start + chunk]), -1, out=out[start : start + chunk])
    elif doubtful:
        again = out.isnan()
        out[again] = weight.index_select(0, flat[again]).sum(-1)
    return out.view(ids.shape)


def _native_row_sums(weight: Tensor, ids: Tensor, out: Tensor) -> int | None:
    """How many sums are in doubt (NaN); ``None`` where the C++ kernel does not take the call."""
    function = None if cpu._lib is None else getattr(cpu._lib, "tw_row_sums", None)
    is_plain = weight.is_cpu and ids.is_cpu and weight.dtype in (torch.float32, torch.float64) and weight.stride(1) == 1
    if function is None or not is_plain or ids.dtype not in (torch.int32, torch.int64):
        return None
    ids = ids.contiguous()
    word = function.restype = ctypes.c_int64
    (rows, dim), threads = weight.shape, torch.get_num_threads() if ids.numel() > 4096 else 1
    doubtful = function(
        ctypes.c_void_p(weight.data_ptr()), word(weight.dtype == torch.float64), word(weight.stride(0)), word(rows), word(dim),
        ctypes.c_void_p(ids.data_ptr()), word(ids.element_size()), word(ids.numel()), ctypes.c_void_p(out.data_ptr()), word(threads),
    )  # fmt: skip
    if doubtful < 0:
        worst = int(ids[(ids < 0) | (ids >= rows)][0])
        raise IndexError(f"id {worst} is out of range for a table of {rows} rows")
    return doubtful


LIBRARY.impl("embedding_row_sums", _row_sums, "CompositeExplicitAutograd")


@torch.library.register_fake("tablewright::embedding_row_sums", lib=LIBRARY)
def _fake_row_sums(weight, ids):
    return weight.new_empty(ids.shape)
