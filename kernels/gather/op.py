"""``tablewright::distributed_gather`` and ``tablewright::distributed_gather_bag``: rows by id from a *named* table that lies elsewhere.

They are what lookups become in a serving graph, which holds no table: the name, the number of rows and the width are all that it knows.

* ``distributed_gather(ids, table, rows, dim, wrap_negative=False)``: ``ids`` integer ``[*]`` -> float32 ``[*, dim]``.
* ``distributed_gather_bag(ids, offsets, per_sample_weights, table, rows, dim, mode, padding_idx=-1, include_last_offset=False,
  wrap_negative=False)``: with ``offsets`` ``[bags]`` (``[bags + 1]`` with ``include_last_offset``) ids are ``[n]``, without they are
  ``[bags, length]``; -> float32 ``[bags, dim]``. ``mode`` is "sum", "mean" or "max"; weights ``like ids`` for "sum" only. Ids equal to
  ``padding_idx`` are left out of their bags; an empty bag is zeros. The meaning is that of ``torch.nn.functional.embedding_bag``.

Valid ids are ``0 .. rows - 1``; with ``wrap_negative`` (``weight[ids]`` in Python) also ``-rows .. -1``, counted from the end.

Eager mode runs them where :func:`bound` says what reads rows; they have no gradient. A predictor never runs them: it cuts the graph
here (``rewriter/serving``).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..library import LIBRARY

MODES = ("sum", "mean", "max")
Read = Callable[[str, Tensor], Tensor]

LIBRARY.define("distributed_gather(Tensor ids, str table, int rows, int dim, bool wrap_negative=False) -> Tensor")
LIBRARY.define(
    "distributed_gather_bag(Tensor ids, Tensor? offsets, Tensor? per_sample_weights, str table, int rows, int dim, str mode, "
    "int padding_idx=-1, bool include_last_offset=False, bool wrap_negative=False) -> Tensor"
)
_reads: ContextVar[Read | None] = ContextVar("tablewright_rows", default=None)


@contextmanager
def bound(read: Read) -> Iterator[None]:
    """Within, the ops get their rows from ``read(table, ids)``: ``ids`` int64 ``[n]``, valid and not negative -> float32 ``[n, dim]``."""
    token = _reads.set(read)
    try:
        yield
    finally:
        _reads.reset(token)


def _rows(ids: Tensor, table: str, rows: int, dim: int, wrap_negative: bool) -> Tensor:
    """``[n, dim]`` for all ``ids``, flat. Raises ``RuntimeError`` where nothing is bound, ``IndexError`` for an id that is no row."""
    read = _reads.get()
    if read is None:
        raise RuntimeError(
            f"table '{table}' is not in this graph, and nothing that reads its rows is bound: a serving graph runs in a predictor "
            "(tw.load_serving), or in eager mode inside kernels.gather.op.bound(...)"
        )
    flat = ids.reshape(-1).long()
    least = -rows if wrap_negative else 0
    wrong = (flat < least) | (flat >= rows)
    if bool(wrong.any()):
        raise IndexError(f"id {int(flat[wrong][0])} is not a row of table '{table}', which has {rows}")
    found = read(table, torch.where(flat < 0, flat + rows, flat))
    if found.shape != (len(flat), dim):
        raise RuntimeError(f"rows of table '{table}' came as {list(found.shape)}; [{len(flat)}, {dim}] were needed")
    return found.float()


def gather(ids: Tensor, table: str, rows: int, dim: int, wrap_negative: bool = False) -> Tensor:
    """:data:`GATHER` in plain PyTorch, on the bound rows."""
    return _rows(ids, table, rows, dim, wrap_negative).reshape(*ids.shape, dim)


def gather_bag(
    ids: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, table: str, rows: int, dim: int, mode: str,
    padding_idx: int = -1, include_last_offset: bool = False, wrap_negative: bool = False,
) -> Tensor:  # fmt: skip
    """:data:`BAG` in plain PyTorch, on the bound rows."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {MODES}")
    found = _rows(ids, table, rows, dim, wrap_negative)
    # F.embedding_bag over the rows that were found: each occurrence has a row of its own, and all left-out ones share the last
    own = torch.arange(len(found), device=ids.device)
    flat = ids.reshape(-1).long()
    kept = (torch.where(flat < 0, flat + rows, flat) != padding_idx) if padding_idx >= 0 else torch.ones_like(flat, dtype=torch.bool)
    own = torch.where(kept, own, len(found)).reshape(ids.shape)
    return F.embedding_bag(
        own, torch.cat([found, found.new_zeros(1, dim)]), None if offsets is None else offsets.long(), mode=mode,
        per_sample_weights=None if per_sample_weights is None else per_sample_weights.float(),
        include_last_offset=include_last_offset, padding_idx=len(found),
    )  # fmt: skip


def _fake_gather(ids, table, rows, dim, wrap_negative=False):
    return ids.new_empty((*ids.shape, dim), dtype=torch.float32)


def _fake_bag(ids, offsets, per_sample_weights, table, rows, dim, mode, padding_idx=-1, include_last_offset=False, wrap_negative=False):
    bags = ids.shape[0] if offsets is None else offsets.shape[0] - (1 if include_last_offset else 0)
    return ids.new_empty((bags, dim), dtype=torch.float32)


LIBRARY.impl("distributed_gather", gather, "CompositeExplicitAutograd")
LIBRARY.impl("distributed_gather_bag", gather_bag, "CompositeExplicitAutograd")
torch.library.register_fake("tablewright::distributed_gather", _fake_gather, lib=LIBRARY)
torch.library.register_fake("tablewright::distributed_gather_bag", _fake_bag, lib=LIBRARY)

GATHER = torch.ops.tablewright.distributed_gather.default
BAG = torch.ops.tablewright.distributed_gather_bag.default
