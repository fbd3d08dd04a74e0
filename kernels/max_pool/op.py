"""``tablewright::embedding_max``: the largest value of each column over the looked-up rows of a bag; the rows are never gathered.

``embedding_max(weight, ids, offsets, mask, kind, fill, mode, padding_idx, include_last_offset, grad)`` -> ``[bags, dim]``.
``weight`` ``[rows, dim]``, floating; ``ids`` int32 or int64, ``[bags, length]``, or ``[n]`` with ``offsets`` ``[bags]`` (with ``include_last_offset``
``[bags + 1]``); ``mask`` of the shape of ``ids``, with meaning ``kind``. See :class:`plain.How` for ``kind``, ``mode``, ``padding_idx`` and ``grad``:
together they cover ``nn.EmbeddingBag(mode="max")`` and ``nn.Embedding`` followed by ``max`` or ``amax`` over the sequence, with the values
filled, added to or multiplied before, each with PyTorch's own choice of which of several equal values takes the gradient.

Measured on an AMD EPYC (Zen 5), torch 2.13, one thread, 100,000 x 16 table, 2048 x 20 ids, forward + backward with a dense gradient:
``max`` 5.4 -> 1.0 ms, masked before 8.1 -> 1.2, ``amax`` 5.9 -> 0.8, ``EmbeddingBag`` 2.5 -> 0.5; a sparse gradient comes coalesced, in 0.7.

A backward that is differentiated again (``create_graph=True``), a ``mask`` that itself takes a gradient, and every trace run as the plain
gather and maximum. Raises IndexError for an id outside the table and for a maximum over no positions (not of "bag"), ValueError
for offsets that are no bags of the ids; on a GPU the former comes as ``embedding/id_status.py`` says.
"""
from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import DIRECT, LIBRARY, tracing
from . import cpu, plain
from .plain import How

LIBRARY.define(
    "embedding_max(Tensor weight, Tensor ids, Tensor? offsets, Tensor? mask, str kind, float fill, str mode, int padding_idx=-1,"
    " bool include_last_offset=False, str grad='dense') -> Tensor"
)
GRAD = 9  # argument position


def _kernels(weight: Tensor) -> ModuleType:
    if weight.is_cuda:
        try:
            return importlib.import_module(".gpu", __package__)
        except ImportError:  # no Triton
            return plain
    return cpu if cpu.serves(weight) else plain


def reference(weight, ids, offsets, mask, kind, fill, mode, padding_idx=-1, include_last_offset=False, grad="dense") -> Tensor:
    """The same in plain, differentiable PyTorch (a bag's gradient is dense, as PyTorch's is)."""
    padding = None if padding_idx < 0 else padding_idx
    weight = weight.detach() if grad == "none" else weight
    if mode == "bag":
        flat = ids.reshape(-1) if offsets is not None else ids
        return F.embedding_bag(flat, weight, offsets, mode="max", padding_idx=padding, include_last_offset=include_last_offset)
    rows = F.embedding(ids, weight, padding, sparse=grad == "sparse" and not tracing())
    if kind == "keep":
        rows = rows.masked_fill(mask.unsqueeze(-1) == 0, fill)
    elif kind != "none":
        rows = rows + mask.unsqueeze(-1) if kind == "add" else rows * mask.unsqueeze(-1)
    return rows.amax(1) if mode == "amax" else rows.max(1).values


class _Max(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, starts, mask, how):
        out, chosen = _kernels(weight).forward(weight, ids, starts, mask, how)
        ctx.how, ctx.table = how, weight.detach()
        ctx.set_materialize_grads(False)
        # Only a shared maximum reads the table again: else it may be updated before the backward comes here.
        ctx.save_for_backward(weight if how.mode == "amax" else None, ids, starts, mask, out, chosen)
        ctx.mark_non_differentiable(chosen)
        return out, chosen

    @staticmethod
    def backward(ctx, grad, _=None):
        if grad is None:
            return (None,) * 5
        saved, ids, starts, mask, out, chosen = ctx.saved_tensors
        weight, out, how = ctx.table if saved is None else saved.detach(), out.detach(), ctx.how
        twice = torch.is_grad_enabled()  # then in ops that can be differentiated, and dense
        how = replace(how, grad="dense") if twice else how
        backend = cpu if _kernels(weight) is cpu and not twice else plain
        rows, numbers = backend.slots(weight, ids, how)
        values = backend.backward(grad, weight, ids, starts, mask, out, chosen, how, rows, numbers)
        if rows is not None:
            values = torch.sparse_coo_tensor(rows[None], values, weight.shape, is_coalesced=True, check_invariants=False)
        return values, None, None, None, None


def call(weight, ids, offsets, mask, kind, fill, mode, padding_idx=-1, include_last_offset=False, grad="dense") -> Tensor:
    """:data:`OP` without the trip through torch's dispatcher."""
    given = (weight, ids, offsets, mask, kind, fill, mode, padding_idx, include_last_offset, grad)
    if torch.compiler.is_compiling() or tracing() or (mask is not None and mask.requires_grad):
        return reference(*given)
    starts = _starts(ids, offsets, include_last_offset)
    if starts is None and mode != "bag" and not ids.shape[1]:
        raise IndexError("the maximum over a sequence of no positions has no value")
    if mask is not None:
        mask = mask.to(torch.bool if kind == "keep" else weight.dtype).contiguous()
    how = How(kind, mode, fill, padding_idx, grad)
    ids = ids.long().contiguous()
    if grad == "none" or not (weight.requires_grad and torch.is_grad_enabled()):
        return _kernels(weight).forward(weight.detach(), ids, starts, mask, how)[0]
    return _Max.apply(weight, ids, starts, mask, how)[0]


def _starts(ids: Tensor, offsets: Tensor | None, include_last_offset: bool) -> Tensor | None:
    """int64 ``[bags + 1]``."""
    if offsets is None:
        if ids.dim() != 2:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; without offsets they must be [bags, length]")
        return None
    starts = offsets.long()
    if not include_last_offset:
        starts = torch.cat([starts, starts.new_full((1,), ids.numel())])
    if starts.is_cpu and (not len(starts) or starts[0] != 0 or starts[-1] > ids.numel() or bool((starts.diff() < 0).any())):
        raise ValueError(f"offsets must start at 0, not decrease, and lie within the {ids.numel()} ids; they are {offsets[:8].tolist()}...")
    return starts.contiguous()


LIBRARY.impl("embedding_max", call, "CompositeImplicitAutograd")

OP = torch.ops.tablewright.embedding_max.default
DIRECT[OP] = call
