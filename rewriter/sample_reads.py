"""What the sample batch looks up: for choosing an exchange by counted bytes, and for cutting rows where they are read equally often."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Interpreter

from ..kernels.codecs.op import row_bytes
from ..kernels.collectives.spec import TableLayout
from ..kernels.embedding.op import OP
from ..kernels.embedding.reference import Reads, unroll
from ..kernels.embedding.spec import decode
from .capture.check import modes_kept, state_kept, undisturbed


def reads_of(graph: Graph, shell: nn.Module, leaves: list[Any]) -> dict[str, list[Reads]]:
    """Every lookup of every table on these inputs, by table. Nothing of the model changes."""
    found: dict[str, list[Reads]] = {}

    class Recorder(Interpreter):
        def call_function(self, target, args, kwargs):
            if target is OP:
                spec = decode(args[5])
                for lookup, ids, offsets in zip(spec.lookups, args[1], args[2]):
                    reads = unroll(spec, lookup, ids, offsets, None, torch.float32)
                    found.setdefault(spec.tables[lookup.table].name, []).append(reads)
            return super().call_function(target, args, kwargs)

    with undisturbed(), modes_kept(shell), state_kept(shell, graph), torch.no_grad():
        Recorder(shell, graph=graph).run(*leaves, enable_io_processing=False)
    return found


def exchange_bytes(layout: TableLayout, reads: list[Reads], itemsize: int) -> dict[str, int]:
    """Bytes of one step for this rank's lookups of a table, by exchange: ids, rows and gradients, to whichever rank."""
    each = sum(_row(layout, s.columns, itemsize) for s in layout.shards if s.row == layout.shards[0].row)
    copies = len([s for s in layout.shards if s.row == layout.shards[0].row])  # ids go to each rank that has some of the columns
    bounds = torch.tensor(sorted({s.row for s in layout.shards})[1:], dtype=torch.int64)
    distinct = torch.cat([r.rows for r in reads]).unique().numel()
    bags = ids = lengths = 0
    for r in reads:
        parts = torch.bucketize(r.rows, bounds, right=True)
        sent = torch.unique_consecutive(torch.stack([parts, r.bag])[:, torch.argsort(parts, stable=True)], dim=1).shape[1] if r.rows.numel() else 0
        bags, ids = bags + sent, ids + r.rows.numel()
        lengths += 0 if sent == r.rows.numel() else sent
    return {"pooled": bags * each + 4 * (ids + lengths) * copies, "unique": distinct * (each + 4 * copies)}


def _row(layout: TableLayout, columns: int, itemsize: int) -> int:
    return sum(columns * itemsize if codec == "fp32" else row_bytes(codec, columns) for codec in (layout.forward, layout.backward))


def even_cuts(rows: int, parts: int, counts: Mapping[int, int] | Tensor) -> list[int]:
    """First rows of ranges ``1 .. parts - 1``, cut so that each range is read about equally often. ``counts`` int64 ``[rows]``: how often
    each row is read; every row counts a little, so that ranges of rows that nobody read are not boundless."""
    weight = torch.as_tensor(counts, dtype=torch.float64) + 1e-3 * max(1.0, float(torch.as_tensor(counts).sum())) / rows
    share = weight.cumsum(0) / weight.sum()
    cuts = torch.searchsorted(share, torch.arange(1, parts, dtype=torch.float64) / parts).add_(1).tolist()
    for i in range(len(cuts)):  # at least one row in each
        cuts[i] = max(cuts[i], (cuts[i - 1] if i else 0) + 1)
    for i in reversed(range(len(cuts))):
        cuts[i] = min(cuts[i], rows - (parts - 1 - i))
    return cuts
