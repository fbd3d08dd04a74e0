"""Updates of tables that are stored in float16 or bfloat16: gradients, optimizer and rows in float32, one stochastic rounding at the end.

The gradients of the slots come in float32 and are summed in float32. The touched rows are widened, updated by the same kernels as
float32 tables, and written back with ``rounding.write`` (the noise of a row and column depends on the seed alone). Optimizer state is
float32, as for any table.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import rounding
from .checks import OptionalTensors
from .spec import GroupSpec
from .updates import TableUpdate


def update(
    run, spec: GroupSpec, slot_grads: OptionalTensors, tables: Sequence[Tensor], indices: Sequence[Tensor], offsets: OptionalTensors,
    sample_weights: OptionalTensors, updates: Sequence[TableUpdate | None], seeds: Sequence[int],
) -> None:  # fmt: skip
    """As ``reference.update``, for float16 and bfloat16 ``tables``; ``run`` is the device's implementation, ``seeds`` has one number for
    each table, another at each step. Raises what ``checks.check_inputs`` raises, before anything is written."""
    if hasattr(run, "update_rounded") and run.takes(tables):  # on a GPU, in the launches that sum the gradients
        run.update_rounded(spec, slot_grads, tables, indices, offsets, sample_weights, updates, seeds)
        return
    # Summing gradients reads no table: one row of memory stands for all rows of a float32 table.
    wide = [torch.empty(t.shape[1], device=t.device).expand(t.shape) for t in tables]
    slot_grads = [None if g is None else g.float() for g in slot_grads]
    wanted = [u is not None for u in updates]
    sums = run.sparse_gradients(spec, slot_grads, wide, indices, offsets, sample_weights, wanted)
    step = [(t.detach(), *pair, u, s) for t, pair, u, s in zip(tables, sums, updates, seeds) if pair is not None and u is not None]
    update_rows(run, step)


def update_rows(run, work: Sequence[tuple[Tensor, Tensor, Tensor, TableUpdate, int]]) -> None:
    """Update ``table`` at distinct ``rows`` (int64 ``[n]``) by float32 gradients ``[n, dim]``, for each (table, rows, gradients, update,
    seed) of ``work``."""
    compact, places, values, rules = [], [], [], []
    for table, rows, grads, rule, _ in work:
        compact.append(table.index_select(0, rows).float())  # torch indexes half precision some three times as slowly
        places.append(torch.arange(len(rows), device=rows.device))
        values.append(grads.float())
        rules.append(replace(rule, state=tuple(s[rows] for s in rule.state)))
    run.update_from_sparse(compact, places, values, rules)
    for (table, rows, _, rule, seed), made, done in zip(work, compact, rules):
        for whole, part in zip(rule.state, done.state):
            whole[rows] = part
        rounding.write(table, rows, made, seed)
