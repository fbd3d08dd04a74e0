"""Tables of int8 rows: uint8 ``[rows, dim + 8]``, the int8 payload of ``kernels/codecs``, which lookups widen as they read.

They are for frozen tables: rows are read and pooled in float32, sample weights get gradients, the table does not. All tables of a launch are
such ones or none is. A value differs from the float32 row that was encoded by at most ``(largest - least) / 510 + 2^-20 * max|row|`` of that
row (``codecs/op.py``; the second term also covers ``code * scale + offset`` rounded once instead of twice).

``embedding_int8(table, ids, offsets, sample_weights, pooling, padding_idx, include_last_offset)`` is one such lookup as a call, with the
meanings of ``spec.Lookup`` (``padding_idx`` -1: no such row); float32 ``[*ids.shape, dim]`` for pooling "none", else ``[bags, dim]``.
GroupTables lets many of them share a launch. Raises what ``embedding_bags`` raises.
"""
from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..codecs.op import row_bytes
from ..library import LIBRARY, tracing
from . import op
from .spec import GroupSpec, Lookup, Table

LIBRARY.define(
    "embedding_int8(Tensor table, Tensor ids, Tensor? offsets=None, Tensor? sample_weights=None, str pooling='none',"
    " int padding_idx=-1, bool include_last_offset=False) -> Tensor"
)
OP = torch.ops.tablewright.embedding_int8.default
_BESIDE = row_bytes("int8", 1) - 1  # bytes of a row besides its codes


@functools.lru_cache(maxsize=1024)
def _spec(rows: int, dim: int, pooling: str, padding_idx: int, include_last_offset: bool) -> str:
    padding = None if padding_idx < 0 else padding_idx
    lookup = Lookup(0, "embedding_int8", pooling, 0, 0, padding, include_last_offset)
    return GroupSpec((Table("table", rows, dim, "none"),), (lookup,), (dim,)).encode()


def _text(table: Tensor, pooling: str, padding_idx: int, include_last_offset: bool) -> str:
    if table.dtype != torch.uint8 or table.dim() != 2 or table.shape[1] <= _BESIDE:
        raise ValueError(f"the table is {table.dtype} of shape {tuple(table.shape)}; int8 rows are uint8 of shape [rows, dim + {_BESIDE}]")
    rows, dim = map(int, table.shape)  # known while tracing too: tables are stored tensors
    return _spec(rows, dim - _BESIDE, pooling, padding_idx, include_last_offset)


def _lookup(table, ids, offsets=None, sample_weights=None, pooling="none", padding_idx=-1, include_last_offset=False) -> Tensor:
    text = _text(table, pooling, padding_idx, include_last_offset)
    return op.forward([table], [ids], [offsets], [sample_weights], [], text)[0]


def _autograd(table, ids, offsets=None, sample_weights=None, pooling="none", padding_idx=-1, include_last_offset=False) -> Tensor:
    if tracing() and (sample_weights is None or not sample_weights.requires_grad):
        with torch._C._AutoDispatchBelowAutograd():
            return OP(table, ids, offsets, sample_weights, pooling, padding_idx, include_last_offset)
    text = _text(table, pooling, padding_idx, include_last_offset)
    return op.autograd([table], [ids], [offsets], [sample_weights], [], text)[0]


@torch.library.register_fake("tablewright::embedding_int8", lib=LIBRARY)
def _fake(table, ids, offsets=None, sample_weights=None, pooling="none", padding_idx=-1, include_last_offset=False):
    spec = op.decode(_text(table, pooling, padding_idx, include_last_offset))
    return table.new_empty((*op.leading_shapes(spec, [ids], [offsets])[0], spec.slots[0]), dtype=torch.float32)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("embedding_int8", _lookup, _device)
LIBRARY.impl("embedding_int8", _autograd, "Autograd")
