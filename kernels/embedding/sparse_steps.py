"""One step of tables from the sparse gradients in ``.grad``, all in one launch for each dtype and device."""
from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, op
from .updates import TableUpdate


def apply(work: list[tuple[Tensor, Tensor, TableUpdate]]) -> None:
    """Update every (table, sparse gradient) pair; one launch per dtype and device."""
    launches: dict[tuple, list] = {}
    for item in work:
        launches.setdefault((item[0].device, item[0].dtype), []).append(item)
    for items in launches.values():
        tables, grads, updates = map(list, zip(*items))
        if not (tables[0].is_cpu and cpu.update_from_gradients(tables, grads, updates)):
            held = [table.detach() for table in tables]
            grads = [coalesced(grad) for grad in grads]
            rows = [g._indices().squeeze(0) for g in grads]
            values = [g._values() for g in grads]
            raise_bad_ids(held[0])
            op.implementation(held[0].device).update_from_sparse(held, rows, values, updates)
        torch.autograd.graph.increment_version(tables)  # the kernels write behind autograd's back


def coalesced(grad: Tensor) -> Tensor:
    """``grad`` with ascending rows, each once. Compiled backwards lose the mark though their rows are: look before sorting."""
    if grad.is_coalesced():
        return grad
    rows = grad._indices()[0]
    return grad if bool((rows[1:] > rows[:-1]).all()) else grad.coalesce()


def raise_bad_ids(table: Tensor) -> None:
    """On a GPU ids are checked without waiting for them: no row may be updated before a bad one has been reported."""
    if table.device.type == "cuda":
        from . import gpu

        gpu.check_ids()
