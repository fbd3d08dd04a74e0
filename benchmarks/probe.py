"""This machine's own limits for the same rows: how fast it reads them at random, and reads, changes and writes them back."""
from __future__ import annotations

from collections.abc import Callable

import torch
from tablewright.kernels import memory
from tablewright.kernels.embedding import cpu
from torch import Tensor, nn

_AHEAD = 16  # rows prefetched ahead


def _global_rows(weights: list[Tensor], ids: Tensor) -> Tensor:
    first = torch.arange(len(weights)).unsqueeze(1) * weights[0].shape[0]
    return (ids + first).reshape(-1)


def _probe(weights: list[Tensor], rows: Tensor, out: Tensor | None, write: bool) -> None:
    row_bytes = weights[0].shape[1] * weights[0].element_size()
    place = 0 if out is None else out.data_ptr()
    cpu._lib.tw_probe(
        torch.get_num_threads(), weights[0].data_ptr(), rows.data_ptr(), rows.numel(), row_bytes, _AHEAD, place, int(write)
    )  # fmt: skip


def gather_limit(weights: list[Tensor], batches: list[Tensor], copies: bool) -> Callable[[int], None]:
    """Read every looked-up row once per lookup (``copies``: and write it out, as a lookup without pooling does). ``weights``
    lie one after another in memory."""
    rows = [_global_rows(weights, ids) for ids in batches]
    out = torch.empty(rows[0].numel(), weights[0].shape[1]) if copies else None
    return lambda i: _probe(weights, rows[i % len(rows)], out, write=False)


def update_limit(
    weights: list[Tensor], batches: list[Tensor], state: Tensor, bags: int, copies: bool, stored: bool = False
) -> Callable[[int], None]:  # fmt: skip
    """What a lookup with its update must move: read every looked-up row (and write it out, see :func:`gather_limit`), read one
    gradient row for each of ``bags`` bags, and read, change and write back each distinct row, in ascending order, and the same
    rows of ``state``, of one number a row or one an element. ``stored``: the summed gradient of each distinct row is written to memory and read
    again, as a step from ``.grad`` must."""
    read = gather_limit(weights, batches, copies)
    distinct = [_global_rows(weights, ids).unique() for ids in batches]
    parts = [weights, [state.view(sum(map(len, weights)), -1)]]
    gradients = torch.randn(bags, weights[0].shape[1])
    order = torch.randperm(bags)
    most = max(map(len, distinct)) if stored else 0
    source, sums = torch.randint(0, bags, (most,)), torch.empty(most, weights[0].shape[1])
    memory.use_huge_pages([sums])
    in_order = torch.arange(most)

    def call(i: int) -> None:
        read(i)
        count = len(distinct[i % len(distinct)]) if stored else 0
        if stored:
            _probe([gradients], source[:count], sums, write=False)
            _probe([sums], in_order[:count], None, write=False)
        _probe([gradients], order[count:], None, write=False)  # what was not read before
        for part in parts:
            _probe(part, distinct[i % len(distinct)], None, write=True)

    return call


class _Gradients(torch.autograd.Function):
    """Lookups that look nothing up: an output that is there, and gradients that are summed already."""

    @staticmethod
    def forward(ctx, output, made, ids, offsets, *tables):
        ctx.made = made
        ctx.save_for_backward(*ids, offsets)
        return output.detach()

    @staticmethod
    def backward(ctx, grad):
        _ = ctx.saved_tensors
        sparse = (torch.sparse_coo_tensor(r, v, size, is_coalesced=True, check_invariants=False) for r, v, size in ctx.made)
        return None, None, None, None, *sparse


def torch_alone(weights: list[Tensor], batches: list[list[Tensor]], offsets: Tensor, grads: list[Tensor]) -> Callable[[int], None]:
    """What torch itself does in a step from sparse gradients, and nothing else: ids saved and read, a sparse gradient of each table made and
    accumulated into ``.grad``, looked at once as an optimizer must, and dropped. No row is read or written."""
    tables = [nn.Parameter(w) for w in weights]
    made = []
    for w, ids in zip(weights, batches[0]):
        rows = ids.unique()
        made.append((rows.unsqueeze(0), torch.zeros(len(rows), w.shape[1]), w.shape))

    def call(i: int) -> None:
        _Gradients.apply(grads[0], made, batches[i % len(batches)], offsets, *tables).backward(grads[i % len(grads)])
        for table in tables:
            _ = table.grad._indices(), table.grad._values()  # type: ignore[union-attr]
        for table in tables:
            table.grad = None

    return call
