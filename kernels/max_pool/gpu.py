"""The maximum over the rows of a bag on a GPU: a Triton kernel for the forward, one program a bag and block of columns.

The backward touches one row a bag and column, so plain PyTorch does it (``plain.py``: a scatter-add over the chosen rows).
Maxima that are shared ("amax") and float64 are left to ``plain.py``.
"""

# Kernel bodies are Triton's language, which pyright reads as Python.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..embedding.gpu_launch import on_device
from ..embedding.id_status import IdStatus
from ..embedding.spec import GroupSpec, Lookup, Table
from . import plain
from .plain import KINDS, How

_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def max_kernel(
    weight, stride, ids, starts, mask, out, chosen, bad_at, length, rows, dim, padding, fill,
    KIND: tl.constexpr, IS_BAG: tl.constexpr, RAGGED: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``out[b] = max(values of bag b)`` and the position of each; a bag without rows is 0 and has position -1. A bad id reads
    nothing, and its place lowers ``bad_at``."""
    bag = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    begin = bag * length
    end = begin + length
    if RAGGED:
        begin = tl.load(starts + bag)
        end = tl.load(starts + bag + 1)
    best = tl.zeros((BD,), dtype=tl.float32)
    place = tl.full((BD,), -1, dtype=tl.int64)
    seen = begin < begin  # false
    for p in range(begin, end):
        row = tl.load(ids + p).to(tl.int64)
        good = (row >= 0) & (row < rows)
        tl.atomic_min(bad_at, (begin * 0 + p).to(tl.int32), mask=good == 0)
        counts = row != padding if IS_BAG else row == row
        value = tl.load(weight + row * stride + d, mask=(d < dim) & good, other=0)
        here = tl.where(good, p - begin, -1)
        if KIND == 1:
            kept = tl.load(mask + p) != 0
            value = tl.where(kept, value.to(tl.float32), fill).to(value.dtype)
            here = tl.where(kept & good, here, -1)
        if KIND == 2:
            value = value + tl.load(mask + p)
        if KIND == 3:
            value = value * tl.load(mask + p)
        value = value.to(tl.float32)
        if IS_BAG:
            more = value > best
        else:
            more = (value > best) | ((value != value) & (best == best))
        more = (more | (seen == 0)) & counts
        best = tl.where(more, value, best)
        place = tl.where(more, here, place)
        seen = seen | counts
    tl.store(out + bag * dim + d, best.to(out.dtype.element_ty), mask=d < dim)
    tl.store(chosen + bag * dim + d, place, mask=d < dim)


def forward(weight: Tensor, ids: Tensor, starts: Tensor | None, mask: Tensor | None, how: How) -> tuple[Tensor, Tensor]:
    """See ``plain.forward``. An id outside of the table is reported by ``id_status.check_ids``."""
    bags, dim = len(ids) if starts is None else len(starts) - 1, weight.shape[1]
    if how.mode == "amax" or weight.dtype not in _TYPES or not bags * dim or weight.stride(1) != 1:
        return plain.forward(weight, ids, starts, mask, how)
    out = weight.new_empty(bags, dim)
    chosen = torch.empty(out.shape, dtype=torch.int64, device=weight.device)
    columns = min(256, triton.next_power_of_2(dim))
    table = Table("weight", weight.shape[0], dim, "dense")
    spec = GroupSpec((table,), (Lookup(0, "embedding_max", "sum", 0, 0, None),), (dim,))
    status = IdStatus(spec, [ids], [starts], weight.device)
    with on_device(weight.device):
        max_kernel[(bags, triton.cdiv(dim, columns))](
            weight, weight.stride(0), ids, ids if starts is None else starts, ids if mask is None else mask, out, chosen, status.found,
            0 if starts is not None else ids.shape[1], weight.shape[0], dim, how.padding_idx, how.fill,
            KIND=KINDS.index(how.kind), IS_BAG=how.mode == "bag", RAGGED=starts is not None, BD=columns,
        )  # fmt: skip
    status.send()
    return out, chosen
