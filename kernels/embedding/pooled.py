"""One pooled lookup as a single call, and the row sums that some models compute their mask from.

``embedding_pool(weight, ids, sample_weights, padding_idx, padding_read, wrap_negative, sparse)`` is the sum over L of ``weight[ids]``, ids
``[B, L]``, each row scaled by ``sample_weights[B, L]`` where given; the result is ``[B, dim]``. The row ``padding_idx`` (-1: no
such row) gets no gradient; it is summed like any other with ``padding_read`` (``nn.Embedding`` followed by a sum), and left out
without (``nn.EmbeddingBag``). ATen has no call for the first of these. It consists of ``embedding_bags`` with one lookup, and
GroupTables lets many of them share a launch.

``embedding_row_sums(weight, ids)`` is ``weight[ids].sum(-1)``, of the shape of ``ids`` and not differentiable, made with a few
rows at a time: the tensor of all looked-up rows never exists. Each row is summed by PyTorch's own kernel, so a sum is zero
here exactly where it is in the plain model.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..library import LIBRARY
from .op import OP
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
    text = _spec(weight.shape[0], weight.shape[1], padding_idx, padding_read, wrap_negative, sparse)
    return OP([weight], [ids], [None], [sample_weights], [], text)[0]


LIBRARY.impl("embedding_pool", _pool, "CompositeImplicitAutograd")


def _row_sums(weight: Tensor, ids: Tensor) -> Tensor:
    weight, flat = weight.detach(), ids.reshape(-1)
    chunk = max(1, _CHUNK_BYTES.get(weight.device.type, 1 << 26) // max(1, weight.shape[1] * weight.element_size()))
    out = weight.new_empty(flat.shape)
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk]
        torch.sum(weight.index_select(0, part), -1, out=out[start : start + chunk])
    return out.view(ids.shape)


LIBRARY.impl("embedding_row_sums", _row_sums, "CompositeExplicitAutograd")


@torch.library.register_fake("tablewright::embedding_row_sums", lib=LIBRARY)
def _fake_row_sums(weight, ids):
    return weight.new_empty(ids.shape)
