"""``tablewright::tier_slots(ids, table) -> slots``: bring the rows of ``ids`` into a tiered table's cache and say where they are.

``ids``: int32 or int64, any shape. ``table``: :attr:`~.table.TieredTable.number`. ``slots``: int64, of the shape of ``ids``. What it does to
the cache is no part of the graph's values, so it is called once for each node, in the order of the graph.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..library import DIRECT, LIBRARY
from .table import table_of

LIBRARY.define("tier_slots(Tensor ids, int table) -> Tensor", tags=[torch.Tag.nondeterministic_seeded])  # neither moved nor dropped


def slots(ids: Tensor, table: int) -> Tensor:
    """See the module."""
    return table_of(table).slots(ids)


@torch.library.register_fake("tablewright::tier_slots", lib=LIBRARY)
def _fake(ids, table):
    return torch.empty_like(ids, dtype=torch.int64)


LIBRARY.impl("tier_slots", slots, "CompositeExplicitAutograd")
OP = torch.ops.tablewright.tier_slots.default
DIRECT[OP] = slots
