"""One step of tables from the sparse gradients in ``.grad``, all in one launch for each dtype and device."""
from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, op
from .updates import TableUpdate


def apply(work: list[tuple[Tensor, Tensor, TableUpdate]]) -> None:
    """Update every (table, sparse gradient) pair; one launch per dtype and device."""
    if not work or _natively(work):
        return
    launches: dict[tuple, list] = {}
    for item in work:
        launches.setdefault((item[0].device, item[0].dtype), []).append(item)
    for items in launches.values():
        if len(launches) > 1 and _natively(items):
            continue
        tables, grads, updates = map(list, zip(*items))
        held = [table.detach() for table in tables]
        grads = [coalesced(grad) for grad in grads]
        rows = [g._indices().squeeze(0) for g in grads]
        values = [g._values() for g in grads]
        raise_bad_ids(held[0])
        op.implementation(held[0].device).update_from_sparse(held, rows, values, updates)
        torch.autograd.graph.increment_version(tables)  # the kernels write behind autograd's back


def _natively(items: list[tuple[Tensor, Tensor, TableUpdate]]) -> bool:
    """The same by the C++ library; False: nothing was done, as they are not all on the CPU, of one dtype and coalesced."""
    tables, grads, updates = map(list, zip(*items))
    done = cpu.update_from_gradients(tables, grads, updates)
    if done:
        torch.autograd.graph.increment_version(tables)
    return done


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
